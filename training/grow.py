# /// script
# dependencies = ["moa-peft"]
# ///
"""Add experts to a saved mixture, or remove some: the router gains or loses their rows, the others stay as they are.

    moa grow outputs/moa --add fever=runs/fever --source pocket
    moa grow outputs/moa --add mine=runs/mine --tasks sst2 squad mine.yaml --data_dir my_data
    moa grow outputs/moa --remove squad --source pocket

One pass of the base model's first layers over prompts of the tasks is all that it takes. Held-out prompts of all tasks
then set temperature and thresholds, and tell the router's accuracy before and after. `moa fit-router` trains a router
for all experts together, which may choose another layer or head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from moa.arguments import indented, parse, run
from moa.shared_arguments import ComputingArguments, MixtureArguments, RowsArguments

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moa.growing import Growth
    from moa.model import MoaModel
    from moa.tasks import Example


@dataclass
class GrowArguments(ComputingArguments, RowsArguments, MixtureArguments):
    """Which experts, from how many prompts."""

    add: list[str] = field(default_factory=list, metadata={"help": "experts to add, as NAME=ADAPTER"})
    remove: list[str] = field(default_factory=list, metadata={"help": "names of experts to remove"})
    train_rows: int = field(default=100, metadata={"help": "prompts of a new task to make its row of"})
    validation_rows: int = field(
        default=50, metadata={"help": "prompts a task for temperature, thresholds and accuracy"}
    )
    seed: int = field(default=42, metadata={"help": "which prompts are drawn"})


@run
def main(argv: list[str] | None = None) -> None:
    (asked,) = parse(GrowArguments, argv, prog="moa grow", examples=indented(__doc__), first="mixture")
    if not asked.add and not asked.remove:
        raise ValueError("nothing to do: give experts to --add NAME=ADAPTER, or names to --remove")
    from moa.model import MoaModel

    added = _pairs(asked.add)
    model = MoaModel.from_pretrained(asked.model, asked.folder, check_base=asked.check_base, **asked.computing)
    unknown = [name for name in asked.remove if name not in model.experts]
    if unknown:
        raise ValueError(f"no expert is called {unknown[0]!r}: this mixture has {', '.join(model.experts)}")
    for name in added:
        if name in model.experts and name not in asked.remove:
            raise ValueError(f"an expert is called {name!r} already: give the new one another name, or --remove that")
    experts = list(dict.fromkeys([*model.experts, *added]))
    train, held_out = _examples(asked, experts, added, plain=model.moa_config.router.plain_prompts)
    changes = [(model.remove_expert, name) for name in asked.remove]
    changes += [(partial(model.add_expert, path=path, examples=train[name]), name) for name, path in added.items()]
    before: dict[str, float] = {}
    for change, name in changes:
        known = {one: held_out[one] for one in (*model.experts, name) if one not in asked.remove}
        grown = change(name, held_out=known)
        before = before or grown.before
    if model.moa_router is not None and model.moa_router.detector is not None and len(model.experts) > 1:
        _recalibrate(model, [held_out[name] for name in model.experts])
    _save(model, asked.mixture, before, grown)


def _pairs(given: Sequence[str]) -> dict[str, str]:
    pairs = [word.partition("=") for word in given]
    for name, equals, path in pairs:
        if not (name and equals and path):
            raise ValueError(
                f"--add takes NAME=ADAPTER, the adapter a folder or a Hub repository: got {name + equals}"
            )
    names = [name for name, _, _ in pairs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--add names {min(twice)!r} twice: give each expert a name of its own")
    return {name: path for name, _, path in pairs}


def _examples(
    asked: GrowArguments, experts: Sequence[str], added: Mapping[str, str], *, plain: bool
) -> tuple[dict[str, list[Example]], dict[str, list[Example]]]:
    """Training prompts of the new experts, held-out prompts of all.

    Args:
        plain: the router knows prompts without their templates too, so it gets both.
    """
    from moa.tasks import load_tasks

    tasks = {task.name: task for task in load_tasks(asked.tasks or list(experts))}
    missing = sorted(set(experts) - set(tasks))
    if missing:
        raise ValueError(f"no task is called {missing[0]!r} as its expert is: give each expert the task with its name")
    rows: dict[str, Any] = {**asked.rows_from, "seed": asked.seed}

    def of(name: str, split: str, limit: int) -> list[Example]:
        forms = [tasks[name], tasks[name].plain() if plain else None]
        return [example for form in forms if form for example in form.examples(split, limit=limit, **rows)]

    return (
        {name: of(name, "train", asked.train_rows) for name in added},
        {name: of(name, "validation", asked.validation_rows) for name in experts},
    )


def _recalibrate(model: MoaModel, held_out: Sequence[Sequence[Example]]) -> None:
    """Set temperature and thresholds as a fit of the router sets them, from held-out prompts of each expert."""
    import torch
    from torch.nn.functional import one_hot

    from moa.growing import pooled_prompts
    from moa.training.router_doubt import with_doubt
    from moa.training.router_options import NO_SCORE, RouterChoices

    fitted = model.moa_config.router
    choices = RouterChoices(ood=NO_SCORE)
    if fitted.abstention is not None:
        choices.ood, choices.ood_rate = fitted.abstention.score, fitted.abstention.rate
    if fitted.conformal is not None:
        choices.coverage = fitted.conformal.coverage
    pooled = torch.cat(pooled_prompts(model, None, *held_out)).cpu()
    router = model.moa_router.cpu()
    labels = torch.arange(len(held_out)).repeat_interleave(torch.tensor([len(of_one) for of_one in held_out]))
    targets = one_hot(labels).float()
    router.calibrate(pooled, targets)
    model.set_router(router, with_doubt(router, fitted, pooled, targets, labels, choices)[0], check_base=False)


def _save(model: MoaModel, folder: str, before: Mapping[str, float], grown: Growth) -> None:
    from moa.training.mixture import ACCURACY

    if grown.after:
        model.moa_config.scores[ACCURACY] = sum(grown.after.values()) / len(grown.after)
    model.save_pretrained(folder)
    for name in {**before, **grown.after}:
        was, now = (f"{100 * of[name]:.1f} %" if name in of else "-" for of in (before, grown.after))
        print(f"{name}: router accuracy on held-out prompts {was} before, {now} now")
    if grown.fallback is not None:
        print(f"merged adapter: {grown.fallback.method} of {', '.join(grown.fallback.weights)}")
    print(f"mixture of {len(model.experts)} experts saved to {folder}", flush=True)


if __name__ == "__main__":
    main()

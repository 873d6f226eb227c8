"""The merges of a comparison: each made when its turn comes, at the strength that validation rows chose."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from moa.evaluation.kept import Kept
from moa.evaluation.scale import choose_scale
from moa.evaluation.systems import System, adapter_cost, experts_fingerprint, merge_system
from moa.merging import MergeMethod, find_method
from moa.merging.registry import option_from_text
from moa.merging.statistics import STATISTICS_FILE, read_statistics
from moa.model import MoaModel
from moa.tasks import Example

UNSCALED = ("average",)  # an average of another strength would be a weighted sum


@dataclass(frozen=True)
class AskedMerge:
    """A merge to compare, as it is asked for: `ties`, or `ties:density=0.4,scope=model,rank=16`.

    Attributes:
        spec: the text, which names the merge in every table.
        rank: rank of the result, None for the method's own.
    """

    spec: str
    method: MergeMethod
    options: Mapping[str, Any]
    rank: int | str | None = None

    @classmethod
    def read(cls, spec: str) -> AskedMerge:
        """From its text; a ValueError says what the method does not know or take."""
        name, _, settings = spec.partition(":")
        method = find_method(name)
        options = {}
        for setting in filter(None, settings.split(",")):
            option, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(f"--methods {spec!r}: options are written {name}:option=value, got {setting!r}")
            if option in options:
                raise ValueError(f"--methods {spec!r} gives {option} twice: keep one")
            options[option] = value
        rank = _rank(spec, method, options.pop("rank", None))
        read = {option: option_from_text(method, option, value) for option, value in options.items()}
        try:
            method.check_options(read)
        except TypeError as error:  # in a text, a wrong type is a wrong value
            raise ValueError(str(error)) from error
        return cls(spec, method, read, rank)


def _rank(spec: str, method: MergeMethod, text: str | None) -> int | str | None:
    if text is None or text in ("auto", "full"):
        rank: int | str | None = text
    elif text.isdecimal() and int(text) > 0:
        rank = int(text)
    else:
        raise ValueError(f"--methods {spec!r}: rank must be a whole number from 1, auto or full, got {text!r}")
    if rank is not None and "rank" not in method.parameters:
        raise ValueError(f"--methods {spec!r}: {method.name} keeps every rank it is given and takes no rank")
    return rank


def merge_systems(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    merges: Sequence[AskedMerge],
    scales: Sequence[float],
    validation: Sequence[Sequence[Example]],
    kept: Kept,
    needs: Mapping[str, Any],
) -> Iterator[System]:
    """The merges as systems, each made when it is first used and dropped when the next one is asked for.

    Args:
        scales: candidates for the strength; 1 is what the method gives, with weights 1/N.
        kept: holds the strength that was found, so that a resumed run neither looks nor merges again.
        needs: `statistics` of the experts and the `objective`, for the methods that need them.
    """
    for index, asked in enumerate(merges):
        adapter, data = f"merge_{index}", described_needs(asked, needs)
        make = partial(make_merge, model, asked, adapter, needs)
        choice = chosen_strength(model, tokenizer, asked, adapter, scales, validation, kept, needs)
        yield merge_system(model, adapter, make, asked.spec, choice, data)
        if adapter in model.peft_config:
            model.delete_adapter(adapter)


def chosen_strength(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: AskedMerge,
    adapter: str,
    scales: Sequence[float],
    validation: Sequence[Sequence[Example]],
    kept: Kept,
    needs: Mapping[str, Any],
    of: str = "",
) -> dict[str, Any]:
    """The `scale` of a merge of the model's experts, the `nll` on validation rows of each that was tried, its `cost`.

    Args:
        adapter: name to merge into, unless the answer was kept.
        of: names the merge in the folder of what is kept, where there are several by one method.
    """
    tried_scales = [] if asked.method.name in UNSCALED else sorted(scales)

    def choose() -> dict[str, Any]:
        make_merge(model, asked, adapter, needs)
        scale, tried = 1.0, {}
        if tried_scales:
            scale, tried = choose_scale(model, tokenizer, adapter, validation, tried_scales)
        return {"scale": scale, "nll": tried, "cost": adapter_cost(model, [adapter])}

    texts = [[example.prompt + example.answer for example in examples] for examples in validation]
    question = [experts_fingerprint(model), asked.spec, tried_scales, texts, described_needs(asked, needs)]
    return kept.get(f"scale-{of}{asked.spec}", question, choose)


def make_merge(model: MoaModel, asked: AskedMerge, adapter: str, needs: Mapping[str, Any], scale: float = 1.0) -> None:
    """Merge the model's experts into `adapter`, unless that was done."""
    if adapter in model.peft_config:
        return
    errors = Console(stderr=True)
    model.merge_adapters(
        asked.method.name,
        rank=asked.rank,
        into=adapter,
        scale=scale,
        progress=lambda names, description: track(names, description, console=errors, transient=True),
        **{need: needs[need] for need in asked.method.needs},
        **asked.options,
    )


def described_needs(asked: AskedMerge, needs: Mapping[str, Any]) -> str:
    """What the merge depends on beside the experts; nothing for most methods."""
    about = []
    if "statistics" in asked.method.needs:
        about.append([dict(statistics.about) for statistics in needs["statistics"]])
    if "objective" in asked.method.needs:
        about.append(needs["objective"].describe())
    return json.dumps(about, sort_keys=True) if about else ""


def needs_of(
    merges: Sequence[AskedMerge],
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    mixture: Path,
    few_shot: Mapping[str, Sequence[Example]],
) -> dict[str, Any]:
    """What the methods need beside the experts: statistics from the mixture's folders, an objective on few examples.

    Args:
        few_shot: examples of each task by its name; a task that is called like an expert is that expert's own.

    Raises:
        FileNotFoundError, ValueError: statistics that are not there or not readable, or distillation on a task that
            is no expert's. Both are found before anything is scored.
    """
    asked_for = {need for asked in merges for need in asked.method.needs}
    needs: dict[str, Any] = {}
    if "statistics" in asked_for:
        needs["statistics"] = [read_statistics(mixture / name / STATISTICS_FILE) for name in model.experts]
    if "objective" in asked_for:
        from moa.model_objective import ModelObjective

        strangers = [task for task in few_shot if task not in model.experts]
        if strangers and any(asked.method.name == "distillation" for asked in merges):
            raise ValueError(
                f"distillation learns what each expert answers on its own task, and {strangers[0]!r} is the task of "
                f"none of {', '.join(model.experts)}: leave it out of --tasks, or distillation out of --methods"
            )
        needs["objective"] = ModelObjective(model, tokenizer, few_shot)
    return needs

"""Merge where tasks agree, route where they do not: a mixture at every budget, from one adapter to all of them.

    moa compose --mixture outputs/moa --source pocket
    moa compose --mixture outputs/moa --data_dir my_data --method regmean --budgets 1 2 4
    moa compose --mixture outputs/moa --tasks sst2 squad --data_dir my_data --method ties:density=0.4 --keep 2

Clusters the experts by their updates and by what each keeps of the others' gains on validation rows, merges within
clusters, and routes between them with the router that is there: a cluster is as likely as its members together. Draws
quality against parameters and latency, and writes the smallest mixture that is as good as the best, as far as the test
rows tell, to OUTPUT_DIR/mixture, beside compose.json, compose.html and compose.png. Ctrl-C loses nothing: the same
command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa.arguments import indented, parse, run
from moa.shared_arguments import ComputingArguments, MixtureArguments, RowsArguments

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from moa.evaluation.clusters import Composition
    from moa.evaluation.composition import Composer
    from moa.evaluation.merges import AskedMerge
    from moa.evaluation.runner import Questions
    from moa.evaluation.systems import System
    from moa.model import MoaModel

MIXED_BATCH = 16  # prompts whose latency is measured


@dataclass
class ComposeArguments(ComputingArguments, RowsArguments, MixtureArguments):
    """By which method to compose, and on how many rows it is judged."""

    method: str = field(
        default="ties",
        metadata={
            "help": "merges within clusters, such as regmean or ties:density=0.4,rank=16, whose rank bounds their "
            "size; 'moa methods' lists them"
        },
    )
    scales: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 1.0, 1.5, 2.0, 3.0],
        metadata={"help": "strengths of each merge to choose from on validation rows, 1 is the mean"},
    )
    budgets: list[int] | None = field(
        default=None, metadata={"help": "numbers of adapters to try; default every one from 1 to all"}
    )
    keep: int | None = field(
        default=None,
        metadata={"help": "budget to write; default the smallest whose quality is within the interval of the best"},
    )
    geometry_share: float = field(
        default=0.5,
        metadata={"help": "of the agreement of two adapters, how much their cosine counts; the rest is their scores"},
    )
    rows: int = field(default=100, metadata={"help": "test examples a task"})
    validation_rows: int = field(default=16, metadata={"help": "validation examples a task, for clusters and scales"})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "cap on the length of generated answers; default what each task says"}
    )
    batch_size: int = field(default=32, metadata={"help": "prompts at once"})
    seed: int = field(default=0, metadata={"help": "which examples are drawn"})
    output_dir: str = field(default="outputs/composed", metadata={"help": "where cells, results and mixture go"})


@run
def main(argv: list[str] | None = None) -> None:
    (asked,) = parse(ComposeArguments, argv, prog="moa compose", examples=indented(__doc__), first="mixture")
    from rich.console import Console

    from moa.evaluation.compose_report import print_composed, write_html, write_png
    from moa.evaluation.full_evaluation import check_counts, check_scales
    from moa.evaluation.merges import AskedMerge
    from moa.evaluation.report import write_json
    from moa.model import MoaModel

    check_counts(asked, ("rows", "validation_rows", "batch_size", "max_new_tokens"))
    check_scales(asked.scales)
    if not 0 <= asked.geometry_share <= 1:
        raise ValueError(f"--geometry_share is a share from 0 to 1, got {asked.geometry_share}")
    merge = AskedMerge.read(asked.method)
    model = MoaModel.from_pretrained(asked.model, asked.mixture, check_base=asked.check_base, **asked.computing)
    output = Path(asked.output_dir)
    found = compose(model, merge, asked)
    write_json(found, output / "compose.json")
    write_html(found, output / "compose.html")
    write_png(found, output / "compose.png")
    print_composed(found, Console())
    print(f"\nresults: {output / 'compose.json'}\nreport:  {output / 'compose.html'}\nmixture: {output / 'mixture'}")


def compose(model: MoaModel, merge: AskedMerge, asked: ComposeArguments) -> dict[str, Any]:
    """Cluster, score every budget, write the mixture of the one to keep, and gather the results.

    Raises:
        ValueError: no router or a single expert, budgets that cannot be, or one to keep that was not among them.
    """
    from moa.base_model import load_tokenizer
    from moa.evaluation.clusters import compositions
    from moa.evaluation.composition import Composer
    from moa.evaluation.cross_task import measure_agreement
    from moa.evaluation.full_evaluation import capped, tasks_of
    from moa.evaluation.kept import Kept
    from moa.evaluation.runner import Questions, fill_table
    from moa.evaluation.systems import base_system, expert_system

    if model.moa_config.granularity == "token":
        raise ValueError(
            "moa compose gives whole prompts to clusters, and in this mixture each token chooses: fit its router with "
            "'moa fit-router --granularity sequence' first"
        )
    budgets = _budgets(model, asked)
    tokenizer = load_tokenizer(asked.model or model.moa_config.base_model)
    if asked.check_base:
        model.check_tokenizer(tokenizer)
    tasks = [capped(task, asked.max_new_tokens) for task in tasks_of(asked.tasks, model.experts)]
    rows = {**asked.rows_from, "seed": asked.seed}
    questions = [Questions(task, task.examples("test", limit=asked.rows, **rows), others=0) for task in tasks]
    validation = {task.name: task.examples("validation", limit=asked.validation_rows, **rows) for task in tasks}
    kept = Kept(Path(asked.output_dir) / "cells", model)
    composer = Composer(
        model,
        tokenizer,
        merge,
        scales=asked.scales,
        validation=validation,
        mixture=Path(asked.mixture),
        kept=kept,
    )
    agreed = measure_agreement(model, tokenizer, validation, kept, asked.geometry_share)
    composed = compositions(model.experts, agreed["agreement"], budgets)

    def systems() -> Iterator[System]:
        yield base_system(model)
        yield from (expert_system(model, name) for name in model.experts)
        yield from composer.systems(list(composed.values()), mixed_batch(tokenizer, questions).to(model.device))

    count = 1 + len(model.experts) + len(composed)
    done, cells = fill_table(model, tokenizer, systems(), count, questions, kept, batch_size=asked.batch_size)
    return _finished(model, composer, composed, questions, done, cells, agreed, asked)


def _budgets(model: MoaModel, asked: ComposeArguments) -> list[int]:
    experts = len(model.experts)
    if experts < 2 or model.moa_router is None:
        raise ValueError(
            f"--mixture {asked.mixture} has {'one expert' if experts < 2 else 'no router'}: compose needs two or more "
            "experts and a router between them, which 'moa fit-router' fits"
        )
    budgets = sorted(set(asked.budgets or range(1, experts + 1)))
    if not 1 <= budgets[0] <= budgets[-1] <= experts:
        raise ValueError(f"--budgets are numbers of adapters, from 1 to the mixture's {experts}: got {asked.budgets}")
    if asked.keep is not None and asked.keep not in budgets:
        raise ValueError(f"--keep {asked.keep} is none of the budgets that are tried ({budgets}): add it to --budgets")
    return budgets


def mixed_batch(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Questions]) -> BatchEncoding:
    """The first prompts of every task in turn, `MIXED_BATCH` if there are so many."""
    from itertools import chain, zip_longest

    turns = chain.from_iterable(zip_longest(*(asked.examples for asked in questions)))
    prompts = [example.prompt for example in turns if example is not None][:MIXED_BATCH]
    return tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")


def _finished(
    model: MoaModel,
    composer: Composer,
    composed: Mapping[int, Composition],
    questions: Sequence[Questions],
    done: Sequence[System],
    cells: Sequence[dict[str, Any]],
    agreed: Mapping[str, Tensor],
    asked: ComposeArguments,
) -> dict[str, Any]:
    from moa.evaluation.budgets import described, recommendation
    from moa.evaluation.comparison import results

    source = "local" if asked.data_dir else asked.source
    found = results(model, questions, done, cells, seed=asked.seed, source=source)
    del found["created"], found["router"]  # same command, same bytes
    found["cells"] = [{name: of for name, of in cell.items() if name != "seconds"} for cell in found["cells"]]
    found["method"], found["geometry_share"] = asked.method, asked.geometry_share
    found["experts"] = list(model.experts)
    found["agreement"] = {name: _plain(matrix) for name, matrix in agreed.items()}
    found["budgets"] = described(found, composed, composer)
    found["recommended"], found["recommendation"] = recommendation(found)
    found["kept"] = found["recommended"] if asked.keep is None else asked.keep
    _write(model, composer, composed[found["kept"]], found, Path(asked.output_dir) / "mixture")
    return found


def _write(model: MoaModel, composer: Composer, kept: Composition, found: Mapping[str, Any], folder: Path) -> None:
    """The mixture of one budget, with its score on the card."""
    of_budget = next(of for of in found["budgets"] if of["budget"] == kept.budget)
    with composer.running(kept):
        if of_budget["score"] is not None:
            rows = max(task["examples"]["each"] for task in found["tasks"].values())
            name = f"share of the own LoRA's score, {rows} rows a task, experts merged by {found['method']}"
            model.moa_config.scores = {name: of_budget["score"] / 100}
        model.save_pretrained(folder)


def _plain(matrix: Tensor) -> list[Any]:
    """Nested lists for JSON, None for NaN."""
    return [[None if value != value else value for value in row] for row in matrix.tolist()]


if __name__ == "__main__":
    main()

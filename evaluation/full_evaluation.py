# /// script
# dependencies = ["moa-peft"]
# ///
"""Score base model, each LoRA, mixture and every merge on every task: is a router worth it, or is a merge?

    python evaluation/full_evaluation.py --mixture outputs/moa --source pocket
    python evaluation/full_evaluation.py --mixture outputs/moa --data_dir my_data --rows 500 --methods svd ties
    python evaluation/full_evaluation.py --config evaluation.yaml --scales 1

Prints the table, writes results.json and report.html to OUTPUT_DIR, and puts the scores into the model card of a
mixture that is a folder. Ctrl-C loses nothing: the same command goes on with the first cell that is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa.arguments import indented, parse, run
from moa.shared_arguments import ComputingArguments, MixtureArguments, RowsArguments
from moa.tasks import Task, load_tasks, task_names

if TYPE_CHECKING:
    from moa.evaluation.merges import AskedMerge
    from moa.model import MoaModel

COUNTS = ("rows", "other_rows", "validation_rows", "batch_size", "max_new_tokens")


@dataclass
class EvaluationArguments(ComputingArguments, RowsArguments, MixtureArguments):
    """What to compare, and on how many examples."""

    mixture: str = field(
        default="outputs/moa",
        metadata={
            "help": "saved mixture: a folder, whose README.md and moa_config.json get the scores, or a Hub repository"
        },
    )
    methods: list[str] = field(
        default_factory=lambda: ["average", "concatenation", "factor_sum", "svd", "ties"],
        metadata={
            "help": "merge methods to compare, such as svd or ties:density=0.4,rank=16; 'moa methods' lists them, "
            "none compares no merge"
        },
    )
    routers: list[str] = field(
        default_factory=list,
        metadata={
            "help": "other routers to compare: uniform (all experts in equal parts), random, centroid (the nearest "
            "mean of prompts), arrow (each token at each layer); the mixture's own otherwise: sequence, soft, "
            "conformal (the likely ones), layer, layer_soft, gates; the oracle is in every table"
        },
    )
    scales: list[float] = field(
        default_factory=lambda: [0.25, 0.5, 1.0, 1.5, 2.0, 3.0],
        metadata={"help": "strengths to choose from on validation rows, 1 is the mean; the average keeps its 1"},
    )
    rows: int = field(default=100, metadata={"help": "test examples a task"})
    other_rows: int = field(default=40, metadata={"help": "test examples for an expert on a task that is not its own"})
    validation_rows: int = field(default=16, metadata={"help": "validation examples a task to choose the scale on"})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "cap on the length of generated answers; default what each task says"}
    )
    batch_size: int = field(default=32, metadata={"help": "prompts at once"})
    seed: int = field(default=0, metadata={"help": "which examples are drawn"})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "where cells, results and report go"})


@run
def main(argv: list[str] | None = None) -> None:
    (asked,) = parse(EvaluationArguments, argv, prog="full_evaluation.py", examples=indented(__doc__), first="mixture")
    from rich.console import Console

    from moa.evaluation.comparison import card_scores, other_scores
    from moa.evaluation.merges import AskedMerge
    from moa.evaluation.other_routers import check_routers
    from moa.evaluation.report import print_table, write_html, write_json, write_markdown
    from moa.model import MoaModel
    from moa.saving import describe_mixture

    check_counts(asked)
    check_scales(asked.scales)
    check_routers(asked.routers)
    merges = [AskedMerge.read(spec) for spec in asked.methods if asked.methods != ["none"]]
    model = MoaModel.from_pretrained(asked.model, asked.mixture, check_base=asked.check_base, **asked.computing)
    described = _description(asked.mixture)
    found = compare(model, merges, asked)
    output = Path(asked.output_dir)
    write_json(found, output / "results.json")
    write_html(found, output / "report.html")
    write_markdown(found, output / "results.md")
    changed = _description(asked.mixture) != described
    if described is not None and not changed:
        model.moa_config.scores = other_scores(model.moa_config.scores) | card_scores(found)
        describe_mixture(model, Path(asked.mixture))
    print_table(found, Console())
    if changed:
        print(f"\n{asked.mixture} was changed meanwhile, so its card gets no scores: run the same command again")
    print(f"\nresults: {output / 'results.json'}, {output / 'results.md'}\nreport:  {output / 'report.html'}")


def _description(mixture: str) -> bytes | None:
    """What a mixture that is a folder says of itself, which another command may change during an evaluation."""
    from moa.config import CONFIG_NAME

    return (Path(mixture) / CONFIG_NAME).read_bytes() if Path(mixture).is_dir() else None


def check_counts(asked: Any, options: Sequence[str] = COUNTS) -> None:
    """Refuse a number below 1."""
    for option in options:
        value = getattr(asked, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option} must be at least 1, got {value}")


def check_scales(scales: Sequence[float]) -> None:
    """Refuse strengths that no merge can have, before hours of other rows."""
    for scale in scales:
        if not math.isfinite(scale) or scale == 0:
            raise ValueError(f"--scales are finite numbers other than 0, got {scale}")


def compare(model: MoaModel, merges: Sequence[AskedMerge], asked: EvaluationArguments) -> dict[str, Any]:
    """Score every system on every task, and gather the results."""
    from itertools import chain

    from moa.base_model import load_tokenizer
    from moa.evaluation.comparison import remarks, results
    from moa.evaluation.kept import Kept
    from moa.evaluation.merges import merge_systems, needs_of
    from moa.evaluation.other_routers import router_systems
    from moa.evaluation.runner import Questions, fill_table
    from moa.evaluation.systems import unmerged_systems

    for remark in remarks(model):
        print(remark, flush=True)
    tokenizer = load_tokenizer(asked.model or model.moa_config.base_model)
    if asked.check_base:
        model.check_tokenizer(tokenizer)
    tasks = [capped(task, asked.max_new_tokens) for task in tasks_of(asked.tasks, model.experts)]
    rows = {**asked.rows_from, "seed": asked.seed}
    questions = [Questions(task, task.examples("test", limit=asked.rows, **rows), asked.other_rows) for task in tasks]
    validation = [task.examples("validation", limit=asked.validation_rows, **rows) for task in tasks if merges]
    kept = Kept(Path(asked.output_dir) / "cells", model)
    unmerged = [*unmerged_systems(model), *router_systems(model, asked.routers, seed=asked.seed)]
    few_shot = dict(zip((task.name for task in tasks), validation, strict=False))
    needs = needs_of(merges, model, tokenizer, Path(asked.mixture), few_shot)
    systems = chain(unmerged, merge_systems(model, tokenizer, merges, asked.scales, validation, kept, needs))
    count = len(unmerged) + len(merges)
    done, cells = fill_table(model, tokenizer, systems, count, questions, kept, batch_size=asked.batch_size)
    source = "local" if asked.data_dir else asked.source
    return results(model, questions, done, cells, seed=asked.seed, source=source)


def tasks_of(names: Sequence[str] | None, experts: Sequence[str]) -> list[Task]:
    """The tasks that were asked for, else those of the catalog that are called like the experts.

    Raises:
        ValueError: no tasks were asked for, and an expert's is not in the catalog.
    """
    own = sorted(set(experts) - set(task_names()))
    if names is None and own:
        raise ValueError(
            f"the catalog has no task called like the mixture's expert{'s' * (len(own) > 1)} {', '.join(own)}: "
            "pass --tasks with their YAML files"
        )
    return load_tasks(experts if names is None else names)


def capped(task: Task, max_new_tokens: int | None) -> Task:
    return task if max_new_tokens is None else replace(task, max_new_tokens=min(task.max_new_tokens, max_new_tokens))


if __name__ == "__main__":
    main()

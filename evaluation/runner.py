"""Fill the table cell by cell; what is done survives Ctrl-C and is not done again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import PreTrainedTokenizerBase

from moa.evaluation.cells import score_cell
from moa.evaluation.kept import Kept
from moa.evaluation.routed import columns
from moa.evaluation.scoring import answer_examples, batches_by_length
from moa.evaluation.systems import System
from moa.model import MoaModel
from moa.tasks import Example, Task


@dataclass(frozen=True)
class Questions:
    """A task and its held-out examples; an expert of another task gets only the first `others` of them, or none."""

    task: Task
    examples: Sequence[Example]
    others: int

    def for_system(self, system: System) -> Sequence[Example]:
        foreign = system.kind == "lora" and system.name != f"lora:{self.task.name}"
        return self.examples[: self.others] if foreign else self.examples


def fill_table(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    systems: Iterator[System],
    count: int,
    questions: Sequence[Questions],
    kept: Kept,
    *,
    batch_size: int = 32,
) -> tuple[list[System], list[dict[str, Any]]]:
    """Evaluate each system on each task, and keep each cell as soon as it is there.

    Args:
        systems: made one after the other, so that a merge is loaded only when its row begins.
        count: how many systems there will be, for the progress bar.
    """
    done: list[System] = []
    cells: list[dict[str, Any]] = []
    with _progress() as progress:
        bar = progress.add_task("", total=count * len(questions))
        for system in systems:
            done.append(system)
            started = time.perf_counter()
            for asked in questions:
                progress.update(bar, description=f"{system.name} on {asked.task.name}")
                if asked.for_system(system):
                    cells.append(_cell(model, tokenizer, system, asked, kept, batch_size))
                progress.advance(bar)
            progress.print(f"{system.name}: {len(questions)} tasks in {time.perf_counter() - started:.0f} s")
    return done, cells


def _cell(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    system: System,
    asked: Questions,
    kept: Kept,
    batch_size: int,
) -> dict[str, Any]:
    examples, task = asked.for_system(system), asked.task

    def answer() -> dict[str, Any]:
        started = time.perf_counter()
        system.routings.clear()
        answered = answer_examples(
            model, tokenizer, examples, system.activate, max_new_tokens=task.max_new_tokens, batch_size=batch_size
        )
        return {
            "system": system.name,
            "task": task.name,
            **score_cell(task, examples, answered),
            **columns(system.routings, batches_by_length(examples, batch_size)),
            "answers": [answer.generated for answer in answered],
            "nll_per_example": [answer.nll / answer.answer_tokens for answer in answered],
            "seconds": time.perf_counter() - started,
        }

    rows = [[example.prompt, example.answer, example.references, example.choices] for example in examples]
    question = [system.name, system.fingerprint, task.name, task.metric, task.max_new_tokens, rows]
    return kept.get(f"{system.name.replace(':', '-')}--{task.name}", question, answer)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )

"""Fill the table cell by cell; what is done survives Ctrl-C and is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
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
from moa.evaluation.scoring import answer_examples
from moa.evaluation.systems import System
from moa.model import MoaModel
from moa.tasks import Example, Task


@dataclass(frozen=True)
class Questions:
    """A task and its held-out examples; an expert of another task gets only the first `others` of them."""

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
    directory: Path,
    *,
    batch_size: int = 32,
) -> tuple[list[System], list[dict[str, Any]]]:
    """Evaluate each system on each task, and keep each cell in `directory` as soon as it is there.

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
                cells.append(_cell(model, tokenizer, system, asked, directory, batch_size))
                progress.advance(bar)
            progress.print(f"{system.name}: {len(questions)} tasks in {time.perf_counter() - started:.0f} s")
    return done, cells


def _cell(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    system: System,
    asked: Questions,
    directory: Path,
    batch_size: int,
) -> dict[str, Any]:
    examples = asked.for_system(system)
    key = _key(system, asked.task, examples)
    file = directory / f"{system.name.replace(':', '-')}--{asked.task.name}.json"
    if file.is_file() and (kept := json.loads(file.read_text()))["key"] == key:
        return kept
    started = time.perf_counter()
    system.routed.clear()
    answered = answer_examples(
        model,
        tokenizer,
        examples,
        system.activate,
        max_new_tokens=asked.task.max_new_tokens,
        batch_size=batch_size,
    )
    cell = {
        "key": key,
        "system": system.name,
        "task": asked.task.name,
        **score_cell(asked.task, examples, answered),
        "routed": list(system.routed),
        "answers": [answer.generated for answer in answered],
        "seconds": time.perf_counter() - started,
    }
    _write(file, cell)
    return cell


def _key(system: System, task: Task, examples: Sequence[Example]) -> str:
    asked = [[example.prompt, example.answer, *example.choices] for example in examples]
    text = json.dumps([system.name, system.fingerprint, task.name, task.metric, task.max_new_tokens, asked])
    return hashlib.sha256(text.encode()).hexdigest()


def _write(file: Path, cell: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(cell))
    scratch.replace(file)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )

"""From tasks to what the trainers take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moa.tasks import Example

if TYPE_CHECKING:
    from datasets import Dataset


def completion_dataset(examples: Sequence[Example]) -> Dataset:
    """TRL's prompt-completion format: the loss is on the answer alone."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "prompt": [example.prompt for example in examples],
            "completion": [example.answer for example in examples],
        }
    )


def find_adapters(given: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """The adapter of each task: from one folder that holds them by the task's name, or from `TASK=ADAPTER` pairs.

    Raises:
        ValueError: a pair for a task that is not there, or a task without an adapter.
    """
    if len(given) == 1 and "=" not in given[0]:
        return {task: str(Path(given[0]) / task) for task in tasks}
    found = {}
    for pair in given:
        task, separator, adapter = pair.partition("=")
        if not separator or task not in tasks:
            raise ValueError(f"--adapters {pair!r} names no task of {', '.join(tasks)}: write TASK=ADAPTER for each")
        found[task] = adapter
    missing = [task for task in tasks if task not in found]
    if missing:
        raise ValueError(f"--adapters has none for {missing[0]!r}: write {missing[0]}=ADAPTER too")
    return {task: found[task] for task in tasks}

"""From tasks to what the trainers take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moa.tasks import Example

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")
_SPOKEN = {int: "a whole number", float: "a number"}


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
    return for_each_task(given, tasks, "--adapters", str, "ADAPTER", one_for_all=False)


def for_each_task(
    given: Sequence[str] | T,
    tasks: Sequence[str],
    option: str,
    kind: Callable[[str], T],
    value: str = "VALUE",
    *,
    one_for_all: bool = True,
) -> dict[str, T]:
    """The values of an option that tasks may have each their own of: `8`, `sst2=8 squad=16`, or `8 squad=16`.

    Args:
        given: the words of the option, or its default, for all tasks.
        kind: makes a value of its text, as `int` does.
        value: what the sentences of errors call a value.
        one_for_all: whether a value without a task, for all that are not named, is one.

    Raises:
        ValueError: a pair for a task that is not there, two values for one task, a task without a value, or a value
            that `kind` does not take.
    """
    if not isinstance(given, list | tuple):
        return dict.fromkeys(tasks, given)
    found: dict[str | None, T] = {}
    for word in given:
        task, separator, text = word.partition("=")
        if (separator and task not in tasks) or not (separator or one_for_all):
            raise ValueError(f"{option} {word!r} names no task of {', '.join(tasks)}: write TASK={value} for each")
        name, text = (task, text) if separator else (None, word)
        if name in found:
            raise ValueError(f"{option} has two values {'for ' + repr(name) if name else 'for all'}: keep one")
        try:
            found[name] = kind(text)
        except ValueError:
            raise ValueError(f"{option} takes {_SPOKEN.get(kind, kind.__name__)}, got {word!r}") from None
    missing = [task for task in tasks if task not in found and None not in found]
    if missing:
        raise ValueError(f"{option} has none for {missing[0]!r}: write {missing[0]}={value} too")
    return {task: found[task if task in found else None] for task in tasks}

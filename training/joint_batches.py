"""Which rows go through the model together when adapters of several tasks are trained in one run.

At each optimizer step every task takes the batch that it would take in a run of its own: the same rows in the same
order. What goes through the model at once is then cut from all of them: rows of any task, sorted by length so that
little is padding, `batch_size` in one forward. How a step is cut changes nothing but rounding, because the loss of a
row is divided by the answer tokens of its own task in the whole step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, Dataset
from transformers import TrainingArguments

if TYPE_CHECKING:
    import datasets

Steps = list[list[list[int]]]
"""Rows of one task: optimizer step -> process -> rows."""


def steps_alone(rows: int, training: TrainingArguments, task: str) -> Steps:
    """What a task of so many rows takes at each step of a run of its own, in the Trainer's order.

    Raises:
        ValueError: the task has no rows, or with `dataloader_drop_last` fewer than a batch.
    """
    steps: Steps = []
    wanted = training.max_steps
    for epoch in itertools.count():
        shards = [_batches(rows, epoch, training, process) for process in range(training.world_size)]
        if not shards[0]:
            raise ValueError(
                f"task {task!r} has no batch to train on, of {rows} rows with an answer: give it more rows, raise "
                "--max_length, or lower --per_device_train_batch_size"
            )
        for start in range(0, len(shards[0]), training.gradient_accumulation_steps):
            window = slice(start, start + training.gradient_accumulation_steps)
            steps.append([[row for batch in shard[window] for row in batch] for shard in shards])
        if epoch == 0 and wanted <= 0:
            wanted = math.ceil(training.num_train_epochs * len(steps))
        if len(steps) >= wanted:
            return steps[:wanted]
    raise AssertionError("unreachable: epochs do not end")


def _batches(rows: int, epoch: int, training: TrainingArguments, process: int) -> list[list[int]]:
    """The batches of one process in one epoch: accelerate's own samplers, as the Trainer sets them up."""
    if not rows:
        return []
    seed = training.seed if training.data_seed is None else training.data_seed
    sampler = SeedableRandomSampler(range(rows), data_seed=seed)
    sampler.set_epoch(epoch)
    batches = BatchSampler(sampler, training.per_device_train_batch_size, training.dataloader_drop_last)
    return list(BatchSamplerShard(batches, training.world_size, process) if training.world_size > 1 else batches)


def forwards_a_step(runs: Sequence[Steps], batch_size: int) -> int:
    """How many forwards of `batch_size` rows the fullest step needs on one process."""
    return max(
        math.ceil(sum(len(rows) for rows in of_process) / batch_size)
        for step in itertools.zip_longest(*runs, fillvalue=())
        for of_process in itertools.zip_longest(*step, fillvalue=())
    )


class JointBatches(Dataset):
    """A whole run in order, one forward an item: `forwards_a_step` forwards a step, for each process in turn.

    An item is a list of rows with `input_ids`, `labels`, `expert` (place of the task) and `weight`, one over the
    answer tokens that the task has in this step on all processes. Where tasks have finished, a step starts with
    items without rows; its last one always has some, as data parallel processes need to meet there.

    Args:
        rows: tokenised rows of all tasks, one task after another, their `expert` with them.
        sizes: how many rows each task has.
        runs: what each task takes at each step, see `steps_alone`.
        batch_size: rows in one forward.
    """

    def __init__(self, rows: datasets.Dataset, sizes: Sequence[int], runs: Sequence[Steps], batch_size: int):
        self.rows = rows
        self.sizes = [(len(row["input_ids"]), sum(label != -100 for label in row["labels"][1:])) for row in rows]
        first_rows = list(itertools.accumulate(sizes, initial=0))
        forwards = forwards_a_step(runs, batch_size)
        self.items: list[list[tuple[int, float]]] = []
        for step in itertools.zip_longest(*runs, fillvalue=()):
            taken = [
                [[first_rows[expert] + row for row in of_process] for of_process in run]
                for expert, run in enumerate(step)
            ]
            weights = [self._weight(run) for run in taken]
            by_process = [
                self._cut(list(of_process), weights, batch_size, forwards)
                for of_process in itertools.zip_longest(*taken, fillvalue=())
            ]
            self.items += [item for place in zip(*by_process, strict=True) for item in place]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [{**self.rows[row], "weight": weight} for row, weight in self.items[index]]

    def _weight(self, run: Sequence[Sequence[int]]) -> float:
        return 1 / max(1, sum(self.sizes[row][1] for of_process in run for row in of_process))

    def _cut(
        self, taken: Sequence[Sequence[int]], weights: Sequence[float], batch_size: int, forwards: int
    ) -> list[list[tuple[int, float]]]:
        """One process's share of a step: its rows by length, in as many items as every step has."""
        rows = [(row, weight) for of_task, weight in zip(taken, weights, strict=True) for row in of_task]
        rows.sort(key=lambda row: (self.sizes[row[0]], row))
        items = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        return [[] for _ in range(forwards - len(items))] + items


class JointCollator:
    """Joins the rows of an item as TRL does, padded or one behind another, and says whose they are.

    Adds `experts` and `weights`, a value for each row, and `rows`, the row of each token; what fills up a row without
    padding counts to the last.

    Args:
        join: TRL's collator.
        padding_free: whether it joins them one behind another.
    """

    def __init__(self, join: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]], *, padding_free: bool):
        self.join, self.padding_free = join, padding_free

    def __call__(self, items: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        [rows] = items
        nothing = torch.empty(0, 1, dtype=torch.long)
        joined = self.join(rows) if rows else dict.fromkeys(("input_ids", "attention_mask", "labels"), nothing)
        return {
            **joined,
            "experts": torch.tensor([row["expert"] for row in rows], dtype=torch.long),
            "weights": torch.tensor([row["weight"] for row in rows]),
            "rows": self._row_of_tokens(rows, joined["input_ids"].shape[1]) if rows else nothing,
        }

    def _row_of_tokens(self, rows: list[dict[str, Any]], tokens: int) -> torch.Tensor:
        places = torch.arange(len(rows))
        if not self.padding_free:
            return places[:, None].expand(-1, tokens)
        lengths = [len(row["input_ids"]) for row in rows]
        lengths[-1] += tokens - sum(lengths)
        return places.repeat_interleave(torch.tensor(lengths))[None]

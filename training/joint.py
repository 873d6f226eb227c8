"""Train the adapters of several tasks in one run: one frozen base model, rows of all tasks in one batch.

A row runs through its own task's adapter alone (a one-hot gate, see moa/mixture.py), so its gradient reaches no other.
Rows, their order, the first factors, learning rate, schedule and clipping are those of a run of the task by itself;
therefore the adapters are, up to rounding, the ones that training one after another gives, and either kind of run
keeps what the other has finished.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import find_executable_batch_size
from transformers import TrainingArguments

from moa.assembly import check_adapter_name
from moa.attention import attention_of
from moa.base_model import load_base_model, load_tokenizer
from moa.config import FALLBACK
from moa.distributed import SHARDED
from moa.precision import dtype_of
from moa.tasks import Example
from moa.training.data import completion_dataset
from moa.training.joint_trainer import JointTrainer, schedule
from moa.training.lora import Wanted, add_adapters, open_run, save_adapter
from moa.training.record import RECORD_NAME, Run, whole_checkpoint

FOLDER = ".joint"
"""In OUTPUT_DIR, what an unfinished run needs to go on; no task can be called so, and `OUTPUT_DIR/*` skips it."""

ONLY = {
    "packing": False,
    "loss_type": "nll",
    "label_smoothing_factor": 0.0,
    "neftune_noise_alpha": None,
    "train_sampling_strategy": "random",
    "shuffle_dataset": False,
    "auto_find_batch_size": False,
    "eval_strategy": "no",
    "average_tokens_across_devices": True,
    "push_to_hub": False,
    "fsdp": None,
    "deepspeed": None,
}
"""Settings of TRL that a joint run takes at this value alone."""


def train_jointly(
    wanted: Sequence[Wanted],
    model_name: str,
    *,
    rows: Mapping[str, Any],
    computing: Mapping[str, str],
    batch_size: int | None = None,
) -> list[Path]:
    """Train the adapters that are not there yet, all at once, and save each to `output_dir/task`, as PEFT does.

    Args:
        wanted: the adapters; their training differs in the learning rate alone.
        model_name: the base model.
        rows: `source`, `data_dir`, `limit` of the training rows.
        computing: `dtype` and `attn_implementation` of `load_base_model`.
        batch_size: rows of all tasks in one forward; only speed and memory depend on it. Default
            `per_device_train_batch_size`; on one GPU a whole step's, or half as many until they fit into its memory.

    Raises:
        ValueError: a setting that a joint run does not take, a name that PEFT cannot hold, a folder with another
            adapter, or an unfinished run that was not to be resumed or is of one task alone.
    """
    _check(wanted, batch_size)
    opened: list[tuple[Wanted, Run, list[Example]]] = []
    with ExitStack() as if_refused:
        for one in wanted:
            run, examples = open_run(one, model_name, rows, computing)
            if_refused.enter_context(run.withdrawn_if_refused())
            opened.append((one, run, examples))
        if left := [(one, run, examples) for one, run, examples in opened if not run.finished]:
            together = _open_together([run for _, run, _ in left], left[0][0])
            if_refused.enter_context(together.withdrawn_if_refused())
            trainer = _train(left, together, model_name, batch_size, computing)
            losses = trainer.train_losses()  # gathered from all processes
    if left and trainer.is_world_process_zero():
        _save(trainer, [run for _, run, _ in left], losses)
        _clear(together.directory)
    return [run.directory for _, run, _ in opened]


def _train(
    left: Sequence[tuple[Wanted, Run, list[Example]]],
    together: Run,
    model_name: str,
    batch_size: int | None,
    computing: Mapping[str, str],
) -> JointTrainer:
    training = left[0][0].training
    tokenizer = load_tokenizer(model_name)

    def train(batch_size: int) -> JointTrainer:
        model = load_base_model(model_name, packing=training.padding_free, **computing)
        how = f"attention: {attention_of(model)}, {dtype_of(model)}"
        print(f"{how}; at most {batch_size} rows in one forward", flush=True)
        for one, _, _ in left:
            check_adapter_name(model, one.task.name)
        trainer = JointTrainer(
            add_adapters(model, {one.task.name: one.config_for(model) for one, _, _ in left}, training.seed),
            replace(training, output_dir=str(together.directory)),
            datasets={one.task.name: completion_dataset(examples) for one, _, examples in left},
            learning_rates={one.task.name: one.training.learning_rate for one, _, _ in left},
            batch_size=batch_size,
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=whole_checkpoint(together.directory))
        return trainer

    return train(batch_size) if batch_size else in_few_forwards(train, training, len(left))


def _save(trainer: JointTrainer, runs: Sequence[Run], losses: Mapping[str, float]) -> None:
    """Each adapter to the folder of its own run; none counts as finished before all are there, for else those left
    would be another joint run than the one whose checkpoint there is."""
    base = trainer.model.get_base_model()
    for run, name in zip(runs, losses, strict=True):
        save_adapter(trainer.model, name, run.directory, trainer.processing_class)
    how = {"attention": attention_of(base), "dtype": dtype_of(base), "joint": list(losses)}
    for run, loss in zip(runs, losses.values(), strict=True):
        run.finish(train_loss=loss, **how)


def in_few_forwards(train: Callable[[int], JointTrainer], training: TrainingArguments, tasks: int) -> JointTrainer:
    """On a GPU a whole step in one forward, and half as many rows as long as its memory does not hold them.

    On a CPU nothing is gained by more rows, and processes that run short of memory one by one would not meet again.
    """
    rows = training.per_device_train_batch_size
    if training.device.type == "cpu" or training.world_size > 1:
        return train(rows)
    whole = tasks * rows * training.gradient_accumulation_steps
    fewer = (whole >> halvings for halvings in itertools.count(1))
    return find_executable_batch_size(train, starting_batch_size=whole, reduce_batch_size_fn=fewer.__next__)()


def _open_together(runs: Sequence[Run], one: Wanted) -> Run:
    for run in runs:
        if run.checkpoint:
            raise ValueError(
                f"{run.directory} holds an unfinished run of this task alone ({Path(run.checkpoint).name}): finish it "
                "without --joint, or remove that folder"
            )
    records = {
        run.directory.name: {name: value for name, value in run.record.items() if name != "versions"} for run in runs
    }
    directory = Path(one.training.output_dir) / FOLDER
    return Run.open(directory, {"adapters": records}, result=RECORD_NAME, resume=one.training.resume_from_checkpoint)


def _clear(directory: Path) -> None:
    """The adapters are saved, there is nothing to resume; what a tracker wrote stays."""
    for checkpoint in directory.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    (directory / RECORD_NAME).unlink()
    if not any(directory.iterdir()):
        directory.rmdir()


def _check(wanted: Sequence[Wanted], batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--joint_batch_size {batch_size} is no number of rows: give 1 or more")
    for one in wanted:
        if one.task.name == FALLBACK:
            raise ValueError(f"an adapter of a joint run cannot be called {FALLBACK!r}: rename the task")
        schedule(one.training, one.training.learning_rate, steps=1)
    for name, value in ONLY.items():
        given = getattr(wanted[0].training, name)
        if (given or None) != (value or None):
            raise ValueError(f"--joint takes no --{name} {given}: leave out one of the two")
    for variable, strategy in SHARDED.items():
        if os.environ.get(variable, "").lower() == "true":
            raise ValueError(
                f"--joint runs on one process or data parallel ones, got {strategy.value}: launch with torchrun"
            )

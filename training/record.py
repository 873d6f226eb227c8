"""What a run was made with: written before it starts, compared before it goes on, kept with its result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from moa.config import CONFIG_NAME, MoaConfig
from moa.shared_arguments import RefitArguments

RECORD_NAME = "moa_training.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "moa-peft")
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "label_smoothing_factor",
    "seed",
)


@dataclass(frozen=True)
class Run:
    """A training run and its folder.

    Attributes:
        directory: where result and checkpoints go.
        record: what decides the result, as JSON.
        finished: whether the result is there already.
        checkpoint: where an interrupted run left off; None starts from the beginning.
        new: whether the record was written just now.
        outcome: what a finished run said of its result.
        forgotten: record and result of the run that this one takes the place of, by their files' names.
    """

    directory: Path
    record: dict[str, Any]
    finished: bool
    checkpoint: str | None
    new: bool = False
    outcome: Mapping[str, Any] = field(default_factory=dict)
    forgotten: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        directory: Path,
        record: dict[str, Any],
        *,
        result: str,
        resume: bool,
        remedy: str = "choose another --output_dir, or remove that folder",
    ) -> Run:
        """Find out what the folder holds of this run, and write its record if it is new.

        Args:
            result: the file that only a finished run leaves.
            resume: whether an interrupted run may go on.
            remedy: what to do about a run that was made otherwise.

        Raises:
            ValueError: the folder holds a result of something else, a run with other settings, or an interrupted one
                that is not to be resumed.
        """
        file = directory / RECORD_NAME
        record = json.loads(json.dumps({**record, "versions": {package: version(package) for package in PACKAGES}}))
        if not file.is_file():
            if (directory / result).exists() or _checkpoint(directory):
                raise ValueError(f"{directory} holds what this run did not make: choose another --output_dir")
            _write(file, record)
            return cls(directory, record, finished=False, checkpoint=None, new=True)
        earlier = json.loads(file.read_text())
        changed = [name for name in record if name != "versions" and earlier.get(name) != record[name]]
        if changed:
            raise ValueError(
                f"{directory} holds a run that was made otherwise (its {', '.join(changed)} differ): {remedy}"
            )
        if "result" in earlier and (directory / result).is_file():
            return cls(directory, record, finished=True, checkpoint=None, outcome=earlier["result"])
        checkpoint = whole_checkpoint(directory)
        if checkpoint and not resume:
            raise ValueError(
                f"{directory} holds an unfinished run ({Path(checkpoint).name}): pass --resume_from_checkpoint to go "
                "on, or choose another --output_dir"
            )
        return cls(directory, record, finished=False, checkpoint=checkpoint)

    @contextmanager
    def withdrawn_if_refused(self) -> Iterator[None]:
        """What is refused inside the block before a checkpoint was no run: its record goes, for it would stand in the
        way of the next, and what was forgotten for it comes back."""
        try:
            yield
        except (ValueError, FileNotFoundError):
            if self.new and not whole_checkpoint(self.directory):
                (self.directory / RECORD_NAME).unlink(missing_ok=True)
            for name, content in self.forgotten.items():
                (self.directory / name).write_bytes(content)
            raise

    def finish(self, **result: Any) -> None:
        """Add what came out; from now on the run counts as finished."""
        _write(self.directory / RECORD_NAME, {**self.record, "result": result})


def refit_record(asked: RefitArguments, config: MoaConfig) -> dict[str, Any]:
    """What decides the fit of a part of a saved mixture, beside its settings and rows."""
    return {
        "base_model": asked.model or config.base_model,
        "experts": {name: config.expert_sha256(name) for name in config.experts},
        **asked_dtype(asked.computing),
    }


def fitted_part(config: MoaConfig, part: str) -> dict[str, Any]:
    """How a saved mixture routes, and the checksum of one of its files: what a finished fit has left of itself."""
    return {"granularity": config.granularity, "sha256": config.sha256.get(part)}


def open_refit(
    asked: RefitArguments, record: dict[str, Any], training: TrainingArguments, *, part: str, result: str
) -> Run:
    """The run that fits a part of a saved mixture; see `Run.open`. An earlier one that was made otherwise is forgotten
    where that was asked for, unless it is to be resumed.

    Args:
        part: the mixture's file that holds what is fitted; a finished run stands for it only while it is as it was.
    """
    directory, forgotten = Path(training.output_dir), {}
    with training.main_process_first(desc="earlier fit"):
        if asked.overwrite and training.should_save and not training.resume_from_checkpoint:
            forgotten = _forget(directory, result)
        run = Run.open(
            directory,
            record,
            result=result,
            resume=training.resume_from_checkpoint,
            remedy="pass --overwrite to fit it again, or choose another --output_dir",
        )
    now = fitted_part(MoaConfig.from_json(asked.folder / CONFIG_NAME), part)
    if run.outcome.get("part", now) != now:
        raise ValueError(
            f"{asked.folder} was changed after the fit of these settings in {directory}, and routes otherwise now: "
            "pass --overwrite to fit it again"
        )
    return replace(run, forgotten=forgotten)


def _forget(directory: Path, result: str) -> dict[str, bytes]:
    """Remove a run's record, result and checkpoints, and nothing else that its folder may hold; returns the first two
    by their names."""
    files = [directory / name for name in (RECORD_NAME, result) if (directory / name).is_file()]
    found = {file.name: file.read_bytes() for file in files}
    for file in files:
        file.unlink()
    while checkpoint := _checkpoint(directory):
        shutil.rmtree(checkpoint)
    return found


def settings_of(training: TrainingArguments) -> dict[str, Any]:
    """The training arguments that decide the result."""
    return {name: getattr(training, name) for name in SETTINGS}


def asked_dtype(computing: Mapping[str, str]) -> dict[str, str]:
    """What decides the result of how the base model computes: a dtype that was asked for."""
    return {} if computing["dtype"] == "auto" else {"dtype": computing["dtype"]}


def text_sha256(texts: Iterable[str]) -> str:
    """One checksum of many texts, in their order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def whole_checkpoint(directory: Path) -> str | None:
    """The last checkpoint that a run was not killed in the midst of: the Trainer's state is written after the rest."""
    whole = [state.parent for state in directory.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return str(max(whole, key=lambda checkpoint: int(checkpoint.name.split("-")[1]))) if whole else None


def _checkpoint(directory: Path) -> str | None:
    return get_last_checkpoint(directory) if directory.is_dir() else None


def _write(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(record, indent=2) + "\n")
    scratch.replace(file)

"""Arguments that several commands have: one name, one help, one meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class RowsArguments:
    """Where the rows of the tasks come from."""

    source: str = field(
        default="hub", metadata={"help": "where rows come from: hub, pocket, or local with --data_dir"}
    )
    data_dir: str | None = field(default=None, metadata={"help": "folder with TASK/{train,validation,test}.jsonl"})

    @property
    def rows_from(self) -> dict[str, str | None]:
        """As `Task.examples` takes it."""
        return {"source": self.source, "data_dir": self.data_dir}


@dataclass
class MixtureArguments:
    """Which saved mixture, on which base model, and the tasks of its experts."""

    mixture: str = field(
        default="outputs/moa", metadata={"help": "folder of a saved mixture; may come first without its name"}
    )
    model: str | None = field(default=None, metadata={"help": "base model, if not the one that the mixture names"})
    check_base: bool = field(default=True, metadata={"help": "refuse a base model that the mixture does not name"})
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "tasks, suites, or your YAML files; default the catalog's tasks called like the experts"},
    )

    @property
    def folder(self) -> Path:
        """Where the mixture is, for a command that changes it.

        Raises:
            ValueError: there is none; a repository on the Hub cannot be changed in place.
        """
        from moa.config import CONFIG_NAME

        folder = Path(self.mixture)
        if not (folder / CONFIG_NAME).is_file():
            raise ValueError(
                f"{folder} is no folder of a saved mixture: give one, download it first if it is on the Hub"
            )
        return folder


@dataclass
class ComputingArguments:
    """How the base model computes."""

    dtype: str = field(
        default="auto",
        metadata={
            "help": "float32, bfloat16 or float16; auto: the checkpoint's own, but float32 on a CPU that has no "
            "instructions for it, where that is several times faster"
        },
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "attention, as in from_pretrained; auto: FlashAttention 4, 3 or 2 where GPU and packages allow, "
            "torch's own for packed rows on CUDA, else sdpa; eager is faster on a CPU when rows are short"
        },
    )

    @property
    def computing(self) -> dict[str, str]:
        """As `load_base_model` takes it.

        Raises:
            ValueError: a dtype or an attention that does not exist, or an attention that cannot run here.
        """
        from moa.attention import check_attention
        from moa.precision import check_dtype

        check_dtype(self.dtype)
        check_attention(self.attn_implementation)
        return {"dtype": self.dtype, "attn_implementation": self.attn_implementation}


@dataclass
class RefitArguments(ComputingArguments, RowsArguments, MixtureArguments):
    """Of commands that fit a part of a saved mixture anew."""

    train_rows: int = field(default=200, metadata={"help": "rows a task to fit to"})
    validation_rows: int = field(default=50, metadata={"help": "rows a task to hold out, for what is told of the fit"})
    overwrite: bool = field(default=False, metadata={"help": "fit again what was fitted with other settings"})
    num_processes: int | None = field(
        default=None, metadata={"help": "refuse to run with another number of processes"}
    )

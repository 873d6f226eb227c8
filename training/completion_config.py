"""TRL's settings for a training on the answers of tasks, with defaults that suit short rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import SFTConfig


@dataclass
class CompletionConfig(SFTConfig):
    """TRL's SFTConfig with other defaults."""

    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(default=0.05, metadata={"help": "warm-up: a number of steps, below 1 a share of them"})
    max_steps: int = field(default=-1, metadata={"help": "optimizer steps; -1 trains num_train_epochs"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the training rows"})
    max_length: int | None = field(default=1024, metadata={"help": "longer rows are cut"})
    logging_steps: float = field(default=10, metadata={"help": "log every so many steps"})
    save_steps: float = field(default=200, metadata={"help": "checkpoint every so many steps"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints kept"})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "pin memory; default where there is a GPU"}
    )
    use_cpu: bool = field(
        default=not torch.accelerator.is_available(),
        metadata={"help": "train on the CPU; default where there is nothing else"},
    )
    bf16: bool | None = field(default=None, metadata={"help": "mixed precision; default where there is a GPU"})
    activation_checkpointing: bool | None = field(
        default=False, metadata={"help": "trade time for memory: recompute activations in the backward pass"}
    )
    resume_from_checkpoint: bool = field(
        default=False, metadata={"help": "go on from the last checkpoint, if there is one"}
    )

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available()
        super().__post_init__()

"""What the commands that fit a router let one choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import torch
from transformers import TrainingArguments

from moa.config import Objective
from moa.router import Head, Pooling
from moa.routing import Granularity
from moa.strangeness import Score

NO_SCORE = "none"


@dataclass
class RouterChoices:
    """What routers are compared, and what they are fitted to; one value fixes a choice."""

    layers: list[int] | None = field(
        default=None,
        metadata={"help": "compare routers that read what enters these layers; default 1/8, 1/4, 1/2 of the depth"},
    )
    poolings: list[str] = field(
        default_factory=lambda: list(get_args(Pooling)),
        metadata={"help": "compare these poolings of a prompt's tokens: mean, last, attention"},
    )
    heads: list[str] = field(
        default_factory=lambda: list(get_args(Head)),
        metadata={"help": "compare these heads: centroid, linear, mlp"},
    )
    hidden_units: int = field(default=64, metadata={"help": "width of the hidden layer of mlp"})
    granularity: str = field(
        default="sequence",
        metadata={
            "help": "sequence: one route for a prompt; layer: a router at each of --layers, for the layers from there "
            "to the next; token: each token at each layer by Arrow, which has nothing to fit"
        },
    )
    objective: str = field(
        default="task",
        metadata={
            "help": "fit to each prompt's task; to utility, softmax(-loss/tau) of every adapter's own answer; or to "
            "language_model, the loss of the answer through soft weights, end to end"
        },
    )
    plain_prompts: bool = field(
        default=True,
        metadata={
            "help": "read each prompt without its template as well, its fields alone, so that the router knows a task "
            "by what is asked and not by the words around it; not with --objective language_model, which answers them"
        },
    )
    tau: float = field(default=0.1, metadata={"help": "of utility, in nats: smaller trusts the best adapter more"})
    language_model_epochs: float = field(
        default=1.0,
        metadata={"help": "of language_model, whose steps run the whole model: passes over the rows"},
    )
    language_model_batch_size: int = field(default=8, metadata={"help": "of language_model: rows a step and process"})
    ood: str = field(
        default="both",
        metadata={
            "help": "what tells prompts that are unlike all tasks, which fall back to the merged adapter or the base "
            "model: mahalanobis (distance to the nearest task), energy (of the logits), both, or none"
        },
    )
    ood_rate: float = field(
        default=0.02, metadata={"help": "share of the tasks' own prompts that may fall back all the same"}
    )
    coverage: float = field(
        default=0.95, metadata={"help": "of --routing conformal: share of prompts whose own expert is in the mix"}
    )

    @property
    def reads_plain_prompts(self) -> bool:
        """`language_model` is about answers, which the adapters give to prompts as they were trained."""
        return self.plain_prompts and self.objective != "language_model"

    def __post_init__(self) -> None:
        for option, given, known in (
            ("poolings", self.poolings, get_args(Pooling)),
            ("heads", self.heads, get_args(Head)),
            ("granularity", [self.granularity], get_args(Granularity)),
            ("objective", [self.objective], get_args(Objective)),
            ("ood", [self.ood], (*get_args(Score), NO_SCORE)),
        ):
            for value in given or [None]:
                if value not in known:
                    raise ValueError(f"--{option} {value} does not exist: choose from {', '.join(known)}")
        for option in ("hidden_units", "tau", "language_model_epochs", "language_model_batch_size"):
            if not getattr(self, option) > 0:
                raise ValueError(f"--{option} must be above 0, got {getattr(self, option)}")
        for option in ("ood_rate", "coverage"):
            if not 0 < getattr(self, option) < 1:
                raise ValueError(f"--{option} must lie between 0 and 1, got {getattr(self, option)}")
        if self.granularity == "layer" and self.objective == "language_model":
            raise ValueError("--granularity layer is fitted to --objective task or utility, not language_model")
        if self.granularity == "layer" and self.layers is not None and len(set(self.layers)) < 2:
            raise ValueError("--granularity layer puts routers at several depths: name two layers or more in --layers")
        if self.objective == "language_model" and self.heads == ["centroid"]:
            raise ValueError("--heads centroid has nothing that --objective language_model could train: add linear")
        if self.poolings == ["attention"] and self.heads == ["centroid"]:
            raise ValueError("--poolings attention has a query to train, and --heads centroid no training: add linear")


@dataclass
class RouterTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults that suit one small head."""

    output_dir: str = field(default="outputs/moa", metadata={"help": "where the mixture goes"})
    learning_rate: float = field(default=1e-2, metadata={"help": "initial learning rate"})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "prompts a step and process"})
    num_train_epochs: float = field(default=20.0, metadata={"help": "passes over the prompts"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay"})
    logging_steps: float = field(default=100, metadata={"help": "log every so many steps"})
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "pin memory; default where there is a GPU"}
    )
    use_cpu: bool = field(
        default=not torch.accelerator.is_available(),
        metadata={"help": "train on the CPU; default where there is nothing else"},
    )
    save_strategy: str = field(default="epoch", metadata={"help": "when to save a checkpoint: no, steps, epoch"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "leave as it is: features have no columns"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints kept"})
    resume_from_checkpoint: bool = field(default=False, metadata={"help": "go on from the last checkpoint, if any"})

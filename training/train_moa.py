# /// script
# dependencies = ["moa-peft"]
# ///
"""Train the router over finished LoRA adapters, and save the mixture: adapters, router, and a merge to fall back on.

    accelerate launch training/train_moa.py --tasks sst2 squad --adapters outputs/lora --source pocket
    accelerate launch training/train_moa.py --config moa.yaml --learning_rate 5e-3
    accelerate launch training/train_moa.py --tasks mnli piqa --adapters mnli=me/mnli-lora piqa=runs/piqa
    torchrun --nproc_per_node 2 training/train_moa.py --config moa.yaml

The base model stays frozen: one pass over its first layers gives each prompt's features, kept in the cache, and the
router is fitted to them in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg

from moa.arguments import parse, run

EXAMPLES = "\n".join(line.strip() for line in (__doc__ or "").splitlines() if line.startswith("    "))


@dataclass
class MoaArguments:
    """Which experts, on which base model, from which prompts."""

    tasks: list[str] = HfArg(help="tasks, suites (seven, inference), or your YAML files; each has one expert")
    adapters: list[str] = field(
        default_factory=lambda: ["outputs/lora"],
        metadata={"help": "a folder that holds an adapter for each task, or TASK=ADAPTER for each"},
    )
    model: str = field(default="smollm2-135m", metadata={"help": "base model: a Hub name, a folder, or smollm2-135m"})
    source: str = field(
        default="hub", metadata={"help": "where prompts come from: hub, pocket, or local with --data_dir"}
    )
    data_dir: str | None = field(default=None, metadata={"help": "folder with TASK/{train,validation,test}.jsonl"})
    train_rows: int = field(default=200, metadata={"help": "prompts a task to fit the router on"})
    validation_rows: int = field(default=50, metadata={"help": "prompts a task for temperature and accuracy"})
    router_layer: int | None = field(
        default=None,
        metadata={"help": "read the hidden state entering this layer; default a quarter of the depth"},
    )
    routing: str = field(default="hard", metadata={"help": "hard: the best expert; top_k: the best few; soft: all"})
    top_k: int = field(default=2, metadata={"help": "how many experts top_k mixes"})
    fallback_method: str = field(default="svd", metadata={"help": "merge method of the adapter at the saved root"})
    check_base: bool = field(default=True, metadata={"help": "refuse adapters that name another base model"})
    num_processes: int | None = field(
        default=None, metadata={"help": "refuse to run with another number of processes"}
    )


@dataclass
class RouterTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults that suit one linear layer."""

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


@run
def main(argv: list[str] | None = None) -> None:
    moa, training = parse((MoaArguments, RouterTrainingArguments), argv, prog="train_moa.py", examples=EXAMPLES)
    from moa.distributed import check_launch
    from moa.tasks import load_tasks
    from moa.training.data import find_adapters
    from moa.training.mixture import train_mixture

    check_launch(moa.num_processes)
    tasks = load_tasks(moa.tasks)
    train_mixture(
        tasks,
        find_adapters(moa.adapters, [task.name for task in tasks]),
        moa.model,
        training,
        rows={"source": moa.source, "data_dir": moa.data_dir},
        train_rows=moa.train_rows,
        validation_rows=moa.validation_rows,
        fallback_method=moa.fallback_method,
        router_layer=moa.router_layer,
        routing=moa.routing,
        top_k=moa.top_k,
        check_base=moa.check_base,
    )


if __name__ == "__main__":
    main()

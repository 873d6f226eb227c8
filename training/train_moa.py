# /// script
# dependencies = ["moa-peft"]
# ///
"""Train the router over finished LoRA adapters, and save the mixture: adapters, router, and a merge to fall back on.

    accelerate launch training/train_moa.py --tasks sst2 squad --adapters outputs/lora --source pocket
    accelerate launch training/train_moa.py --config moa.yaml --learning_rate 5e-3
    accelerate launch training/train_moa.py --tasks mnli piqa --adapters mnli=me/mnli-lora piqa=runs/piqa
    torchrun --nproc_per_node 2 training/train_moa.py --config moa.yaml

The base model stays frozen: a pass over its first layers gives each prompt's features, kept in the cache. Routers of
several layers, poolings and heads are fitted to them in seconds, and held-out prompts choose; `moa fit-router` does it
again for a saved mixture.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers.hf_argparser import HfArg

from moa.arguments import indented, parse, run
from moa.shared_arguments import ComputingArguments, RowsArguments
from moa.training.router_options import RouterChoices, RouterTrainingArguments


@dataclass
class MoaArguments:
    """Which experts, on which base model, from which prompts."""

    tasks: list[str] = HfArg(help="tasks, suites (seven, inference), or your YAML files; each has one expert")
    adapters: list[str] = field(
        default_factory=lambda: ["outputs/lora"],
        metadata={"help": "a folder that holds an adapter for each task, or TASK=ADAPTER for each"},
    )
    model: str = field(default="smollm2-135m", metadata={"help": "base model: a Hub name, a folder, or smollm2-135m"})
    train_rows: int = field(default=200, metadata={"help": "prompts a task to fit the router on"})
    validation_rows: int = field(
        default=50, metadata={"help": "prompts a task to choose on, and for temperature and accuracy"}
    )
    routing: str = field(
        default="hard",
        metadata={
            "help": "hard: the best expert; top_k: the best few; soft: all; conformal: as many as it takes to have "
            "the right one in the mix --coverage of the time"
        },
    )
    top_k: int = field(default=2, metadata={"help": "how many experts top_k mixes"})
    fallback_method: str = field(default="svd", metadata={"help": "merge method of the adapter at the saved root"})
    check_base: bool = field(default=True, metadata={"help": "refuse adapters that name another base model"})
    num_processes: int | None = field(
        default=None, metadata={"help": "refuse to run with another number of processes"}
    )


@run
def main(argv: list[str] | None = None) -> None:
    kinds = (MoaArguments, RowsArguments, ComputingArguments, RouterChoices, RouterTrainingArguments)
    moa, rows, computing, choices, training = parse(kinds, argv, prog="train_moa.py", examples=indented(__doc__))
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
        choices,
        rows=rows.rows_from,
        train_rows=moa.train_rows,
        validation_rows=moa.validation_rows,
        fallback_method=moa.fallback_method,
        routing=moa.routing,
        top_k=moa.top_k,
        check_base=moa.check_base,
        computing=computing.computing,
    )


if __name__ == "__main__":
    main()

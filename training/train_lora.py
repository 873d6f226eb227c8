# /// script
# dependencies = ["moa-peft"]
# ///
"""Train one LoRA adapter per task with TRL's SFTTrainer; the loss is on the answers alone.

    python training/train_lora.py --task mnli --model Qwen/Qwen2-0.5B
    python training/train_lora.py --tasks sst2 squad --source pocket --max_steps 60
    python training/train_lora.py --tasks mnli piqa --data_dir my_data --learning_rate 5e-4 --lora_r 16
    python training/train_lora.py --tasks sst2 squad --joint --lora_r 8 squad=16 --learning_rate 1e-3 squad=5e-4
    torchrun --nproc_per_node 2 training/train_lora.py --config lora.yaml

Each adapter goes to OUTPUT_DIR/TASK. One that is already there, trained with the same settings, is kept. With --joint
all are trained in one run over one base model, and come out the same up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from transformers.hf_argparser import HfArg

from moa.arguments import indented, parse, run
from moa.shared_arguments import ComputingArguments, RowsArguments
from moa.training.completion_config import CompletionConfig

if TYPE_CHECKING:
    from moa.training.lora import Wanted


def _one_or_each(value: float, help: str) -> Any:
    """An option that takes one value for all tasks, TASK=VALUE for some, or both; see `moa.training.data`."""
    return field(default_factory=lambda: value, metadata={"help": help})


@dataclass
class LoraArguments:
    """What to train: tasks, base model, data, and the shape of the adapters (names as in PEFT and TRL)."""

    tasks: list[str] = HfArg(aliases=["--task"], help="tasks, suites (seven, inference), or your YAML files")
    model: str = field(default="smollm2-135m", metadata={"help": "base model: a Hub name, a folder, or smollm2-135m"})
    train_rows: int | None = field(default=None, metadata={"help": "use at most this many rows a task"})
    joint: bool = field(default=False, metadata={"help": "train all adapters in one run, rows of all tasks at once"})
    joint_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "with --joint, rows of all tasks in one forward: only speed and memory depend on it, each task's "
            "own batch stays per_device_train_batch_size; default the same, or on one GPU as many as fit, up to a step"
        },
    )
    lora_r: list[str] = _one_or_each(8, "rank of the adapters, or TASK=RANK for some of them")
    lora_alpha: list[str] = _one_or_each(16, "scaling of the adapters is alpha / rank; or TASK=ALPHA for some")
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapters' input"})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "modules to adapt, default the attention projections; all-linear for all"},
    )
    lora_first_layer: int = field(
        default=0,
        metadata={
            "help": "adapt this layer of the model and those after it; a mixture whose router reads no later than "
            "there (its default is a quarter of the depth) routes at no extra cost"
        },
    )
    use_rslora: bool = field(default=False, metadata={"help": "scaling alpha / sqrt(rank) (Kalajdzievski 2023)"})
    num_processes: int | None = field(
        default=None, metadata={"help": "refuse to run with another number of processes"}
    )


@dataclass
class LoraTrainingConfig(CompletionConfig):
    """As for any training on answers, with a learning rate for each task."""

    output_dir: str = field(default="outputs/lora", metadata={"help": "each adapter goes to OUTPUT_DIR/TASK"})
    learning_rate: list[str] = _one_or_each(1e-3, "initial learning rate, or TASK=RATE for some")  # type: ignore[assignment]


@run
def main(argv: list[str] | None = None) -> None:
    kinds = (LoraArguments, RowsArguments, ComputingArguments, LoraTrainingConfig)
    lora, rows, computing, training = parse(kinds, argv, prog="train_lora.py", examples=indented(__doc__))
    from moa.distributed import check_launch
    from moa.training.joint import train_jointly
    from moa.training.lora import train_adapter

    check_launch(lora.num_processes)
    if lora.joint_batch_size is not None and not lora.joint:
        raise ValueError("--joint_batch_size is for --joint: add it, or give --per_device_train_batch_size")
    wanted = adapters_wanted(lora, training)
    shared = {
        "rows": {**rows.rows_from, "limit": lora.train_rows},
        "computing": computing.computing,
    }
    if lora.joint:
        print(f"{len(wanted)} adapters in one run: {', '.join(one.task.name for one in wanted)}", flush=True)
        train_jointly(wanted, lora.model, batch_size=lora.joint_batch_size, **shared)
        return
    for position, one in enumerate(wanted, start=1):
        print(f"adapter {position} of {len(wanted)}: {one.task.name}", flush=True)
        train_adapter(one, lora.model, **shared)


def adapters_wanted(lora: LoraArguments, training: LoraTrainingConfig) -> list[Wanted]:
    """The adapter of each task, with its own rank, alpha and learning rate."""
    from moa.tasks import load_tasks
    from moa.training.data import for_each_task
    from moa.training.lora import Wanted

    tasks = load_tasks(lora.tasks)
    names = [task.name for task in tasks]
    ranks = for_each_task(lora.lora_r, names, "--lora_r", int)
    alphas = for_each_task(lora.lora_alpha, names, "--lora_alpha", int)
    rates = for_each_task(training.learning_rate, names, "--learning_rate", float)
    return [
        Wanted(
            task,
            lora_config(lora, ranks[task.name], alphas[task.name]),
            replace(training, learning_rate=rates[task.name]),
            lora.lora_first_layer,
        )
        for task in tasks
    ]


def lora_config(lora: LoraArguments, rank: int, alpha: int) -> LoraConfig:
    targets = lora.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=lora.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        use_rslora=lora.use_rslora,
    )


if __name__ == "__main__":
    main()

# /// script
# dependencies = ["moa-peft"]
# ///
"""Collect what RegMean and Fisher merges need: each adapter reads rows of its own task, once, while its data is here.

    moa statistics --adapters outputs/lora/sst2 outputs/lora/mnli --tasks sst2 mnli
    moa statistics --adapters outputs/lora --tasks sst2 squad --source pocket --rows 128
    moa statistics --adapters sst2=runs/a mnli=runs/b --tasks sst2 mnli --data_dir my_data --fisher true

Writes ADAPTER/merge_statistics.safetensors: for each layer that any of the adapters changes, the mean of x x^T
over the tokens of prompts and answers, and with --fisher how much the answers depend on each output. `moa merge` finds
it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.hf_argparser import HfArg

from moa.arguments import indented, parse, run
from moa.shared_arguments import RowsArguments


@dataclass
class StatisticsArguments:
    """Which adapters, on which rows."""

    adapters: list[str] = HfArg(
        help="folders in the order of the tasks, one folder that holds an adapter for each, or TASK=ADAPTER for each"
    )
    tasks: list[str] = HfArg(help="the task of each adapter: names, suites (seven, inference), or your YAML files")
    model: str = field(default="smollm2-135m", metadata={"help": "base model: a Hub name, a folder, or smollm2-135m"})
    split: str = field(default="train", metadata={"help": "rows to read: train or validation"})
    rows: int = field(default=256, metadata={"help": "rows a task"})
    fisher: bool = field(
        default=False, metadata={"help": "also collect gradients, for Fisher merges; takes twice as long"}
    )
    max_length: int = field(default=1024, metadata={"help": "longer rows are cut"})
    batch_size: int = field(default=16, metadata={"help": "rows at once; changes nothing but the speed"})
    seed: int = field(default=0, metadata={"help": "which rows are drawn"})
    check_base: bool = field(default=True, metadata={"help": "refuse adapters that name another base model"})
    overwrite: bool = field(default=False, metadata={"help": "replace statistics that were collected otherwise"})


@run
def main(argv: list[str] | None = None) -> None:
    asked, rows_of = parse(
        (StatisticsArguments, RowsArguments), argv, prog="moa statistics", examples=indented(__doc__)
    )
    from moa.tasks import load_tasks
    from moa.training.expert_statistics import collect_statistics

    check(asked)
    tasks = load_tasks(asked.tasks)
    rows = {**rows_of.rows_from, "limit": asked.rows, "seed": asked.seed}
    collect_statistics(
        paired(asked.adapters, [task.name for task in tasks]),
        {task.name: task.examples(asked.split, **rows) for task in tasks},
        asked.model,
        fisher=asked.fisher,
        max_length=asked.max_length,
        batch_size=asked.batch_size,
        check_base=asked.check_base,
        overwrite=asked.overwrite,
    )


def check(asked: StatisticsArguments) -> None:
    """Refuse numbers below 1, and the rows that systems are compared on."""
    for option in ("rows", "batch_size", "max_length"):
        if getattr(asked, option) < 1:
            raise ValueError(f"--{option} must be at least 1, got {getattr(asked, option)}")
    if asked.split not in ("train", "validation"):
        raise ValueError(f"--split must be train or validation, got {asked.split!r}: test rows are for the evaluation")


def paired(given: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """The folder of each task's adapter.

    Raises:
        ValueError: another number of adapters than of tasks, an adapter that is no folder, or one given twice.
    """
    from moa.training.data import find_adapters

    held = {name for name in ("adapter_config.json", "moa_config.json") if (Path(given[0]) / name).is_file()}
    one_for_all = len(given) == 1 and held != {"adapter_config.json"}  # a mixture's folder holds both
    if one_for_all or any("=" in one for one in given):
        found = find_adapters(given, tasks)
    elif len(given) == len(tasks):
        found = dict(zip(tasks, given, strict=True))
    else:
        raise ValueError(f"--adapters names {len(given)}, --tasks {len(tasks)}: give each adapter its task, in order")
    for task, folder in found.items():
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"there is no adapter folder {folder} for {task!r}: statistics are stored in it")
    if len({Path(folder).resolve() for folder in found.values()}) < len(found):
        raise ValueError("--adapters names one adapter twice: its statistics are of one task, so run it for one")
    return found


if __name__ == "__main__":
    main()

# /// script
# dependencies = ["moa-peft"]
# ///
"""Train token gates for a saved mixture: at each layer a small gate mixes the experts anew for each token.

    moa fit-gates outputs/moa
    moa fit-gates outputs/moa --source pocket --train_rows 64
    moa fit-gates outputs/moa --tasks mnli piqa --data_dir my_data --learning_rate 1e-3 --num_train_epochs 2

The gates learn from the likelihood of the answers, as X-LoRA's do; base model and experts stay as they are. Every
expert runs on every token, here and afterwards. The mixture gets the gates and routes by them from then on. A router
that it has stays in it, and `moa evaluate --routers sequence gates` compares the two. OUTPUT_DIR, by default
MIXTURE/gates_fit, gets gates_report.json and the checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moa.arguments import indented, parse, run
from moa.shared_arguments import RefitArguments
from moa.training.completion_config import CompletionConfig

RUN_FOLDER = "MIXTURE/gates_fit"


@dataclass
class GatesTrainingConfig(CompletionConfig):
    """As for any training on answers."""

    output_dir: str = field(default=RUN_FOLDER, metadata={"help": "where report and checkpoints go"})
    learning_rate: float = field(default=3e-3, metadata={"help": "initial learning rate"})


@run
def main(argv: list[str] | None = None) -> None:
    kinds = (RefitArguments, GatesTrainingConfig)
    asked, training = parse(kinds, argv, prog="moa fit-gates", examples=indented(__doc__), first="mixture")
    from moa.config import CONFIG_NAME, MoaConfig
    from moa.distributed import check_launch
    from moa.tasks import load_tasks
    from moa.training.gates_fit import fit_gates

    check_launch(asked.num_processes)
    if training.output_dir == RUN_FOLDER:
        training.output_dir = str(asked.folder / "gates_fit")
    tasks = load_tasks(asked.tasks or MoaConfig.from_json(asked.folder / CONFIG_NAME).experts)
    fit_gates(asked, tasks, training)


if __name__ == "__main__":
    main()

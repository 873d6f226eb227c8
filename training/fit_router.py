# /// script
# dependencies = ["moa-peft"]
# ///
"""Fit the router of a saved mixture: which layer it reads, how it pools and decides are chosen on held-out prompts.

    moa fit-router outputs/moa
    moa fit-router outputs/moa --tasks sst2 squad --source pocket
    moa fit-router outputs/moa --tasks mnli piqa --data_dir my_data --layers 4 8 --heads linear
    moa fit-router outputs/moa --objective utility --overwrite
    moa fit-router outputs/moa --routing conformal --coverage 0.99 --overwrite

One pass of the base model over the prompts gives the features of all layers, which the cache keeps; attention pooling
takes another, to the chosen layer. The rest is seconds, except with --objective language_model, which runs the whole
model. The mixture gets the new router; OUTPUT_DIR, by default MIXTURE/router_fit, gets router_report.json and the
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moa.arguments import indented, parse, run
from moa.shared_arguments import RefitArguments
from moa.training.router_options import RouterChoices, RouterTrainingArguments

RUN_FOLDER = "MIXTURE/router_fit"


@dataclass
class FitRouterArguments(RefitArguments):
    """What the held-out prompts are for, and how the mixture then routes."""

    validation_rows: int = field(
        default=50, metadata={"help": "prompts a task to choose on, and for temperature and accuracy"}
    )
    routing: str | None = field(
        default=None,
        metadata={
            "help": "hard: the best expert; top_k: the best few; soft: all; conformal: as many as it takes to have "
            "the right one in the mix --coverage of the time; default as the mixture does"
        },
    )
    top_k: int | None = field(default=None, metadata={"help": "how many experts top_k mixes; default as before"})


@dataclass
class FitTrainingArguments(RouterTrainingArguments):
    """As for a new mixture; only the mixture's own folder has another name here."""

    output_dir: str = field(default=RUN_FOLDER, metadata={"help": "where report and checkpoints go"})


@run
def main(argv: list[str] | None = None) -> None:
    kinds = (FitRouterArguments, RouterChoices, FitTrainingArguments)
    asked, choices, training = parse(kinds, argv, prog="moa fit-router", examples=indented(__doc__), first="mixture")
    from moa.config import CONFIG_NAME, MoaConfig
    from moa.distributed import check_launch
    from moa.tasks import load_tasks
    from moa.training.mixture import refit_router

    check_launch(asked.num_processes)
    if training.output_dir == RUN_FOLDER:
        training.output_dir = str(asked.folder / "router_fit")
    tasks = load_tasks(asked.tasks or MoaConfig.from_json(asked.folder / CONFIG_NAME).experts)
    refit_router(asked, tasks, training, choices, routing=asked.routing, top_k=asked.top_k)


if __name__ == "__main__":
    main()

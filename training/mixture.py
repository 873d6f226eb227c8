"""Fit a router over finished adapters and save the mixture."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from moa.base_model import load_base_model, load_tokenizer
from moa.merging import find_method
from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.tasks import Task
from moa.training.router_fit import feature_dataset
from moa.training.trainer import RouterTrainer, routing_accuracy


def train_mixture(
    tasks: Sequence[Task],
    adapters: Mapping[str, str | Path],
    model_name: str,
    training: TrainingArguments,
    *,
    rows: Mapping[str, Any],
    train_rows: int,
    validation_rows: int,
    fallback_method: str,
    **mixture: Any,
) -> MoaModel:
    """Load the experts, fit the router on their tasks' prompts, calibrate it, and save to `training.output_dir`.

    Args:
        adapters: adapter of each task, by the task's name.
        rows: `source` and `data_dir` of the prompts.
        train_rows, validation_rows: prompts a task to fit on, and to calibrate and score on.
        mixture: `router_layer`, `routing`, `top_k`, `check_base` of `MoaModel.from_adapters`.

    Raises:
        ValueError: fewer than two tasks, or a router checkpoint that was not resumed.
    """
    if len(tasks) < 2:
        raise ValueError("a router needs at least two tasks to choose between: name more with --tasks")
    find_method(fallback_method)
    set_seed(training.seed)
    model = MoaModel.from_adapters(load_base_model(model_name), adapters, **mixture)
    tokenizer = load_tokenizer(model_name)
    started = time.perf_counter()
    with training.main_process_first(desc="prompt features"), model.route_state.set(off=True):
        fit, held_out = (
            feature_dataset(
                model.get_base_model(),
                tokenizer,
                model.moa_config.router_layer,
                [task.examples(split, limit=limit, seed=training.seed, **rows) for task in tasks],
            )
            for split, limit in (("train", train_rows), ("validation", validation_rows))
        )
    print(f"features of {len(fit) + len(held_out)} prompts in {time.perf_counter() - started:.1f} s", flush=True)

    router = SequenceRouter(fit.features.shape[1], len(tasks))
    router.standardise(fit.features)
    trainer = RouterTrainer(
        model=router,
        args=training,
        train_dataset=fit,
        eval_dataset=held_out,
        compute_metrics=routing_accuracy,
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=_checkpoint(training))
    print(f"router fitted in {time.perf_counter() - started:.1f} s", flush=True)
    accuracy = trainer.evaluate()["eval_accuracy"]
    if trainer.is_world_process_zero():
        router = router.cpu()
        temperature = router.calibrate(held_out.features, held_out.labels)
        model.set_router(router)
        model.set_fallback(fallback_method)
        model.moa_config.scores["router accuracy on held-out prompts"] = accuracy
        model.save_pretrained(training.output_dir)
        print(f"router accuracy {accuracy:.3f} on {len(held_out)} held-out prompts, temperature {temperature:.2f}")
        print(f"mixture saved to {training.output_dir}", flush=True)
    return model


def _checkpoint(training: TrainingArguments) -> str | None:
    directory = Path(training.output_dir)
    last = get_last_checkpoint(directory) if directory.is_dir() else None
    if last and not training.resume_from_checkpoint:
        raise ValueError(
            f"{directory} holds {Path(last).name} of an earlier run: pass --resume_from_checkpoint to go on, "
            "or choose another --output_dir"
        )
    return last

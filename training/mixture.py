"""Fit a router over finished adapters and save the mixture."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from moa.adapters import read_adapter
from moa.base_model import load_base_model, load_tokenizer
from moa.config import CONFIG_NAME
from moa.merging import find_method
from moa.model import MoaModel
from moa.router import SequenceRouter
from moa.tasks import Example, Task
from moa.training.record import Run, settings_of, text_sha256
from moa.training.router_fit import FeatureDataset, feature_dataset
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
) -> None:
    """Load the experts, fit the router on their tasks' prompts, calibrate it, and save to `training.output_dir`.

    Args:
        adapters: adapter of each task, by the task's name.
        rows: `source` and `data_dir` of the prompts.
        train_rows, validation_rows: prompts a task to fit on, and to calibrate and score on.
        mixture: `router_layer`, `routing`, `top_k`, `check_base` of `MoaModel.from_adapters`.

    Raises:
        ValueError: fewer than two tasks, or a folder that holds another run or one that was not to be resumed.
    """
    if len(tasks) < 2:
        raise ValueError("a router needs at least two tasks to choose between: name more with --tasks")
    find_method(fallback_method)
    fit_on, held_out = (
        [task.examples(split, limit=limit, seed=training.seed, **rows) for task in tasks]
        for split, limit in (("train", train_rows), ("validation", validation_rows))
    )
    run = Run.open(
        Path(training.output_dir),
        {
            "base_model": model_name,
            "experts": {name: read_adapter(path, name).sha256 for name, path in adapters.items()},
            "training": settings_of(training),
            "mixture": {**mixture, "fallback_method": fallback_method},
            "rows_sha256": text_sha256(example.prompt for of_task in [*fit_on, *held_out] for example in of_task),
        },
        result=CONFIG_NAME,
        resume=training.resume_from_checkpoint,
    )
    if run.finished:
        print(f"kept {run.directory}: it was trained with these settings", flush=True)
        return
    set_seed(training.seed)
    model = MoaModel.from_adapters(load_base_model(model_name), adapters, **mixture)
    model.set_fallback(fallback_method)
    router, held_out_features = _fit(model, model_name, training, run, fit_on, held_out)
    if not training.should_save:
        return
    accuracy = router.accuracy(held_out_features.features, held_out_features.labels)
    temperature = router.calibrate(held_out_features.features, held_out_features.labels)
    model.set_router(router)
    model.moa_config.scores["router accuracy on held-out prompts"] = accuracy
    model.save_pretrained(training.output_dir)
    run.finish(accuracy=accuracy, temperature=temperature)
    prompts = len(held_out_features)
    print(f"router accuracy {accuracy:.3f} on {prompts} held-out prompts, temperature {temperature:.2f}")
    print(f"mixture saved to {training.output_dir}", flush=True)


def _fit(
    model: MoaModel,
    model_name: str,
    training: TrainingArguments,
    run: Run,
    fit_on: Sequence[Sequence[Example]],
    held_out: Sequence[Sequence[Example]],
) -> tuple[SequenceRouter, FeatureDataset]:
    """The fitted router, on the CPU, and the features that it has not seen."""
    tokenizer = load_tokenizer(model_name)
    started = time.perf_counter()
    with training.main_process_first(desc="prompt features"), model.route_state.set(off=True):
        seen, unseen = (
            feature_dataset(model.get_base_model(), tokenizer, model.moa_config.router_layer, examples)
            for examples in (fit_on, held_out)
        )
    print(f"features of {len(seen) + len(unseen)} prompts in {time.perf_counter() - started:.1f} s", flush=True)
    router = SequenceRouter(seen.features.shape[1], len(model.experts))
    router.standardise(seen.features)
    trainer = RouterTrainer(
        model=router, args=training, train_dataset=seen, eval_dataset=unseen, compute_metrics=routing_accuracy
    )
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=run.checkpoint)
    print(f"router fitted in {time.perf_counter() - started:.1f} s", flush=True)
    trainer.evaluate()
    return router.cpu(), unseen

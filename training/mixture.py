"""Fit a router over finished adapters and save the mixture, or fit the router of a saved mixture anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainingArguments, set_seed

from moa.adapters import read_adapter
from moa.attention import attention_of
from moa.base_model import load_base_model, load_tokenizer
from moa.config import CONFIG_NAME, ROUTER_NAME
from moa.merging import find_method
from moa.model import MoaModel
from moa.precision import dtype_of
from moa.routing import RoutingMode
from moa.shared_arguments import RefitArguments
from moa.tasks import Example, Task
from moa.training.record import Run, asked_dtype, fitted_part, open_refit, refit_record, settings_of, text_sha256
from moa.training.router_fit import RouterFit, check_count
from moa.training.router_options import RouterChoices
from moa.training.router_report import REPORT_NAME, report, show_report, write_report

ACCURACY = "router accuracy on held-out prompts"
BEST_FOUND = "held-out prompts sent to the adapter that answers best"
"""What is counted right where the objective is utility."""


def train_mixture(
    tasks: Sequence[Task],
    adapters: Mapping[str, str | Path],
    model_name: str,
    training: TrainingArguments,
    choices: RouterChoices,
    *,
    rows: Mapping[str, Any],
    train_rows: int,
    validation_rows: int,
    fallback_method: str,
    computing: Mapping[str, str],
    **mixture: Any,
) -> None:
    """Load the experts, fit the router on their tasks' prompts, calibrate it, and save to `training.output_dir`.

    Args:
        adapters: adapter of each task, by the task's name.
        choices: what routers are compared, and what they are fitted to.
        rows: `source` and `data_dir` of the prompts.
        train_rows, validation_rows: prompts a task to fit on, and to choose, calibrate and score on.
        computing: `dtype` and `attn_implementation` of `load_base_model`.
        mixture: `routing`, `top_k`, `check_base` of `MoaModel.from_adapters`.

    Raises:
        ValueError: fewer than two tasks, or a folder that holds another run or one that was not to be resumed.
    """
    check_count(len(tasks))
    find_method(fallback_method)
    fit_on, held_out = _examples(tasks, train_rows, validation_rows, training.seed, rows)
    plain = _examples(_plain(tasks, choices), train_rows, validation_rows, training.seed, rows)
    record = {
        "base_model": model_name,
        "experts": {name: read_adapter(path, name).sha256 for name, path in adapters.items()},
        "mixture": {**mixture, "fallback_method": fallback_method},
        **asked_dtype(computing),
        **_record(training, choices, fit_on, held_out),
    }
    folder = Path(training.output_dir)
    run = Run.open(folder, record, result=CONFIG_NAME, resume=training.resume_from_checkpoint)
    if run.finished:
        print(f"kept {run.directory}: it was trained with these settings", flush=True)
        return
    with run.withdrawn_if_refused():
        base = load_base_model(model_name, **computing)
        model = MoaModel.from_adapters(base, adapters, **mixture)
        model.set_fallback(fallback_method)
        fit = RouterFit(model, load_tokenizer(model_name), fit_on, held_out, choices, training, plain)
    _fit_and_save(fit, run, folder)


def refit_router(
    asked: RefitArguments,
    tasks: Sequence[Task],
    training: TrainingArguments,
    choices: RouterChoices,
    *,
    routing: RoutingMode | None = None,
    top_k: int | None = None,
) -> None:
    """Fit the router of a saved mixture, and save the mixture with it; checkpoints go to `training.output_dir`.

    Args:
        asked: which mixture, from which rows; an earlier router in it is not used.
        tasks: one for each expert, with its name.
        routing, top_k: how the mixture routes from then on; None as it does now.

    Raises:
        ValueError: tasks that are not the experts', no such routing, or an earlier fit that was made otherwise.
    """
    check_count(len(tasks))
    folder = asked.folder
    model = MoaModel.from_pretrained(asked.model, folder, check_base=asked.check_base, router=False, **asked.computing)
    by_name = {task.name: task for task in tasks}
    if set(by_name) != set(model.experts):
        raise ValueError(
            f"the mixture's experts are {', '.join(model.experts)}, the tasks {', '.join(by_name)}: "
            "give each expert the task with its name"
        )
    tasks = [by_name[name] for name in model.experts]
    model.set_routing(routing or model.moa_config.routing, top_k)
    numbers = (asked.train_rows, asked.validation_rows, training.seed, asked.rows_from)
    fit_on, held_out = _examples(tasks, *numbers)
    plain = _examples(_plain(tasks, choices), *numbers)
    how = {"routing": model.moa_config.routing, "top_k": model.moa_config.top_k}
    record = {**refit_record(asked, model.moa_config), **how, **_record(training, choices, fit_on, held_out)}
    run = open_refit(asked, record, training, part=ROUTER_NAME, result=REPORT_NAME)
    if run.finished:
        print(f"kept the router of {folder}: it was fitted with these settings", flush=True)
        return
    with run.withdrawn_if_refused():
        tokenizer = load_tokenizer(asked.model or model.moa_config.base_model)
        fit = RouterFit(model, tokenizer, fit_on, held_out, choices, training, plain)
    _fit_and_save(fit, run, folder)


def _plain(tasks: Sequence[Task], choices: RouterChoices) -> list[Task | None]:
    """The tasks without their templates, None for one that has none; no task where the router is not to know them."""
    return [task.plain() for task in tasks] if choices.reads_plain_prompts else []


def _examples(
    tasks: Sequence[Task | None], train_rows: int, validation_rows: int, seed: int, rows: Mapping[str, Any]
) -> list[list[list[Example]]]:
    """Of each task, what to fit on and what to hold out."""
    return [
        [[] if task is None else task.examples(split, limit=limit, seed=seed, **rows) for task in tasks]
        for split, limit in (("train", train_rows), ("validation", validation_rows))
    ]


def _record(
    training: TrainingArguments,
    choices: RouterChoices,
    fit_on: Sequence[Sequence[Example]],
    held_out: Sequence[Sequence[Example]],
) -> dict[str, Any]:
    examples = [example for of_one in [*fit_on, *held_out] for example in of_one]
    texts = [
        example.prompt if choices.objective == "task" else example.prompt + example.answer for example in examples
    ]
    return {"training": settings_of(training), "router": asdict(choices), "rows_sha256": text_sha256(texts)}


def _fit_and_save(fit: RouterFit, run: Run, folder: Path) -> None:
    set_seed(fit.training.seed)
    fitted = fit.run(run.checkpoint)
    if not fit.training.should_save:
        return
    model = fit.model
    model.set_granularity("sequence")
    model.set_router(fitted.router, fitted.config)
    model.set_granularity(fit.choices.granularity)
    config = model.moa_config
    config.forget_routed_scores()
    found = report(fitted, model.experts)
    config.scores = {name: score for name, score in config.scores.items() if name not in (ACCURACY, BEST_FOUND)}
    right = BEST_FOUND if fit.choices.objective == "utility" else ACCURACY
    config.scores[right] = found["accuracy"]
    model.save_pretrained(folder)
    write_report(found, run.directory)
    base = model.get_base_model()
    how = {"chosen": found["chosen"], "attention": attention_of(base), "dtype": dtype_of(base)}
    how["part"] = fitted_part(config, ROUTER_NAME)
    run.finish(accuracy=found["accuracy"], temperature=found["temperature"], **how)
    show_report(found, Console())
    low, high = found["interval"]
    print(
        f"{right}: {found['accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}) of {found['n']}, which also chose "
        f"it; temperature {found['temperature']:.2f}"
    )
    print(f"mixture saved to {folder}", flush=True)

"""Train the token gates of a saved mixture, from the likelihood of its tasks' answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import PreTrainedTokenizerBase, set_seed

from moa.answer_losses import cross_entropy
from moa.answer_rows import predict, tokenised
from moa.attention import attention_of
from moa.base_model import load_tokenizer
from moa.config import CONFIG_NAME, MoaConfig
from moa.model import MoaModel
from moa.precision import dtype_of
from moa.tasks import Example, Task
from moa.training.completion_config import CompletionConfig
from moa.training.data import completion_dataset
from moa.training.moa_trainer import MoaTrainerMixin
from moa.training.record import Run, asked_dtype, open_refit, settings_of, text_sha256
from moa.training.trainer import LoraTrainer

REPORT_NAME = "gates_report.json"
BATCH = 16


class GatesTrainer(MoaTrainerMixin, LoraTrainer):
    """Trains a mixture whose tokens choose their experts; nothing in it needs to know where a prompt ends."""


def fit_gates(
    folder: Path,
    tasks: Sequence[Task],
    training: CompletionConfig,
    *,
    rows: Mapping[str, Any],
    train_rows: int,
    validation_rows: int,
    computing: Mapping[str, str],
    model_name: str | None = None,
    check_base: bool = True,
    overwrite: bool = False,
) -> None:
    """Train gates for the experts of a saved mixture, and save the mixture with them, routing by them.

    Args:
        folder: of the mixture; earlier gates in it are not used, a router in it stays.
        tasks: whose rows the gates learn from; an expert need not be trained for each.
        rows: `source` and `data_dir` of the rows.
        train_rows, validation_rows: rows a task to train on, and to tell the likelihood before and after.
        computing: `dtype` and `attn_implementation` of `load_base_model`.
        model_name: the base model, if not the one that the mixture names.
        overwrite: forget an earlier training that was made otherwise.

    Raises:
        ValueError: an expert that cannot be mixed (DoRA), or an earlier training that was made otherwise.
    """
    config = MoaConfig.from_json(folder / CONFIG_NAME)
    seen, unseen = (
        [one for task in tasks for one in task.examples(split, limit=limit, seed=training.seed, **rows)]
        for split, limit in (("train", train_rows), ("validation", validation_rows))
    )
    record = {
        "base_model": model_name or config.base_model,
        "experts": {name: config.expert_sha256(name) for name in config.experts},
        **asked_dtype(computing),
        "training": {**settings_of(training), "max_length": training.max_length},
        "rows_sha256": text_sha256(one.prompt + one.answer for one in [*seen, *unseen]),
    }
    run = open_refit(Path(training.output_dir), record, training, result=REPORT_NAME, overwrite=overwrite)
    if run.finished:
        print(f"kept the gates of {folder}: they were trained with these settings", flush=True)
        return
    with run.withdrawn_if_refused():
        model = MoaModel.from_pretrained(model_name, folder, check_base=check_base, **computing)
        tokenizer = load_tokenizer(model_name or config.base_model)
        trainer = gates_trainer(model, tokenizer, training, seen)
    told = partial(_answer_loss, model, tokenizer, unseen)
    found = {"rows": len(unseen), "all_alike": told()}
    if {one.task for one in unseen} <= set(model.experts):
        found["own_expert"] = told(own=True)
    trainer.train(resume_from_checkpoint=run.checkpoint)
    found["gates"] = told()
    if trainer.is_world_process_zero():
        _save(model, folder, run, found)


def gates_trainer(
    model: MoaModel, tokenizer: PreTrainedTokenizerBase, training: CompletionConfig, seen: Sequence[Example]
) -> GatesTrainer:
    """The trainer of new gates, which mix all experts alike until they are trained; nothing else learns."""
    model.moa_gates = None
    model.set_granularity("token", by="gates")
    model.requires_grad_(False)
    model.moa_gates.requires_grad_(True)
    set_seed(training.seed)
    rows = completion_dataset(seen)
    return GatesTrainer(model=model, args=training, train_dataset=rows, processing_class=tokenizer)


@torch.no_grad()
def _answer_loss(
    model: MoaModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, own: bool = False
) -> float:
    """-log p(answer) a token, mean over the examples, in nats.

    Args:
        own: run each example by its own task's expert, instead of as the mixture does.
    """
    rows = [(tokenised(tokenizer, one, 0), one.task) for one in examples]
    rows.sort(key=lambda row: len(row[0].ids))
    training, losses = model.training, []
    model.eval()
    for start in track(range(0, len(rows), BATCH), description=f"{len(rows)} held-out answers", transient=True):
        batch, tasks = zip(*rows[start : start + BATCH], strict=True)
        with model.pinned(list(tasks)) if own else nullcontext():
            losses.append(cross_entropy(predict(model, batch, tokenizer.pad_token_id or 0)))
    model.train(training)
    return float(torch.cat(losses).mean())


def _save(model: MoaModel, folder: Path, run: Run, found: dict[str, Any]) -> None:
    config = model.moa_config
    # another way of routing had these scores
    config.scores = {name: score for name, score in config.scores.items() if not name.startswith("moa")}
    model.requires_grad_(False)
    model.save_pretrained(folder)
    (run.directory / REPORT_NAME).write_text(json.dumps(found, indent=2) + "\n")
    base = model.get_base_model()
    run.finish(loss=found["gates"], attention=attention_of(base), dtype=dtype_of(base))
    own = f", {found['own_expert']:.3f} with each task's own expert" if "own_expert" in found else ""
    print(
        f"{found['rows']} held-out answers, nats a token: {found['all_alike']:.3f} with all experts alike, "
        f"{found['gates']:.3f} with the gates{own}"
    )
    print(f"mixture saved to {folder}; its tokens choose their experts by these gates now", flush=True)

"""Train the token gates of a saved mixture, from the likelihood of its tasks' answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from moa.config import CONFIG_NAME, GATES_NAME, MoaConfig
from moa.model import MoaModel
from moa.precision import dtype_of
from moa.shared_arguments import RefitArguments
from moa.tasks import Example, Task
from moa.training.completion_config import CompletionConfig
from moa.training.data import completion_dataset
from moa.training.moa_trainer import MoaTrainerMixin
from moa.training.record import Run, fitted_part, open_refit, refit_record, settings_of, text_sha256
from moa.training.trainer import LoraTrainer

REPORT_NAME = "gates_report.json"
BATCH = 16


class GatesTrainer(MoaTrainerMixin, LoraTrainer):
    """Trains a mixture whose tokens choose their experts; nothing in it needs to know where a prompt ends."""


def fit_gates(asked: RefitArguments, tasks: Sequence[Task], training: CompletionConfig) -> None:
    """Train gates for the experts of a saved mixture, and save the mixture with them, routing by them.

    Args:
        asked: which mixture, from which rows; earlier gates in it are not used, a router in it stays.
        tasks: whose rows the gates learn from; an expert need not be trained for each.

    Raises:
        ValueError: an expert that cannot be mixed (DoRA), or an earlier training that was made otherwise.
    """
    config = MoaConfig.from_json(asked.folder / CONFIG_NAME)
    seen, unseen = (
        [one for task in tasks for one in task.examples(split, limit=limit, seed=training.seed, **asked.rows_from)]
        for split, limit in (("train", asked.train_rows), ("validation", asked.validation_rows))
    )
    record = {
        **refit_record(asked, config),
        "training": {**settings_of(training), "max_length": training.max_length},
        "rows_sha256": text_sha256(one.prompt + one.answer for one in [*seen, *unseen]),
    }
    run = open_refit(asked, record, training, part=GATES_NAME, result=REPORT_NAME)
    if run.finished:
        print(f"kept the gates of {asked.folder}: they were trained with these settings", flush=True)
        return
    with run.withdrawn_if_refused():
        model = MoaModel.from_pretrained(asked.model, asked.folder, check_base=asked.check_base, **asked.computing)
        tokenizer = load_tokenizer(asked.model or config.base_model)
        trainer = gates_trainer(model, tokenizer, training, seen)
    told = partial(_answer_loss, model, tokenizer, unseen)
    found = {"rows": len(unseen), "all_alike": told()}
    if {one.task for one in unseen} <= set(model.experts):
        found["own_expert"] = told(own=True)
    trainer.train(resume_from_checkpoint=run.checkpoint)
    found["gates"] = told()
    if trainer.is_world_process_zero():
        _save(model, asked.folder, run, found)


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
    losses = []
    model.eval()
    for start in track(range(0, len(rows), BATCH), description=f"{len(rows)} held-out answers", transient=True):
        batch, tasks = zip(*rows[start : start + BATCH], strict=True)
        with model.pinned(list(tasks)) if own else nullcontext():
            losses.append(cross_entropy(predict(model, batch, tokenizer.pad_token_id or 0)))
    return float(torch.cat(losses).mean())


def _save(model: MoaModel, folder: Path, run: Run, found: dict[str, Any]) -> None:
    model.moa_config.forget_routed_scores()
    model.requires_grad_(False)
    model.save_pretrained(folder)
    (run.directory / REPORT_NAME).write_text(json.dumps(found, indent=2) + "\n")
    base = model.get_base_model()
    part = fitted_part(model.moa_config, GATES_NAME)
    run.finish(loss=found["gates"], attention=attention_of(base), dtype=dtype_of(base), part=part)
    own = f", {found['own_expert']:.3f} with each task's own expert" if "own_expert" in found else ""
    print(
        f"{found['rows']} held-out answers, nats a token: {found['all_alike']:.3f} with all experts alike, "
        f"{found['gates']:.3f} with the gates{own}"
    )
    print(f"mixture saved to {folder}; its tokens choose their experts by these gates now", flush=True)

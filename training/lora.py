"""Train one adapter: a task's rows through TRL's SFTTrainer."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, set_seed
from trl import SFTConfig

from moa.adapters import WEIGHTS_FILE, check_name
from moa.base_model import load_base_model, load_tokenizer
from moa.tasks import Task
from moa.training.data import completion_dataset
from moa.training.record import Run, settings_of, text_sha256
from moa.training.trainer import LoraTrainer

SHAPE = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")


def train_adapter(
    task: Task,
    model_name: str,
    training: SFTConfig,
    *,
    lora_config: LoraConfig,
    rows: dict[str, Any],
    attn_implementation: str | None = None,
) -> Path:
    """Train a LoRA adapter for `task` and save it to `training.output_dir/task.name`.

    Args:
        model_name: the base model.
        training: TRL's settings; `output_dir` is the folder of all adapters.
        lora_config: shape of the adapter; without `target_modules` the attention projections are adapted.
        rows: `source`, `data_dir`, `limit` of the training rows.
        attn_implementation: as in `from_pretrained`.

    Raises:
        ValueError: the folder holds another adapter, or an unfinished run that was not to be resumed.
    """
    check_name(task.name, "task")
    examples = task.examples("train", seed=training.seed, **rows)
    run = Run.open(
        Path(training.output_dir) / task.name,
        {
            "base_model": model_name,
            "training": {**settings_of(training), "max_length": training.max_length},
            "lora": {name: _plain(getattr(lora_config, name)) for name in SHAPE},
            "rows": len(examples),
            "rows_sha256": text_sha256(example.prompt + example.answer for example in examples),
        },
        result=WEIGHTS_FILE,
        resume=training.resume_from_checkpoint,
    )
    if run.finished:
        print(f"kept {run.directory}: it was trained with these settings", flush=True)
        return run.directory
    set_seed(training.seed)  # TRL draws the adapter's first factors before its own seed is set
    model = load_base_model(model_name, attn_implementation=attn_implementation)
    if lora_config.target_modules is None:
        lora_config = copy.copy(lora_config)
        lora_config.target_modules = attention_projections(model)
    trainer = LoraTrainer(
        model=model,
        args=replace(training, output_dir=str(run.directory)),
        train_dataset=completion_dataset(examples),
        processing_class=load_tokenizer(model_name),
        peft_config=lora_config,
    )
    result = trainer.train(resume_from_checkpoint=run.checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        run.finish(train_loss=result.training_loss)
    return run.directory


def attention_projections(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the attention blocks: q_proj, k_proj, v_proj, o_proj in most models.

    Raises:
        ValueError: the model calls none of its modules attention.
    """
    names = set()
    for path, module in model.named_modules():
        *parents, name = path.split(".")
        inside_attention = any("attn" in parent or "attention" in parent for parent in parents)
        if inside_attention and getattr(module, "weight", torch.empty(0)).dim() == 2:
            names.add(name)
    if not names:
        raise ValueError("no attention projections were found in this model: name them with --lora_target_modules")
    return sorted(names)


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value

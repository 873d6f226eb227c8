"""Train one adapter: a task's rows through TRL's SFTTrainer, into a folder that is whole or not there."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from moa.adapters import WEIGHTS_FILE, check_name
from moa.base_model import load_base_model, load_tokenizer
from moa.tasks import Task
from moa.training.data import completion_dataset
from moa.training.trainer import LoraTrainer

RECORD_NAME = "moa_training.json"
SETTINGS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "seed",
            "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "weight_decay")  # fmt: skip


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
        ValueError: a finished adapter with other settings stands there, or an unfinished run that was not resumed.
    """
    check_name(task.name, "task")
    directory = Path(training.output_dir) / task.name
    examples = task.examples("train", seed=training.seed, **rows)
    record = _record(training, lora_config, model_name, [example.prompt + example.answer for example in examples])
    checkpoint = get_last_checkpoint(directory) if directory.is_dir() else None
    if _finished(directory, record):
        print(f"kept {directory}: it was trained with these settings", flush=True)
        return directory
    if checkpoint and not training.resume_from_checkpoint:
        raise ValueError(
            f"{directory} holds an unfinished run ({Path(checkpoint).name}): pass --resume_from_checkpoint to go on, "
            "or choose another --output_dir"
        )

    set_seed(training.seed)  # TRL draws the adapter's first factors before its own seed is set
    model = load_base_model(model_name, attn_implementation=attn_implementation)
    if lora_config.target_modules is None:
        lora_config = copy.copy(lora_config)
        lora_config.target_modules = attention_projections(model)
    trainer = LoraTrainer(
        model=model,
        args=replace(training, output_dir=str(directory)),
        train_dataset=completion_dataset(examples),
        processing_class=load_tokenizer(model_name),
        peft_config=lora_config,
    )
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        record["train_loss"] = result.training_loss
        (directory / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
    return directory


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


def _record(training: SFTConfig, lora_config: LoraConfig, model_name: str, texts: list[str]) -> dict[str, Any]:
    settings = asdict(training)
    return {
        "base_model": model_name,
        "training": {name: settings[name] for name in SETTINGS},
        "lora": {
            name: sorted(value) if isinstance(value, set) else value
            for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
            for value in [getattr(lora_config, name)]
        },
        "rows": len(texts),
        "rows_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "versions": {package: version(package) for package in ("torch", "transformers", "peft", "trl")},
    }


def _finished(directory: Path, record: dict[str, Any]) -> bool:
    if not (directory / RECORD_NAME).is_file() or not (directory / WEIGHTS_FILE).is_file():
        return False
    before = json.loads((directory / RECORD_NAME).read_text())
    before.pop("train_loss")
    changed = [name for name in record if before.get(name) != json.loads(json.dumps(record[name]))]
    if changed:
        raise ValueError(
            f"{directory} holds an adapter that was trained otherwise (its {', '.join(changed)} differ): "
            "choose another --output_dir, or remove that folder"
        )
    return True

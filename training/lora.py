"""Train one adapter: a task's rows through TRL's SFTTrainer; and put several on one model, for joint.py."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig

from moa.adapters import WEIGHTS_FILE, check_name, settle_configs
from moa.attention import attention_of
from moa.base_model import load_base_model, load_tokenizer
from moa.precision import dtype_of
from moa.prefix import layer_list
from moa.tasks import Example, Task
from moa.training.data import completion_dataset
from moa.training.record import Run, asked_dtype, settings_of, text_sha256
from moa.training.trainer import LoraTrainer

ALL_LINEAR = "all-linear"
SHAPE = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")


@dataclass(frozen=True)
class Wanted:
    """An adapter to train.

    Attributes:
        task: whose rows it learns.
        lora_config: its shape; without `target_modules` the attention projections are adapted.
        training: TRL's settings; `output_dir` is the folder of all adapters.
        first_layer: number of the first of the model's layers that it adapts.
    """

    task: Task
    lora_config: LoraConfig
    training: SFTConfig
    first_layer: int = 0

    def config_for(self, model: PreTrainedModel) -> LoraConfig:
        """Its shape with the names and the layers of this model's modules that are adapted.

        Raises:
            ValueError: the model has no such layer, or no attention projections where no others are named.
        """
        config = copy.copy(self.lora_config)
        if config.target_modules is None:
            config.target_modules = attention_projections(model)
        if self.first_layer:
            blocks = layer_list(model.get_decoder())[1]
            if not 0 < self.first_layer < len(blocks):
                raise ValueError(
                    f"--lora_first_layer {self.first_layer} is no layer of this model: it has 0 to {len(blocks) - 1}"
                )
            if config.target_modules == ALL_LINEAR:  # PEFT takes layers beside a list of names only
                inside = blocks[self.first_layer].named_modules()
                config.target_modules = {n.split(".")[-1] for n, m in inside if isinstance(m, torch.nn.Linear)}
            config.layers_to_transform = list(range(self.first_layer, len(blocks)))
        return config


def train_adapter(wanted: Wanted, model_name: str, *, rows: Mapping[str, Any], computing: Mapping[str, str]) -> Path:
    """Train a LoRA adapter and save it to `output_dir/task`, or keep it where that was done.

    Args:
        model_name: the base model.
        rows: `source`, `data_dir`, `limit` of the training rows.
        computing: `dtype` and `attn_implementation` of `load_base_model`.

    Raises:
        ValueError: the folder holds another adapter, or an unfinished run that was not to be resumed.
    """
    run, examples = open_run(wanted, model_name, rows, computing)
    if run.finished:
        return run.directory
    training = wanted.training
    with run.withdrawn_if_refused():
        model = load_base_model(model_name, packing=training.packing or training.padding_free, **computing)
        print(f"attention: {attention_of(model)}, {dtype_of(model)}", flush=True)
        set_seed(training.seed)  # TRL draws the adapter's first factors before its own seed is set
        trainer = LoraTrainer(
            model=model,
            args=replace(training, output_dir=str(run.directory)),
            train_dataset=completion_dataset(examples),
            processing_class=load_tokenizer(model_name),
            peft_config=wanted.config_for(model),
        )
        if not len(trainer.train_dataset):
            raise ValueError(
                f"task {wanted.task.name!r} has nothing to train on: of {len(examples)} rows none has an answer "
                f"within --max_length {training.max_length}, raise it or give the task other rows"
            )
    settle_configs(trainer.model)
    result = trainer.train(resume_from_checkpoint=run.checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        run.finish(train_loss=result.training_loss, attention=attention_of(model), dtype=dtype_of(model))
    return run.directory


def open_run(
    wanted: Wanted, model_name: str, rows: Mapping[str, Any], computing: Mapping[str, str]
) -> tuple[Run, list[Example]]:
    """The run that makes an adapter, which may be finished already, and the examples that it learns from.

    Raises:
        ValueError: the folder holds another adapter, or an unfinished run that was not to be resumed.
    """
    task, training = wanted.task, wanted.training
    check_name(task.name, "task")
    examples = task.examples("train", seed=training.seed, **rows)
    run = Run.open(
        Path(training.output_dir) / task.name,
        {
            "base_model": model_name,
            "training": {**settings_of(training), "max_length": training.max_length, **_packing(training)},
            "lora": _shape(wanted),
            **asked_dtype(computing),
            "rows": len(examples),
            "rows_sha256": text_sha256(example.prompt + example.answer for example in examples),
        },
        result=WEIGHTS_FILE,
        resume=training.resume_from_checkpoint,
    )
    if run.finished:
        print(f"kept {run.directory}: it was trained with these settings", flush=True)
    return run, examples


def add_adapters(model: PreTrainedModel, configs: Mapping[str, LoraConfig], seed: int) -> PeftModel:
    """Put adapters on a base model, each with the first factors that it gets in a run of its own."""
    (first, config), *others = configs.items()
    set_seed(seed)
    adapted = get_peft_model(model, config, adapter_name=first)
    for name, config in others:
        set_seed(seed)
        adapted.add_adapter(name, config)
    return adapted


def save_adapter(model: PeftModel, name: str, directory: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save one of several adapters as PEFT saves the only one: at the root of its folder."""
    settle_configs(model)
    model.save_pretrained(directory, selected_adapters=[name])
    for file in (directory / name).iterdir():
        file.replace(directory / file.name)
    (directory / name).rmdir()
    tokenizer.save_pretrained(directory)


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


def _shape(wanted: Wanted) -> dict[str, Any]:
    shape = {name: _plain(getattr(wanted.lora_config, name)) for name in SHAPE}
    return shape | ({"first_layer": wanted.first_layer} if wanted.first_layer else {})


def _packing(training: SFTConfig) -> dict[str, str]:
    return {"packing": training.packing_strategy} if training.packing else {}


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value

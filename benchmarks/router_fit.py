"""What a router costs to fit, beside an epoch of LoRA training on the same rows, in one run.

    python benchmarks/router_fit.py
    python benchmarks/router_fit.py --model Qwen/Qwen2-0.5B --source hub --rows 1000

Seconds of the prefix pass (features of every prompt), of the fit on the cached features, and of one LoRA epoch over
all tasks' rows, measured on a few steps a task and scaled.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from unittest import mock

import torch
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments

from moa.base_model import load_base_model, load_tokenizer
from moa.prefix import default_layer
from moa.router import SequenceRouter
from moa.tasks import DEMO_TASKS, Example, load_task
from moa.training.data import completion_dataset
from moa.training.lora import attention_projections
from moa.training.prompt_features import PromptFeatures
from moa.training.router_options import RouterTrainingArguments
from moa.training.router_trainer import FeatureDataset, RouterTrainer
from moa.training.train_lora import LoraTrainingConfig
from moa.training.trainer import LoraTrainer


class Stopwatch(TrainerCallback):
    """Times training steps, without what the Trainer does before the first and after the last."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_step_begin(self, args: TrainingArguments, state: object, control: object, **kwargs: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: object, control: object, **kwargs: object) -> None:
        self.steps.append(time.perf_counter() - self.started)


def lora_epoch(model_name: str, examples: list[Example], steps: int, folder: str) -> float:
    """Seconds for one epoch of batches of 8, from `steps` of them; the first one warms up and does not count."""
    model = load_base_model(model_name)
    watch = Stopwatch()
    trainer = LoraTrainer(
        model=model,
        args=LoraTrainingConfig(output_dir=folder, max_steps=steps + 1, save_strategy="no", disable_tqdm=True),
        train_dataset=completion_dataset(examples),
        processing_class=load_tokenizer(model_name),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=attention_projections(model)),
        callbacks=[watch],
    )
    trainer.train()
    return sum(watch.steps[1:]) / steps * len(examples) / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="base model")
    parser.add_argument("--source", default="pocket", help="hub or pocket")
    parser.add_argument("--rows", type=int, default=200, help="prompts a task (default 200)")
    parser.add_argument("--steps", type=int, default=5, help="LoRA steps measured a task (default 5)")
    arguments = parser.parse_args()

    tasks = [load_task(name) for name in DEMO_TASKS]
    examples = [task.examples("train", source=arguments.source, limit=arguments.rows) for task in tasks]
    model, tokenizer = load_base_model(arguments.model), load_tokenizer(arguments.model)
    prompts = [example.prompt for of_task in examples for example in of_task]
    labels = torch.tensor([index for index, of_task in enumerate(examples) for _ in of_task])
    targets = torch.nn.functional.one_hot(labels).float()
    layer = default_layer(model)

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as fresh, mock.patch.dict(os.environ, MOA_CACHE=fresh):
        features = PromptFeatures(model, tokenizer, prompts).pooled(layer, "mean")
    prefix = time.perf_counter() - started

    router = SequenceRouter(features.shape[1], len(tasks))
    router.standardise(features)
    with tempfile.TemporaryDirectory() as folder:
        settings = RouterTrainingArguments(output_dir=folder, save_strategy="no", disable_tqdm=True)
        trainer = RouterTrainer(model=router, args=settings, train_dataset=FeatureDataset(features, targets))
        started = time.perf_counter()
        trainer.train()
        fit = time.perf_counter() - started
        del model
        epoch = sum(lora_epoch(arguments.model, of_task, arguments.steps, folder) for of_task in examples)

    depth = load_base_model(arguments.model).config.get_text_config().num_hidden_layers
    print(f"{len(prompts)} prompts of {len(tasks)} tasks, layer {layer} of {depth}, {torch.get_num_threads()} threads")
    print(f"prefix pass           {prefix:7.1f} s")
    print(f"fit on its features   {fit:7.1f} s")
    print(f"one LoRA epoch        {epoch:7.1f} s   ({arguments.steps} steps a task measured, scaled)")
    print(f"prefix pass is {100 * prefix / epoch:.1f} % of the epoch, the fit {100 * fit / epoch:.1f} %")


if __name__ == "__main__":
    main()

"""What a router is trained on: one prefix pass over the tasks' prompts, cached, and the task of each prompt."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.base_model import cache_dir
from moa.fingerprint import fingerprint
from moa.prefix import prompt_features

if TYPE_CHECKING:
    from moa.tasks import Example


class FeatureDataset(Dataset):
    """Pooled features of prompts, and the index of each prompt's task."""

    def __init__(self, features: Tensor, labels: Tensor):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"features": self.features[index], "labels": self.labels[index]}


def feature_dataset(
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    examples: Sequence[Sequence[Example]],
    *,
    batch_size: int = 16,
) -> FeatureDataset:
    """Features of every task's prompts, computed once and kept in the user's cache.

    Args:
        layer: the hidden state entering this layer is pooled.
        examples: the examples of each task, in the order of the experts.
    """
    prompts = [example.prompt for of_task in examples for example in of_task]
    labels = torch.tensor([index for index, of_task in enumerate(examples) for _ in of_task])
    file = cache_dir() / "features" / f"{_key(base_model, tokenizer, layer, prompts)}.safetensors"
    if file.is_file():
        features = load_file(file)["features"]
    else:
        features = compute_features(base_model, tokenizer, layer, prompts, batch_size)
        _write(file, features)
    return FeatureDataset(features, labels)


def compute_features(
    base_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    prompts: Sequence[str],
    batch_size: int,
) -> Tensor:
    """One prefix pass over the prompts, `[prompts, hidden]`, in batches of alike lengths."""
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    features: dict[int, Tensor] = {}
    with Progress(transient=True) as progress:
        bar = progress.add_task("reading prompts for the router", total=len(prompts))
        for start in range(0, len(prompts), batch_size):
            chosen = by_length[start : start + batch_size]
            batch = tokenizer([prompts[index] for index in chosen], return_tensors="pt", padding=True)
            batch = batch.to(base_model.device)
            pooled = prompt_features(base_model, layer, batch["input_ids"], batch["attention_mask"])
            features.update(zip(chosen, pooled.cpu(), strict=True))
            progress.advance(bar, len(chosen))
    return torch.stack([features[index] for index in range(len(prompts))])


def _write(file: Path, features: Tensor) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    save_file({"features": features}, scratch)
    scratch.replace(file)


def _key(base_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int, prompts: Sequence[str]) -> str:
    """Of what the features depend on."""
    asked = [fingerprint(base_model), layer, len(tokenizer), tokenizer(list(prompts))["input_ids"]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

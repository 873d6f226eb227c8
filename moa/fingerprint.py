"""Which base model and which tokenizer these really are, whatever their names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLE = 64
PROBE = "Müller's 3 cats aren't  here: see https://x.org/?q=1,234.5%\n\tdef f(x): return x**2  # 東京 🙂 é end."
NAMES = ("_name_or_path", "transformers_version")  # say where the weights were found, not what they compute


def fingerprint(model: PreTrainedModel) -> str:
    """A sha256 of the model's configuration and weights; LoRA adapters loaded into it do not count.

    Of each tensor it takes name, shape, dtype and about `SAMPLE` values spread over it: quick for a model of any
    size and enough to tell two trainings apart, but no proof that not a single number was edited.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in NAMES}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in _own_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_spread(tensor).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_sha256(model: PreTrainedModel) -> str | None:
    """A sha256 of about `SAMPLE` values of each weight, rounded to bfloat16, so that it is the same in any dtype.

    None for a quantised model: its numbers are others by design, and nothing tells them from another model's.
    """
    if getattr(model, "is_quantized", False):
        return None
    digest = hashlib.sha256()
    for name, tensor in _own_tensors(model):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(_spread(tensor).bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sha256 of the vocabulary and of how one odd sentence is cut; padding and truncation do not count."""
    read = [sorted(tokenizer.get_vocab().items()), tokenizer(PROBE, truncation=False)["input_ids"]]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sha256 of the tokenizer's chat template, or of there being none."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()


def _own_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The base model's tensors, under the names that they have without PEFT."""
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), tensor


def _spread(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:: max(1, tensor.numel() // SAMPLE)]

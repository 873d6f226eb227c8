"""Which base model this really is, whatever its name."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLE = 64
NAMES = ("_name_or_path", "transformers_version")  # say where the weights were found, not what they compute


def fingerprint(model: PreTrainedModel) -> str:
    """A sha256 of the model's configuration and weights; LoRA adapters loaded into it do not count.

    Of each tensor it takes name, shape, dtype and about `SAMPLE` values spread over it: quick for a model of any
    size and enough to tell two trainings apart, but no proof that not a single number was edited.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in NAMES}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")  # as PEFT calls a layer that it wrapped
        digest.update(f"{plain} {tuple(tensor.shape)} {tensor.dtype}".encode())
        step = max(1, tensor.numel() // SAMPLE)
        digest.update(tensor.flatten()[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()

"""Many adapters onto one model, in time that grows with their number and not with its square."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn


def load_adapters(model: PeftModel, folders: Mapping[str, Path], **options: bool) -> None:
    """As `model.load_adapter` of each by its name.

    PEFT walks a dozen times through all that a model holds for every adapter that comes. So an adapter that is loaded
    leaves the layers until the last has come, and PEFT meets the base model and one adapter each time.

    Args:
        options: of `load_adapter`.
    """
    aside = []
    try:
        for name, folder in folders.items():
            model.load_adapter(folder, name, **options)
            aside += [(held, name, held.pop(name)) for held in _containers(model) if name in held]
    finally:
        for held, name, part in aside:
            held[name] = part


def _containers(model: nn.Module) -> list[nn.ModuleDict | nn.ParameterDict]:
    """Where the LoRA layers hold modules and parameters by their adapters' names."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    fields = (
        getattr(layer, field) for layer in layers for field in layer.adapter_layer_names + layer.other_param_names
    )
    return [held for held in fields if isinstance(held, nn.ModuleDict | nn.ParameterDict)]

"""Experts onto a base model: everything is checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from peft import PeftConfig, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from moa.adapters import Adapter, AdapterError, check_name, read_adapter
from moa.base_model import same_base
from moa.config import FALLBACK
from moa.peft_loading import load_adapters

PEFT_KEYS = {"base_model", "model", "base_layer", "weight", "bias", "lora_dropout", *LoraLayer.adapter_layer_names}
NOT_GATED = {
    "modules_to_save": "it carries whole trained modules, which are no low-rank updates",
    "trainable_token_indices": "it carries trained token embeddings, which are no low-rank updates",
}
"""Settings of PEFT that change more than the outputs of linear layers, which is all that gated layers add to."""


def assemble(
    cls: type[PeftModelForCausalLM],
    base: PreTrainedModel,
    adapters: Mapping[str, str | Path],
    *,
    check_base: bool,
    autocast_adapter_dtype: bool,
) -> PeftModelForCausalLM:
    """A `cls` of this base model that holds the adapters by their names; see `MoaModel.from_adapters`."""
    if not adapters:
        raise ValueError("a mixture needs at least one adapter: got none")
    check_fresh(base)
    read = read_experts(base, adapters, check_base=check_base)
    return _load(cls, base, read, autocast_adapter_dtype=autocast_adapter_dtype)


def read_experts(base: PreTrainedModel, adapters: Mapping[str, str | Path], *, check_base: bool) -> dict[str, Adapter]:
    """The adapters by their names, if they can all be experts on this base model; see `MoaModel.from_adapters`."""
    if FALLBACK in adapters:
        raise ValueError(f"an expert cannot be called {FALLBACK!r}, the fallback's name: choose another")
    read = {name: _read_finite(path, name) for name, path in adapters.items()}
    for name in adapters:
        check_adapter_name(base, name)
    if check_base:
        _check_base(base, read.values())
    for adapter in read.values():
        _check_fits(base, adapter)
    return read


def check_fresh(base: nn.Module) -> None:
    """Refuse a base model that holds adapters, for two mixtures would share, and spoil, each other's layers; or one
    with weights on the disk, where accelerate offloads them and PEFT cannot load an adapter."""
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        raise ValueError("this base model holds adapters already: load a fresh one for each mixture")
    if away := [name for name, parameter in base.named_parameters() if parameter.is_meta]:
        raise ValueError(
            f"{len(away)} weights of this base model, such as {away[0]!r}, are not in memory (offloaded?): load it in "
            "a smaller dtype or quantised, so that all of it fits"
        )


def check_adapter_name(base: nn.Module, name: str) -> None:
    """Refuse a name that PEFT would confuse with a part of the model.

    PEFT saves one adapter by dropping each key that has another adapter's name between two dots, so that an adapter
    called "0" or "q_proj" would take the factors of a layer, or of all layers, out of the others' files.

    Raises:
        ValueError: a name that PEFT cannot hold, or that is part of a module's path or of PEFT's own keys.
    """
    check_name(name)
    parts = {part for key in base.state_dict() for part in key.split(".")}
    if name in parts or name in PEFT_KEYS:
        raise ValueError(
            f"an adapter cannot be called {name!r}, which is part of the model's own parameter names, because PEFT "
            "would mix them up when it saves: choose another name"
        )


def check_gated(adapter: Adapter) -> None:
    """Refuse an adapter that is more than LoRA or DoRA on linear layers, which is all that a gated layer runs.

    Raises:
        AdapterError: the setting or the layer that makes it more.
    """
    where = str(adapter.path or f"adapter {adapter.name!r}")
    for option, reason in NOT_GATED.items():
        if adapter.config.get(option):
            raise AdapterError(
                f"{where} changes more than linear layers by {option}={adapter.config[option]!r}: {reason}"
            )
    if adapter.config.get("bias", "none") != "none":
        raise AdapterError(
            f"{where} changes more than linear layers by bias={adapter.config['bias']!r}: these are the base "
            f"model's own biases, which all experts share"
        )
    for module, kind in adapter.kinds.items():
        raise AdapterError(f"{where} adapts the {kind.name} {module!r}, and a mixture gates linear layers only")


def _read_finite(path: str | Path, name: str) -> Adapter:
    """Read an adapter and look at every factor once, for PEFT loads NaN without a word."""
    adapter = read_adapter(path, name)
    check_gated(adapter)
    for module in adapter.modules:
        adapter.modules[module]
    return adapter


def _check_base(base: PreTrainedModel, adapters: Iterable[Adapter]) -> None:
    ours = str(base.name_or_path)
    for adapter in adapters:
        if adapter.base_model is not None and not same_base(adapter.base_model, ours):
            raise ValueError(
                f"adapter {adapter.name!r} was trained on {adapter.base_model!r}, this model is {ours!r}: "
                "load it on its own base, or pass check_base=False if they share weights"
            )


def _check_fits(base: nn.Module, adapter: Adapter) -> None:
    """Refuse updates that this model has no layer for, which PEFT would drop, or break the model over half-way."""
    modules = dict(base.named_modules())
    for name, shape in adapter.shapes.items():
        layer = modules.get(name)
        if layer is None:
            raise ValueError(
                f"adapter {adapter.name!r} adapts {name!r}, which this model does not have: load it on the base model "
                "that it was trained on"
            )
        sizes = getattr(layer, "in_features", shape.n), getattr(layer, "out_features", shape.o)
        if sizes != (shape.n, shape.o):
            raise ValueError(
                f"adapter {adapter.name!r} is for another base model, to be loaded on that one: its {name!r} reads "
                f"{shape.n} and writes {shape.o} numbers, this model's {sizes[0]} and {sizes[1]}"
            )


def _load(
    cls: type[PeftModelForCausalLM], base: PreTrainedModel, adapters: Mapping[str, Adapter], **options: bool
) -> PeftModelForCausalLM:
    first, adapter = next(iter(adapters.items()))
    config = PeftConfig.from_pretrained(adapter.path)
    config.inference_mode = True
    model = cls(base, config, adapter_name=first, **options)
    load_adapters(model, {name: adapter.path for name, adapter in adapters.items()}, **options)
    return model

"""Updates out to PEFT: a folder that stock PEFT loads, or one more adapter of a live model.

Every adapter written has `alpha = r` in every layer, so that each reader, whatever it makes of alpha patterns
and rsLoRA, applies a scale of exactly 1 (llama.cpp's converter, for one, ignores both).
"""

import json
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa.low_rank import LowRank
from moa.peft_checks import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, AdapterError, widest


def write_adapter(
    directory: str | Path,
    modules: Mapping[str, LowRank] | Iterable[tuple[str, LowRank]],
    *,
    base_model: str | None,
    dtype: torch.dtype,
    task_type: str | None = "CAUSAL_LM",
    base_revision: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write updates as a vanilla LoRA adapter that stock PEFT loads, with alpha = r for every layer.

    The folder appears complete or not at all: it is written beside its place and then renamed. Equal input
    gives equal bytes.

    Args:
        directory: folder to create; must not exist.
        modules: layer name to update; an iterable of pairs is consumed one update at a time.
        base_model: what to record as the model the adapter is for.
        dtype: dtype of the stored factors.
        task_type: PEFT's task type, which chooses the model class at loading.
        base_revision: revision of the base model to record.
        extra_files: file name to content, written into the same folder.

    Raises:
        AdapterError: the folder exists, there is nothing to write, or a factor does not fit the dtype.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    if directory.exists():
        raise AdapterError(f"{directory} exists already: choose another output folder, or remove it first")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, update in modules.items() if isinstance(modules, Mapping) else modules:
        if name in ranks:
            raise AdapterError(f"module {name!r} was given twice for {directory}")
        ranks[name] = update.rank
        for factor, value in (("A", update.A), ("B", update.B)):
            tensors[f"{KEY_PREFIX}{name}.lora_{factor}.weight"] = _stored(value, dtype, name)
    config = {
        **lora_config(ranks),
        "base_model_name_or_path": base_model,
        "revision": base_revision,
        "task_type": task_type,
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        for file, content in (extra_files or {}).items():
            (partial / file).write_bytes(content.encode() if isinstance(content, str) else content)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def add_to_model(model, name: str, modules: Mapping[str, LowRank]) -> None:
    """Add updates to a live `PeftModel` as one more vanilla LoRA adapter, frozen and not active.

    Nothing else in the model changes. Factors get the device of their layer and the dtype of the adapters
    that are there already.

    Raises:
        AdapterError: a name that exists or that PEFT cannot use, or layers that the model does not have.
    """
    check_name(name)
    if name in model.peft_config:
        raise AdapterError(f"the model already has an adapter {name!r}: choose another name, or delete it first")
    base = model.get_base_model()
    _check_layers(base, modules, name)
    dtype = _adapter_dtype(base)
    # Adding an adapter makes PEFT set requires_grad of all adapters anew.
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    # On the meta device nothing is initialised, so no random number is drawn and nothing is computed.
    model.add_adapter(name, _config_for(model, base, modules), low_cpu_mem_usage=True)
    for module, update in modules.items():
        layer = base.get_submodule(module)
        device = layer.get_base_layer().weight.device
        for factor, value in ((layer.lora_A, update.A), (layer.lora_B, update.B)):
            weight = value.detach().to(device, dtype, copy=True).contiguous()
            factor[name].weight = torch.nn.Parameter(weight, requires_grad=False)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(parameter_name, False))


def _adapter_dtype(base: torch.nn.Module) -> torch.dtype:
    from peft.tuners.lora import LoraLayer

    layers = (layer for layer in base.modules() if isinstance(layer, LoraLayer))
    return widest(p.dtype for layer in layers for p in layer.lora_A.parameters())


def _config_for(model, base: torch.nn.Module, modules: Mapping[str, LowRank]):
    from peft import LoraConfig

    present = next(iter(model.peft_config.values()))
    config = LoraConfig(
        **lora_config({module: update.rank for module, update in modules.items()}),
        task_type=present.task_type,
        base_model_name_or_path=present.base_model_name_or_path,
        revision=present.revision,
    )
    others = [name for name, _ in base.named_modules() if name not in modules]
    if any(other.endswith(f".{module}") for other in others for module in modules):
        config.target_modules = "|".join(map(re.escape, modules))  # a list would match by the end of a name
    return config


def check_name(name: str, kind: str = "adapter") -> str:
    """The name, or an AdapterError if PEFT or a file system cannot take it.

    PEFT keeps factors in a `ModuleDict` by the adapter's name: a dot is a KeyError there, and so is the name of one
    of its own attributes, such as "type" or "half".
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise AdapterError(f"{kind} name {name!r} is not usable: use letters, digits, _ and - only")
    if hasattr(torch.nn.ModuleDict(), name):
        raise AdapterError(f"{kind} name {name!r} is the name of something in torch's ModuleDict: choose another")
    return name


def lora_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's settings for a vanilla LoRA on exactly these modules, with a scale of 1 for each.

    Full module names, because a suffix such as "q_proj" also hits the layers that were left out. `r` is the
    largest rank, which is the one that servers compare with their limit.
    """
    if not ranks or min(ranks.values()) < 1:
        raise AdapterError("an adapter needs at least one module, and at least rank 1 in each")
    largest = max(ranks.values())
    pattern = {_pattern_key(name, ranks): rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _pattern_key(name: str, modules: Iterable[str]) -> str:
    """PEFT's keys are patterns for the end of a name; one that would hit a second module is anchored."""
    return f"^{re.escape(name)}" if any(other.endswith(f".{name}") for other in modules) else name


def _stored(value: Tensor, dtype: torch.dtype, module: str) -> Tensor:
    """A copy fit for a file: on the CPU, contiguous, sharing memory with nothing, finite in its dtype."""
    stored = value.detach().to("cpu", dtype, copy=True).contiguous()
    if not torch.isfinite(stored).all():
        raise AdapterError(
            f"the factors of {module!r} hold NaN or values beyond the range of {dtype}: save in float32 or bfloat16"
        )
    return stored


def _check_layers(base, modules: Mapping[str, LowRank], name: str) -> None:
    layers = dict(base.named_modules())
    for module, update in modules.items():
        if module not in layers:
            raise AdapterError(f"adapter {name!r} changes {module!r}, and the model has no such layer: wrong base?")
        layer = layers[module]
        sizes = (
            (getattr(layer, "out_features", None) or getattr(layer, "nf", None)),
            (getattr(layer, "in_features", None) or getattr(layer, "nx", None)),
        )
        if sizes != update.shape:
            raise AdapterError(
                f"adapter {name!r} has an update of shape {list(update.shape)} for {module!r}, whose shape "
                f"in the model is {list(sizes)}: wrong base?"
            )

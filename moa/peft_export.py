"""Updates out to PEFT: a folder that stock PEFT loads, or one more adapter of a live model.

Every adapter written has `alpha = r` in every layer, so that each reader, whatever it makes of alpha patterns
and rsLoRA, applies a scale of exactly 1 (llama.cpp's converter, for one, ignores both).
"""

import json
import math
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moa.extras import LINEAR, Extras, Kind
from moa.low_rank import LowRank
from moa.peft_checks import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, AdapterError, all_finite, widest
from moa.peft_format import check_storable, lora_config, parent_of, stored_factors

__all__ = ["add_to_model", "check_name", "check_storable", "write_adapter"]

VECTORS = ("lora_magnitude_vector", "lora_B.bias")
"""Kept in their own dtype: a magnitude in bfloat16 would change every weight of its row by up to 0.4 %."""


def write_adapter(
    directory: str | Path,
    modules: Mapping[str, LowRank] | Iterable[tuple[str, LowRank]],
    *,
    base_model: str | None,
    dtype: torch.dtype,
    task_type: str | None = "CAUSAL_LM",
    base_revision: str | None = None,
    extra_files: Mapping[str, str | bytes] | None = None,
    kinds: Mapping[str, Kind] | None = None,
    extras: Extras | None = None,
) -> Path:
    """Write updates as a vanilla LoRA adapter that stock PEFT loads, with alpha = r for every layer.

    The folder appears complete or not at all: it is written beside its place and then renamed. Equal input
    gives equal bytes.

    Args:
        directory: folder to create; must not exist.
        modules: layer name to update; an iterable of pairs is consumed one update at a time.
        base_model: what to record as the model the adapter is for.
        dtype: dtype of the stored factors; extras are stored in their own.
        task_type: PEFT's task type, which chooses the model class at loading.
        base_revision: revision of the base model to record.
        extra_files: file name to content, written into the same folder.
        kinds: of the layers that are not linear.
        extras: what the adapter holds beside the updates; magnitudes make it a DoRA adapter, and are then needed
            for every layer. With lora_bias, layers without one get zeros.

    Raises:
        AdapterError: the folder exists, there is nothing to write, a tensor does not fit the dtype, or PEFT cannot
            hold this together in one adapter.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    if directory.exists():
        raise AdapterError(f"{directory} exists already: choose another output folder, or remove it first")
    kinds, extras = kinds or {}, extras or Extras()
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, update in modules.items() if isinstance(modules, Mapping) else modules:
        if name in ranks:
            raise AdapterError(f"module {name!r} was given twice for {directory}")
        ranks[name] = update.rank
        for part, value in stored_factors(name, update, kinds.get(name, LINEAR), *_beside(name, update, extras)):
            as_stored = value.dtype if part in VECTORS else dtype
            tensors[f"{KEY_PREFIX}{name}.{part}"] = _stored(value, as_stored, f"factors of {name!r}")
    for key, value in _other_tensors(extras, ranks):
        tensors[KEY_PREFIX + key] = _stored(value, value.dtype, f"values of {key!r}")
    config = {
        **lora_config(ranks, kinds, extras),
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


def _beside(name: str, update: LowRank, extras: Extras) -> tuple[Tensor | None, Tensor | None]:
    """The layer's magnitude and lora_bias: each is there for all layers, or for none."""
    if extras.magnitude and name not in extras.magnitude:
        raise AdapterError(f"an adapter with DoRA magnitudes needs one for every layer, and {name!r} has none")
    bias = extras.lora_bias.get(name, torch.zeros(update.shape[0])) if extras.lora_bias else None
    return extras.magnitude.get(name), bias


def _other_tensors(extras: Extras, adapted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """What belongs to no pair of factors, under PEFT's names."""
    for name, bias in extras.base_bias.items():
        module = parent_of(name)
        yield (f"{module}.base_layer.bias" if module in adapted else name), bias
    yield from extras.saved.items()
    for name, tokens in extras.tokens.items():
        yield f"{name}.token_adapter.trainable_tokens_delta", tokens.rows


def add_to_model(
    model,
    name: str,
    modules: Mapping[str, LowRank],
    *,
    kinds: Mapping[str, Kind] | None = None,
    extras: Extras | None = None,
) -> None:
    """Add updates to a live `PeftModel` as one more vanilla LoRA adapter, frozen and not active.

    Nothing else in the model changes. Factors get the device of their layer and the dtype of the adapters
    that are there already.

    Raises:
        AdapterError: a name that exists or that PEFT cannot use, layers that the model does not have, or trained
            biases of the base model, which all of its adapters would share.
    """
    check_name(name)
    if name in model.peft_config:
        raise AdapterError(f"the model already has an adapter {name!r}: choose another name, or delete it first")
    kinds, extras = kinds or {}, extras or Extras()
    if extras.base_bias:
        raise AdapterError(
            f"adapter {name!r} changes the base model's own {next(iter(extras.base_bias))!r}, which all adapters of a "
            f"live model share: write it to a folder and load it on a base model of its own"
        )
    base = model.get_base_model()
    _check_layers(base, modules, name)
    dtype = adapter_dtype(base)
    # Adding an adapter makes PEFT set requires_grad of all adapters anew.
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    # On the meta device nothing is initialised, so no random number is drawn and nothing is computed.
    model.add_adapter(name, _config_for(model, base, modules, kinds, extras), low_cpu_mem_usage=True)
    for module, update in modules.items():
        layer = base.get_submodule(module)
        weight = layer.get_base_layer().weight
        for part, value in stored_factors(module, update, kinds.get(module, LINEAR), *_beside(module, update, extras)):
            _set(layer, part, name, value.detach().to(weight.device, dtype, copy=True).contiguous())
    _fill_wrappers(base, name, extras)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(parameter_name, False))


def _set(layer: torch.nn.Module, part: str, name: str, value: Tensor) -> None:
    """Put one tensor where a LoRA layer keeps it for the adapter of this name."""
    holder, _, parameter = part.partition(".")
    frozen = torch.nn.Parameter(value, requires_grad=False)
    if holder.startswith("lora_embedding_"):
        getattr(layer, holder)[name] = frozen
    else:
        setattr(getattr(layer, holder)[name], parameter or "weight", frozen)


def _fill_wrappers(base: torch.nn.Module, name: str, extras: Extras) -> None:
    """Whole modules and tokens, into the wrappers that PEFT has put around their modules."""
    for parameter, value in extras.saved.items():
        parts = parameter.split(".")
        wrapped = (".".join([*parts[:at], "modules_to_save", name, *parts[at:]]) for at in range(len(parts)))
        there = dict(base.named_parameters())
        there[next(path for path in wrapped if path in there)].data.copy_(value)
    for embedding, (_, rows) in extras.tokens.items():
        delta = base.get_submodule(embedding).token_adapter.trainable_tokens_delta
        weight = base.get_submodule(embedding).original_module.weight
        delta[name] = torch.nn.Parameter(rows.to(weight.device, weight.dtype, copy=True), requires_grad=False)


def adapter_dtype(base: torch.nn.Module) -> torch.dtype:
    """The dtype of the LoRA factors that a model holds; the widest, where they differ."""
    from peft.tuners.lora import LoraLayer

    layers = (layer for layer in base.modules() if isinstance(layer, LoraLayer))
    return widest(p.dtype for layer in layers for p in layer.lora_A.parameters())


def _config_for(
    model, base: torch.nn.Module, modules: Mapping[str, LowRank], kinds: Mapping[str, Kind], extras: Extras
):
    from peft import LoraConfig

    present = next(iter(model.peft_config.values()))
    config = LoraConfig(
        **lora_config({module: update.rank for module, update in modules.items()}, kinds, extras),
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


def _stored(value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A copy fit for a file: on the CPU, contiguous, sharing memory with nothing, finite in its dtype."""
    stored = value.detach().to("cpu", dtype, copy=True).contiguous()
    if not all_finite(stored):
        raise AdapterError(f"the {what} hold NaN or values beyond the range of {dtype}: save in float32 or bfloat16")
    return stored


def _check_layers(base, modules: Mapping[str, LowRank], name: str) -> None:
    layers = dict(base.named_modules())
    for module, update in modules.items():
        if module not in layers:
            raise AdapterError(f"adapter {name!r} changes {module!r}, and the model has no such layer: wrong base?")
        sizes = _sizes(layers[module])
        if sizes != update.shape:
            raise AdapterError(
                f"adapter {name!r} has an update of shape {list(update.shape)} for {module!r}, whose shape "
                f"in the model is {list(sizes)}: wrong base?"
            )


def _sizes(layer: torch.nn.Module) -> tuple[int | None, int | None]:
    """Outputs and inputs of what is adapted: an embedding's transpose, a convolution flattened."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    if hasattr(base, "kernel_size"):
        return base.weight.shape[0], math.prod(base.weight.shape[1:])
    known = (("out_features", "in_features"), ("nf", "nx"), ("embedding_dim", "num_embeddings"))
    for o, n in known:
        if hasattr(base, o):
            return getattr(base, o), getattr(base, n, None)
    return None, None

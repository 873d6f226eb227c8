"""PEFT adapters in: a folder, a Hub repository or a live model gives `{module name: LowRank}`, and what is beside it.

With the files called peft_*.py (whose functions are offered here too) the only one that knows how PEFT stores
LoRA. Reading never loads a base model, and reads a layer's factors when they are asked for.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa.extras import EMBEDDING, LINEAR, Extras, Kind, Tokens
from moa.low_rank import LowRank
from moa.peft_checks import (
    KEY_PREFIX,
    WEIGHTS_FILE,
    AdapterError,
    Shape,
    refuse_unsupported,
)
from moa.peft_export import add_to_model, check_name, check_storable, write_adapter
from moa.peft_folder import file_sha256, locate, read_config, stored_tensors
from moa.peft_read import LazyUpdates, Stored, parts_of

__all__ = [
    "EMBEDDING",
    "LINEAR",
    "Adapter",
    "AdapterError",
    "Extras",
    "Kind",
    "LazyUpdates",
    "Shape",
    "Tokens",
    "WEIGHTS_FILE",
    "add_to_model",
    "check_name",
    "check_storable",
    "file_sha256",
    "from_model",
    "read_adapter",
    "write_adapter",
]


SAYS_HOW = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias")
"""Entries of the config without which the tensors do not say what the update is."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter as updates of named layers, scaling folded in.

    Attributes:
        name: what reports and errors call it.
        base_model: the model it was trained on, None when its config does not say.
        modules: layer name, such as "model.layers.0.self_attn.q_proj", to its update. May be lazy: a layer's
            factors are then read, checked and scaled each time they are asked for.
        dtype: the widest dtype that its factors, whole modules and tokens are stored in.
        path: the folder it was read from, None for an adapter of a live model.
        config: PEFT's config as a plain dictionary.
        kinds: of the layers that are not linear: an embedding's update is that of its transpose, [dim, vocabulary],
            a convolution's is flattened to [out, in x kernel].
        extras: what it holds beside the updates; empty for plain LoRA.
        initial: the folder of the same adapter before training, whose product was taken out of the updates.
        merged_from: the report of the merge that made it, for one that has no folder of its own.
    """

    name: str
    base_model: str | None
    modules: Mapping[str, LowRank]
    dtype: torch.dtype = torch.float32
    path: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    extras: Extras = field(default_factory=Extras)
    initial: Path | None = None
    merged_from: Mapping[str, Any] | None = None

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Sizes of every update, for adapters in files known without reading a factor."""
        if isinstance(self.modules, LazyUpdates):
            return self.modules.shapes
        return {name: Shape(u.shape[0], u.rank, u.shape[1]) for name, u in self.modules.items()}

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the weights file; None for an adapter that has no file."""
        return file_sha256(self.path / WEIGHTS_FILE) if self.path else None

    @cached_property
    def config_sha256(self) -> str | None:
        """Hash of what the config says of ranks, scalings and kind; None for an adapter without a folder."""
        if self.path is None:
            return None
        said = {key: self.config.get(key) for key in SAYS_HOW}
        return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()

    @cached_property
    def initial_sha256(self) -> str | None:
        """Hash of the weights file before training, where it was read."""
        return file_sha256(self.initial / WEIGHTS_FILE) if self.initial else None

    def to(self, dtype: torch.dtype) -> "Adapter":
        """The same adapter giving its factors in another dtype; lazy ones are scaled in it, not after."""
        if isinstance(self.modules, LazyUpdates):
            return replace(self, modules=replace(self.modules, dtype=dtype))
        return replace(self, modules={name: update.to(dtype) for name, update in self.modules.items()})


def read_adapter(
    path: str | Path,
    name: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    initial: str | Path | None = None,
) -> Adapter:
    """Read a LoRA adapter that PEFT wrote, from a folder or from the Hub, without its base model.

    Ranks and alphas that differ by layer (rank_pattern, alpha_pattern), rsLoRA, any choice of layers, embeddings
    and convolutions are understood. What DoRA, lora_bias, bias, modules_to_save and trainable_token_indices add is
    in `.extras`. Only sizes are read here; tensors are streamed from the file as they are used.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors, or "user/repository" on the Hub.
        name: what to call it; the folder's name by default.
        dtype: dtype the factors are given in.
        initial: the same adapter as PEFT saved it before training. PiSSA, OLoRA, CorDA and LoRA-GA subtract their
            first product s B0 A0 from the base weights; with it the updates are s (B A - B0 A0), of twice the rank,
            and right on the stock base.

    Raises:
        FileNotFoundError: no such folder or repository.
        AdapterError: not an adapter, pickled or damaged weights, config and tensors that disagree, or a kind
            of adapter that cannot be read as what it is (the message names it).
    """
    directory = locate(path)
    config = read_config(directory)
    refuse_unsupported(config, str(directory), initial=initial is not None)
    before = None if initial is None else locate(initial)
    parts = parts_of(
        stored_tensors(directory), config, dtype, initial=_initial(before, directory, config) if before else None
    )
    return Adapter(
        name=name or directory.resolve().name,
        base_model=config.get("base_model_name_or_path") or None,
        modules=parts.modules,
        dtype=parts.dtype,
        path=directory,
        config=config,
        kinds=parts.kinds,
        extras=parts.extras,
        initial=before,
    )


def from_model(model, adapter_name: str, *, dtype: torch.dtype = torch.float32) -> Adapter:
    """A LoRA adapter of a live `PeftModel`, with the scaling the model applies.

    The result is a view: tensors are copied to the CPU as they are when they are used.

    Raises:
        AdapterError: an unknown name, or a kind of adapter that cannot be read as what it is.
    """
    if adapter_name not in model.peft_config:
        raise AdapterError(f"the model has no adapter {adapter_name!r}: it has {', '.join(model.peft_config)}")
    config = dict(model.peft_config[adapter_name].to_dict())
    config["peft_type"] = getattr(config["peft_type"], "value", config["peft_type"])
    where = f"adapter {adapter_name!r}"
    refuse_unsupported(config, where)
    tensors, scaling = _live_tensors(model.get_base_model(), adapter_name, config.get("bias", "none"))
    parts = parts_of(_held(tensors, where), config, dtype, scaling=scaling)
    return Adapter(
        name=adapter_name,
        base_model=config.get("base_model_name_or_path") or None,
        modules=parts.modules,
        dtype=parts.dtype,
        config=config,
        kinds=parts.kinds,
        extras=parts.extras,
    )


def settle_configs(model) -> None:
    """Put the names in the adapters' configs in order, so that equal adapters are saved as equal files.

    PEFT keeps them as sets, whose order is another in every process.
    """
    for config in model.peft_config.values():
        for field_name in ("target_modules", "exclude_modules", "modules_to_save"):
            if isinstance(getattr(config, field_name, None), set):
                setattr(config, field_name, sorted(getattr(config, field_name)))


def _live_tensors(base, adapter_name: str, bias: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What PEFT would store of this adapter, under the same names, and the scaling of each of its layers."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    tensors, scaling = {}, {}
    for module, layer in base.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
            scaling[module] = float(layer.scaling[adapter_name])
            tensors |= {f"{module}.{key}": value for key, value in _of_layer(layer, adapter_name).items()}
            if bias == "lora_only" and getattr(layer.get_base_layer(), "bias", None) is not None:
                tensors[f"{module}.base_layer.bias"] = layer.get_base_layer().bias
        elif isinstance(layer, AuxiliaryTrainingWrapper):
            held = (
                layer.adapter_state_dict(adapter_name, layer.state_dict()) if adapter_name in layer._adapters else {}
            )
            tensors |= {f"{module}.{key}": value for key, value in held.items()}
    if bias == "all":
        inside = re.compile(r"\.(lora_\w+|modules_to_save|original_module|token_adapter)\.")
        tensors |= {n: p for n, p in base.named_parameters() if n.endswith(".bias") and not inside.search(n)}
    return {KEY_PREFIX + key: value for key, value in tensors.items()}, scaling


def _of_layer(layer, adapter_name: str) -> dict[str, Tensor]:
    """The adapter's own tensors of one LoRA layer: "lora_A.NAME.weight" is stored as "lora_A.weight"."""
    found = {}
    for key, tensor in layer.named_parameters(remove_duplicate=False):
        part, _, rest = key.partition(".")
        owner, _, rest = rest.partition(".")
        if part.startswith("lora_") and owner == adapter_name:
            found[part if part == "lora_magnitude_vector" or not rest else f"{part}.{rest}"] = tensor
    return found


def _held(tensors: Mapping[str, Tensor], where: str) -> Stored:
    return Stored(
        where=where,
        sizes={key: tuple(tensor.shape) for key, tensor in tensors.items()},
        dtypes={key: tensor.dtype for key, tensor in tensors.items()},
        tensor=lambda key: tensors[key].detach().to("cpu", copy=True),
    )


def _initial(before: Path, after: Path, config: Mapping[str, Any]) -> Stored:
    """The tensors of the adapter before training, after a look whether it can be that."""
    theirs = read_config(before)
    for option in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if (config.get(option) or None) != (theirs.get(option) or None):
            raise AdapterError(
                f"{before} has {option}={theirs.get(option)!r} and {after} has {config.get(option)!r}: give the same "
                f"adapter, saved before its training"
            )
    stored = stored_tensors(before)
    if file_sha256(before / WEIGHTS_FILE) == file_sha256(after / WEIGHTS_FILE):
        raise AdapterError(f"{before} holds the weights of {after} itself: give the adapter as it was before training")
    return stored

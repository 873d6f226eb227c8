"""PEFT adapters in: a folder, a Hub repository or a live model gives `{module name: LowRank}`.

With peft_checks.py and peft_export.py (whose functions are offered here too) the only files that know how
PEFT stores LoRA. Reading never loads a base model, and reads a layer's factors when they are asked for.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moa.low_rank import LowRank
from moa.peft_checks import (
    CONFIG_FILE,
    KEY_PREFIX,
    WEIGHTS_FILE,
    AdapterError,
    Shape,
    check_targets,
    factor_shape,
    factor_shapes,
    refuse_unsupported,
    scalings,
    widest,
    without_base_copies,
)
from moa.peft_export import add_to_model, check_name, write_adapter

__all__ = [
    "Adapter",
    "AdapterError",
    "Shape",
    "WEIGHTS_FILE",
    "add_to_model",
    "check_name",
    "file_sha256",
    "from_model",
    "read_adapter",
    "write_adapter",
]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter as updates of named layers, scaling folded in.

    Attributes:
        name: what reports and errors call it.
        base_model: the model it was trained on, None when its config does not say.
        modules: layer name, such as "model.layers.0.self_attn.q_proj", to its update. May be lazy: a layer's
            factors are then read, checked and scaled each time they are asked for.
        dtype: the widest dtype its factors are stored in.
        path: the folder it was read from, None for an adapter of a live model.
        config: PEFT's config as a plain dictionary.
    """

    name: str
    base_model: str | None
    modules: Mapping[str, LowRank]
    dtype: torch.dtype = torch.float32
    path: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Sizes of every update, for adapters in files known without reading a factor."""
        if isinstance(self.modules, _FoldedFactors):
            return self.modules.shapes
        return {name: Shape(u.shape[0], u.rank, u.shape[1]) for name, u in self.modules.items()}

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the weights file; None for an adapter that has no file."""
        return file_sha256(self.path / WEIGHTS_FILE) if self.path else None

    def to(self, dtype: torch.dtype) -> "Adapter":
        """The same adapter giving its factors in another dtype; lazy ones are scaled in it, not after."""
        if isinstance(self.modules, _FoldedFactors):
            return replace(self, modules=replace(self.modules, dtype=dtype))
        return replace(self, modules={name: update.to(dtype) for name, update in self.modules.items()})


@dataclass(frozen=True, eq=False)
class _FoldedFactors(Mapping[str, LowRank]):
    """Layer name to update: factors are read, checked and scaled when asked for."""

    read: Callable[[str], tuple[Tensor, Tensor]]
    shapes: dict[str, Shape]
    scaling: Mapping[str, float]
    dtype: torch.dtype
    where: str

    def __getitem__(self, module: str) -> LowRank:
        if module not in self.shapes:
            raise KeyError(module)
        B, A = self.read(module)
        if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
            raise AdapterError(
                f"{self.where}: the factors of {module!r} hold NaN or infinite values, so the training "
                f"diverged or the file is damaged: use an earlier checkpoint"
            )
        return LowRank(B.to(self.dtype), A.to(self.dtype)).scaled(self.scaling[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read_adapter(path: str | Path, name: str | None = None, *, dtype: torch.dtype = torch.float32) -> Adapter:
    """Read a LoRA adapter that PEFT wrote, from a folder or from the Hub, without its base model.

    Ranks and alphas that differ by layer (rank_pattern, alpha_pattern), rsLoRA and any choice of layers are
    understood. Only sizes are read here; factors are streamed from the file as `.modules` is used.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors, or "user/repository" on the Hub.
        name: what to call it; the folder's name by default.
        dtype: dtype the factors are given in.

    Raises:
        FileNotFoundError: no such folder or repository.
        AdapterError: not an adapter, pickled or damaged weights, config and tensors that disagree, or a kind
            of adapter that is more than B @ A (the message names it).
    """
    from safetensors import SafetensorError, safe_open

    directory = _locate(path)
    config = _read_config(directory)
    refuse_unsupported(config, str(directory))
    file = _weights_file(directory)
    try:
        tensors = safe_open(file, framework="pt")
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged or incomplete ({error}): copy or download it again") from error
    views = {key: tensors.get_slice(key) for key in without_base_copies(tensors.keys(), str(file))}
    shapes = factor_shapes({key: view.get_shape() for key, view in views.items()}, str(file))
    scaling = scalings(config, shapes, str(directory))
    check_targets(config, shapes, str(directory))

    def read(module: str) -> tuple[Tensor, Tensor]:
        key = f"{KEY_PREFIX}{module}.lora_"
        return tensors.get_tensor(f"{key}B.weight"), tensors.get_tensor(f"{key}A.weight")

    return Adapter(
        name=name or directory.resolve().name,
        base_model=config.get("base_model_name_or_path") or None,
        modules=_FoldedFactors(read, shapes, scaling, dtype, str(file)),
        dtype=widest(_stored_dtype(view.get_dtype(), file) for view in views.values()),
        path=directory,
        config=config,
    )


def from_model(model, adapter_name: str, *, dtype: torch.dtype = torch.float32) -> Adapter:
    """A LoRA adapter of a live `PeftModel`, with the scaling the model applies.

    The result is a view: factors are copied to the CPU as they are when `.modules` is used.

    Raises:
        AdapterError: an unknown name, or a kind of adapter that is more than B @ A.
    """
    if adapter_name not in model.peft_config:
        raise AdapterError(f"the model has no adapter {adapter_name!r}: it has {', '.join(model.peft_config)}")
    where = f"adapter {adapter_name!r}"
    config = dict(model.peft_config[adapter_name].to_dict())
    config["peft_type"] = getattr(config["peft_type"], "value", config["peft_type"])
    refuse_unsupported(config, where)
    layers = _lora_layers(model, adapter_name)

    def weights(module: str) -> tuple[Tensor, Tensor]:
        return layers[module].lora_B[adapter_name].weight, layers[module].lora_A[adapter_name].weight

    def read(module: str) -> tuple[Tensor, Tensor]:
        B, A = weights(module)
        return B.detach().cpu(), A.detach().cpu()

    sizes = {module: dict(zip("BA", (w.shape for w in weights(module)), strict=True)) for module in layers}
    shapes = {module: factor_shape(module, pair, where) for module, pair in sizes.items()}
    scaling = {module: float(layer.scaling[adapter_name]) for module, layer in layers.items()}
    return Adapter(
        name=adapter_name,
        base_model=config.get("base_model_name_or_path") or None,
        modules=_FoldedFactors(read, shapes, scaling, dtype, where),
        dtype=widest(weights(module)[0].dtype for module in layers),
        config=config,
    )


def _lora_layers(model, adapter_name: str) -> dict[str, Any]:
    """The layers that hold this adapter, by name in the base model."""
    from peft.tuners.lora import LoraLayer

    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        if adapter_name in layer.lora_embedding_A:
            raise AdapterError(
                f"adapter {adapter_name!r} adapts the embedding {name!r}, and only linear layers are supported"
            )
    return {name: layer for name, layer in layers.items() if adapter_name in layer.lora_A}


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locate(path: str | Path) -> Path:
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise AdapterError(f"{path} is a file: give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        raise FileNotFoundError(f"there is no adapter folder {path}: check the path")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["adapter_*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"there is no adapter folder {path} here, and it could not be downloaded from the Hub "
            f"either ({reason}): check the name"
        ) from error


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG_FILE
    if not file.is_file():
        nested = sorted(f.parent.name for f in directory.glob(f"*/{CONFIG_FILE}"))
        hint = f"did you mean one of its folders: {', '.join(nested)}" if nested else "give the folder PEFT saved"
        raise AdapterError(f"{directory} is not an adapter, it has no {CONFIG_FILE}: {hint}")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise AdapterError(f"{file} is not valid JSON ({error}): copy or download it again") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{file} must hold a JSON object, got a {type(config).__name__}")
    return config


def _weights_file(directory: Path) -> Path:
    file = directory / WEIGHTS_FILE
    if file.is_file():
        return file
    if (directory / "adapter_model.bin").exists():
        raise AdapterError(
            f"{directory} holds its weights as a pickle (adapter_model.bin), which can run any code when "
            f"it is read: load it with PEFT where you trust it and save it again, which writes {WEIGHTS_FILE}"
        )
    raise AdapterError(f"{directory} has a config but no {WEIGHTS_FILE}: the copy or download is incomplete")


def _stored_dtype(name: str, file: Path) -> torch.dtype:
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if name not in dtypes:
        raise AdapterError(f"{file} stores factors as {name}, and only {', '.join(dtypes)} can be read")
    return dtypes[name]

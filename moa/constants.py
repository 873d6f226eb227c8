"""Small tensors that follow from settings alone, made once for all layers and forwards that ask for them.

Adapters in training are stacked anew in every forward; without this, each layer would copy the same numbers to the
GPU each time, and wait for them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def constant(
    values: tuple[float, ...], device: torch.device, dtype: torch.dtype, times: tuple[int, ...] | None = None
) -> Tensor:
    """These numbers as a tensor, which nobody may change.

    Args:
        times: how often each of them stands in it; None means once.
    """
    times = (1,) * len(values) if times is None else times
    if torch.compiler.is_compiling() or _inside_a_transform():
        return _made(values, device, dtype, times)
    return _kept(values, device, dtype, times)


def _inside_a_transform() -> bool:
    """Whether torch makes fake or wrapped tensors just now, which must not outlive this moment."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


@lru_cache(maxsize=4096)
def _kept(*asked: Any) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference could not be saved for a later backward
        return _made(*asked)


def _made(values: tuple[float, ...], device: torch.device, dtype: torch.dtype, times: tuple[int, ...]) -> Tensor:
    repeated = [value for value, count in zip(values, times, strict=True) for _ in range(count)]
    return torch.tensor(repeated, device=device, dtype=dtype)

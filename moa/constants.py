"""Small tensors that follow from settings alone, made once for all layers and forwards that ask for them.

Adapters in training are stacked anew in every forward; without this, each layer would copy the same numbers to the
GPU each time, and wait for them.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """These numbers as a tensor [len(values)], which nobody may change."""
    if torch.compiler.is_compiling() or _inside_a_transform():
        return torch.tensor(values, device=device, dtype=dtype)
    return _kept(values, device, dtype)


def _inside_a_transform() -> bool:
    """Whether torch makes fake or wrapped tensors just now, which must not outlive this moment."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None


@lru_cache(maxsize=4096)
def _kept(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference could not be saved for a later backward
        return torch.tensor(values, device=device, dtype=dtype)

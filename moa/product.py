"""A layer's output and an expert's update, added up in the product itself."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def plus_product(
    onto: Float[Tensor, "*batch o"], left: Float[Tensor, "*batch r"], right: Float[Tensor, "*row r o"]
) -> Float[Tensor, "*batch o"]:
    """`onto + left @ right`, in the memory of `onto` where no gradient is wanted and nothing is compiled.

    The product begins with what is there instead of zeros: one pass over `[tokens, o]`, where writing the update,
    reading it, and writing the sum are three, and one kernel instead of two.

    Args:
        right: one matrix, or one for each row of a batch of three dimensions.
    """
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (onto, left, right))
    if wanted or not onto.is_contiguous() or not onto.dtype == left.dtype == right.dtype:
        return onto + left @ right
    apart = torch.compiler.is_compiling()  # the compiler, which sees all uses of a tensor, finds memory itself
    if right.dim() == 2:
        rows, left = onto.view(-1, onto.shape[-1]), left.reshape(-1, left.shape[-1])
        return (rows.addmm if apart else rows.addmm_)(left, right).view(onto.shape)
    return (onto.baddbmm if apart else onto.baddbmm_)(left, right)


def shares_memory(result: Tensor, x: Tensor) -> bool:
    """Whether a layer gave back what it read, or a part of it: then adding to the one changes the other.

    Never in a compiled graph, where `plus_product` leaves `onto` as it is.
    """
    return not torch.compiler.is_compiling() and torch._C._is_alias_of(result, x)

"""A layer's output and an expert's update, added up in the product itself."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def plus_product(
    onto: Float[Tensor, "*batch o"], left: Float[Tensor, "*batch r"], right: Float[Tensor, "*row r o"]
) -> Float[Tensor, "*batch o"]:
    """`onto + left @ right`, in the memory of `onto` where no gradient is wanted.

    The product begins with what is there instead of zeros: one pass over `[tokens, o]`, where writing the update,
    reading it, and writing the sum are three, and one kernel instead of two.

    Args:
        right: one matrix, or one for each row of a batch of three dimensions.
    """
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (onto, left, right))
    if wanted or not onto.is_contiguous() or not onto.dtype == left.dtype == right.dtype:
        return onto + left @ right
    if right.dim() == 2:
        onto.view(-1, onto.shape[-1]).addmm_(left.reshape(-1, left.shape[-1]), right)
    else:
        onto.baddbmm_(left, right)
    return onto

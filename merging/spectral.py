"""Spectral merges: singular vectors of all updates together, found in a core as small as the ranks."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from moa.low_rank import LowRank
from moa.merging.linear import weighted_sum
from moa.merging.registry import Merged, merge_method


@merge_method("svd")
def svd(updates: Sequence[LowRank], weights: Float[Tensor, " n"], *, rank: int | None = None) -> Merged:
    """The best approximation of the weighted sum at a chosen rank, by default the largest of the inputs.

    The truncated SVD of M = sum_i w_i B_i A_i (Eckart-Young), from the QR of the stacked factors: the cost is
    4 (o + n) R^2 flops for R ranks together, and no matrix of the layer's size is ever formed. At rank R the
    result is the sum itself.
    """
    return weighted_sum(updates, weights, rank=rank or max(update.rank for update in updates))

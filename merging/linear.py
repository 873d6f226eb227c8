"""Linear merges: the weighted sum of the updates, in several forms, and the sum of factors, which is not it.

With deltas B_i A_i and weights w_i, the weighted sum is M = sum_i w_i B_i A_i.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import LowRank, stack
from moa.merging.registry import Merged, merge_method


@merge_method("concatenation", aliases=["cat"])
def concatenation(updates: Sequence[LowRank], weights: Float[Tensor, " n"]) -> Merged:
    """The exact weighted sum, all factors side by side: the rank is the sum of the ranks.

    B = [c_1 B_1 .. c_N B_N] and A = [|c_1| A_1; ..] with c_i = sign(w_i) sqrt(|w_i|). Where that is more
    ranks than the layer has rows or columns, the factors are brought down to those, still exactly.
    """
    whole = _weighted(updates, weights)
    if whole.rank > min(whole.shape):
        whole, dropped = whole.truncated()
        return Merged(whole, dropped)
    return Merged(whole)


@merge_method("weighted_sum", paper="https://arxiv.org/abs/2212.04089", aliases=["task_arithmetic"])
def weighted_sum(updates: Sequence[LowRank], weights: Float[Tensor, " n"], *, rank: int | None = None) -> Merged:
    """The weighted sum of the updates (task arithmetic), stored at its numerical rank.

    M = sum_i w_i B_i A_i; negative weights subtract a skill. Equal to concatenation as a matrix, but
    directions that adapters share are stored once. With a rank, the best approximation of that rank.
    """
    return Merged(*_weighted(updates, weights).truncated(rank))


@merge_method(
    "average",
    degree=0,
    breaks={"zero_adapter": "it has a share in the mean like any other adapter"},
)
def average(updates: Sequence[LowRank], weights: Float[Tensor, " n"], *, rank: int | None = None) -> Merged:
    """The weighted mean of the updates: weights are divided by their sum.

    M = sum_i w_i B_i A_i / sum_i w_i. An adapter that lacks a layer counts as one that leaves it unchanged.

    Raises:
        ValueError: weights whose sum is zero.
    """
    total = weights.sum()
    if total.abs() < 1e-8 * weights.abs().sum():
        raise ValueError(f"average divides by the sum of the weights, and {weights.tolist()} add up to zero")
    return weighted_sum(updates, weights / total, rank=rank)


@merge_method(
    "factor_sum",
    paper="https://arxiv.org/abs/2307.13269",
    breaks={
        "rank_order": "rank k of one adapter is added to rank k of another",
        "gauge": "the cross terms B_i A_j depend on how each adapter is factored",
        "scale_split": "the cross terms B_i A_j depend on how each adapter is factored",
        "zero_adapter": "an untrained adapter has B = 0 and A random, and its A still joins every other B",
        "duplicates": "an adapter forms cross terms with its copy",
    },
)
def factor_sum(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    split: Literal["sqrt", "both", "b"] = "sqrt",
) -> Merged:
    """Adds the factors, A to A and B to B, which is NOT the sum of the updates.

    (sum_i B_i) (sum_j A_j) has N^2 terms, of which the N(N - 1) cross terms B_i A_j mean nothing: for
    adapters trained apart they are as large as the sum itself, or larger. The report says how large. Offered
    because it is what PEFT calls `linear` and what LoRAHub searches over; to merge, use weighted_sum.

    Args:
        split: where a weight goes: its root into both factors and its sign into A (sqrt, as in PEFT), all of
            it into both (both, as in LoRAHub, quadratic in the weights), or into B (b, as in LoRA Soups).

    Raises:
        ValueError: adapters of different ranks.
    """
    pairs = [(update, float(w)) for update, w in zip(updates, weights, strict=True) if update.rank > 0]
    ranks = sorted({update.rank for update, _ in pairs})
    if len(ranks) > 1:
        raise ValueError(
            f"factor_sum adds factors, so all adapters need the same rank, got ranks "
            f"{' and '.join(map(str, ranks))}: use weighted_sum or svd, which take any ranks"
        )
    split_weight = {
        "sqrt": lambda w: (abs(w) ** 0.5, abs(w) ** 0.5 * (-1 if w < 0 else 1)),
        "both": lambda w: (w, w),
        "b": lambda w: (w, 1.0),
    }[split]
    shares = [split_weight(w) for _, w in pairs]
    B = torch.stack([b * update.B for (update, _), (b, _) in zip(pairs, shares, strict=True)]).sum(0)
    A = torch.stack([a * update.A for (update, _), (_, a) in zip(pairs, shares, strict=True)]).sum(0)
    wanted, got = _weighted(updates, weights), LowRank(B, A)
    error = stack([got, wanted.scaled(-1.0)]).norm()
    return Merged(got, facts={"cross_term_ratio": error / max(wanted.norm(), torch.finfo(B.dtype).tiny)})


def _weighted(updates: Sequence[LowRank], weights: Float[Tensor, " n"]) -> LowRank:
    return stack([update.scaled(float(w)) for update, w in zip(updates, weights, strict=True)])

"""Merges that undo what adapters do to each other: least squares on each one's own inputs, shared outputs damped."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import NUMERICAL_RANK_TOLERANCE, LowRank, core, stack
from moa.merging.registry import Merged, merge_method
from moa.merging.spectral import nonzero_svd, of_nonzero, svd_of_factors


def check_strengths(ridge: float, cap: float | None) -> None:
    """Refuse a ridge or a cap that is none."""
    if not ridge >= 0:
        raise ValueError(f"ridge must be 0 or more, got {ridge}")
    if cap is not None and not cap > 0:
        raise ValueError(f"cap must be above 0, or none, got {cap}")


@merge_method("wudi", paper="https://arxiv.org/abs/2503.08099", degree=0, check=check_strengths)
@of_nonzero
def wudi(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    ridge: float = 0.0,
    cap: float | None = None,
) -> Merged:
    """Acts on each adapter's own inputs as that adapter does, as far as they do not contradict (WUDI, solved exactly).

    M minimises sum_i |w_i| ||(M - sgn(w_i) delta_i) delta_i^T||^2 / ||delta_i||^2, the rows of delta_i standing
    for the inputs it was trained on, and is zero elsewhere. Adapters that read orthogonal inputs are added up,
    equal adapters count once, adapters that share A are averaged by weight; only ratios of weights matter.
    Where the inputs of adapters differ a little, M has to make much of the difference: the report gives
    ||M|| / ||sum_i sgn(w_i) delta_i||, and a large one asks for a ridge. The result has at most the sum of the
    ranks, unless a smaller rank is asked for.

    Args:
        ridge: from the exact solution (0) towards the weighted mean of the sgn(w_i) delta_i (large), in units
            of the mean strength of an input direction.
        cap: largest norm of the result, in norms of the sum; a larger one is scaled down to it.
    """
    shared = core(updates)
    M = projection_merge(shared.updates, weights, ridge)
    signed = weights.sign()[:, None, None] * shared.cores
    ratio = float(M.norm() / signed.sum(dim=0).norm().clamp(min=NUMERICAL_RANK_TOLERANCE * signed.norm()))
    if cap is not None and ratio > cap:
        M = M * (cap / ratio)
    return Merged(*shared.expanded(M, rank), {"norm_ratio": ratio})


def projection_merge(updates: Sequence[LowRank], weights: Float[Tensor, " n"], ridge: float) -> Float[Tensor, "p q"]:
    """argmin_M sum_i |w_i| (||(M - D_i) D_i^T||^2 / ||D_i||^2 + rho / sum_j |w_j| ||M - D_i||^2).

    D_i is sgn(w_i) times update i. With D_i = U_i S_i V_i^T this is least squares M K = T, K = [V_i S_i c_i],
    T = [U_i S_i^2 c_i] and c_i = sqrt|w_i| / ||S_i||, solved by the SVD of K, not from its Gram matrix, which
    would square its condition. rho is `ridge` times the mean of K's squared singular values.
    """
    tasks = [svd_of_factors(update.scaled(w)) for w, update in zip(weights.sign().tolist(), updates, strict=True)]
    c = [w.abs().sqrt() / task.S.norm() for w, task in zip(weights, tasks, strict=True)]
    K = torch.cat([task.V * task.S * c_i for task, c_i in zip(tasks, c, strict=True)], dim=1)
    T = torch.cat([task.U * task.S.square() * c_i for task, c_i in zip(tasks, c, strict=True)], dim=1)
    P, S, Z = nonzero_svd(K)
    mean = stack([update.scaled(w) for w, update in zip(weights.tolist(), updates, strict=True)]).delta()
    mean /= weights.abs().sum()
    rho = ridge * S.square().mean()
    return ((T @ Z) * S + rho * (mean @ P)) / (S.square() + rho) @ P.T


@merge_method(
    "pico",
    paper="https://arxiv.org/abs/2604.16826",
    degree=0,
    breaks={"duplicates": "an adapter given twice makes the directions it writes more crowded"},
)
@of_nonzero
def pico(updates: Sequence[LowRank], weights: Float[Tensor, " n"], *, rank: int | None = None) -> Merged:
    """Damps the directions that the adapters' outputs crowd, adds up, and restores the norm (Pico).

    With B_i = U_i S_i of each update's own SVD and [B_1 .. B_N] = U S Z^T, direction j holds the share
    p_j = S_j^2 / sum S^2 and is scaled by a_j = 1 / (1 + (N - 1) p_j): M = gamma U diag(a) U^T sum_i w_i delta_i,
    where gamma brings ||M|| to the mean ||delta_i|| (a sum that cancels stays zero). Only ratios of weights
    matter. The result has the rank of the sum, unless a smaller one is asked for.
    """
    shared = core(updates)
    tasks = [svd_of_factors(update) for update in shared.updates]
    U, S, _ = nonzero_svd(torch.cat([task.U * task.S for task in tasks], dim=1))
    crowding = S.square() / S.square().sum()
    terms = weights[:, None, None] * shared.cores
    damped = U / (1 + (len(updates) - 1) * crowding) @ (U.T @ terms.sum(dim=0))
    mean_norm = sum(task.S.norm() for task in tasks) / len(tasks)
    cancelled = damped.norm() <= NUMERICAL_RANK_TOLERANCE * terms.norm()
    gamma = 0.0 if cancelled else float(mean_norm / damped.norm())
    return Merged(*shared.expanded(gamma * damped, rank), {"norm_restored_by": gamma})

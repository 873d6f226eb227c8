"""Merges that give every adapter its own directions, or every direction the same strength."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import SVD, LowRank
from moa.merging.registry import Merged, merge_method
from moa.merging.spectral import leading, nonzero_svd, of_nonzero, svd_of_factors, svd_of_sum, weighted_core

FLATTENS = "it gives all directions one strength, also those of a single adapter"


def partial_isometry(vectors: Float[Tensor, "p k"]) -> Float[Tensor, "p k"]:
    """The nearest matrix of orthonormal columns, on the directions that the columns span.

    U V^T of the SVD without singular values of zero. (The polar factor would fill the null space with
    arbitrary directions, where columns coincide.)
    """
    U, _, V = nonzero_svd(vectors)
    return U @ V.T


def orthogonalised(parts: Sequence[SVD]) -> SVD:
    """All singular vectors side by side, turned until they are orthogonal: P([U_1 ..]), [S_1 ..], P([V_1 ..])."""
    U, V = (partial_isometry(torch.cat(vectors, dim=1)) for vectors in ([p.U for p in parts], [p.V for p in parts]))
    return SVD(U, torch.cat([part.S for part in parts]), V)


@merge_method(
    "tsv",
    paper="https://arxiv.org/abs/2412.00081",
    aliases=["tsv_merge"],
    breaks={"duplicates": "copies of an adapter compete for the same directions like any two adapters"},
)
@of_nonzero
def tsv(updates: Sequence[LowRank], weights: Float[Tensor, " n"], *, rank: int | None = None) -> Merged:
    """Turns the adapters' singular vectors until they are orthogonal to each other, then adds up (TSV-Merge).

    With w_i delta_i = U_i S_i V_i^T at its numerical rank, M = P([U_1 .. U_N]) diag(S_1 .. S_N) P([V_1 .. V_N])^T,
    where P gives the nearest matrix of orthonormal columns (a partial isometry where adapters share exact
    directions). Adapters orthogonal to each other are added up as they are. The result has at most the sum of
    the ranks, unless a smaller rank is asked for.
    """
    shared = weighted_core(updates, weights)
    U, S, V = orthogonalised([svd_of_factors(update) for update in shared.updates])
    return Merged(*shared.expanded(U * S @ V.T, rank))


def check_beta(beta: float) -> None:
    """Refuse a place between the sum and equal strengths that is none."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is how far strengths are evened out and must be in [0, 1], got {beta}")


@merge_method(
    "iso_c",
    paper="https://arxiv.org/abs/2502.04959",
    breaks={"identity": f"{FLATTENS} (beta=0 gives the sum)"},
    check=check_beta,
)
@of_nonzero
def iso_c(
    updates: Sequence[LowRank], weights: Float[Tensor, " n"], *, rank: int | None = None, beta: float = 1.0
) -> Merged:
    """Gives all directions of the weighted sum the same strength (Iso-C).

    sum_i w_i delta_i = U S V^T cut to rank K, M = U ((1 - beta) S + beta mean(S)) V^T. It stays within the
    adapters' span; the published form also fills what they leave free with arbitrary directions. Every
    direction counts, the weakest too: a rank, chosen before the strengths are evened out, keeps noise from
    becoming as strong as the rest. By default K is the numerical rank of the sum.

    Args:
        beta: from the sum as it is (0) to all directions equally strong (1).
    """
    shared = weighted_core(updates, weights)
    whole = svd_of_sum(shared.cores)
    U, S, V = leading(whole, rank)
    update, _ = shared.expanded(U * ((1 - beta) * S + beta * S.mean()) @ V.T)
    return Merged(update, float(whole.S[len(S) :].square().sum()), {"norm_ratio": norm_ratio(update, whole)})


def check_common(common: float) -> None:
    """Refuse a share of common directions that is none."""
    if not 0 < common <= 1:
        raise ValueError(f"common is the share of common directions and must be in (0, 1], got {common}")


@merge_method(
    "iso_cts",
    paper="https://arxiv.org/abs/2502.04959",
    breaks={
        "identity": FLATTENS,
        "duplicates": "each adapter, copy or not, is given directions of its own",
    },
    check=check_common,
)
@of_nonzero
def iso_cts(
    updates: Sequence[LowRank], weights: Float[Tensor, " n"], *, rank: int | None = None, common: float = 0.8
) -> Merged:
    """Joins the strongest common directions and some of each task alone, all equally strong (Iso-CTS).

    Of the K directions of sum_i w_i delta_i, the weakest N t make room: from each w_i delta_i without the
    common left directions U_c come its t strongest. With U = P([U_c, U_1 .. U_N]) and V alike, P the nearest
    matrix of orthonormal columns, M = mean(S) U V^T over all chosen S. K is the rank asked for, by default the
    numerical rank of the sum. Where K is too small for one direction a task, all are common, as in Iso-C.

    Args:
        common: share of the directions that are common, in (0, 1]; each task still has at least one.
    """
    shared = weighted_core(updates, weights)
    whole = svd_of_sum(shared.cores)
    K, N = min(len(whole.S), rank or len(whole.S)), len(updates)
    t = max(1, round((K - int(common * K)) / N)) if N < K else 0
    shared_by_all = leading(whole, K - N * t)
    alone = [leading(_outside(shared_by_all.U, update), t) for update in shared.updates]
    U, S, V = orthogonalised([shared_by_all, *alone])
    update, _ = shared.expanded(S.mean() * U @ V.T)
    facts = {"directions_per_task": float(t), "norm_ratio": norm_ratio(update, whole)}
    return Merged(update, float(whole.S[K:].square().sum()), facts)


def _outside(common: Float[Tensor, "p c"], update: LowRank) -> SVD:
    """The SVD of what an update writes outside of the common directions."""
    rest = LowRank(update.B - common @ (common.T @ update.B), update.A)
    return svd_of_factors(rest, update.norm())


def norm_ratio(update: LowRank, whole: SVD) -> float:
    """||M|| / ||sum_i w_i delta_i||, 0 for a sum that cancels."""
    return float(update.norm() / whole.S.norm()) if len(whole.S) else 0.0

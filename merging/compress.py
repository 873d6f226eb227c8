"""Compress, then merge: find one small pair of bases for all adapters first, and merge in it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import LowRank
from moa.merging.entrywise import Rule, check_density
from moa.merging.registry import Merged, merge_method
from moa.merging.spectral import merged_in_principal_bases, of_nonzero, weighted_core

MAX_SWEEPS = 500
"""Sweeps over the two bases: a dozen where some directions are stronger than others, some fifty where none are."""
SETTLED = 1e-8
"""Share of the energy by which a last sweep without momentum may still have improved the bases."""


class Tucker(NamedTuple):
    """Bases U [p, k] and V [q, k] in which matrices keep the share `captured` of their energy."""

    U: Float[Tensor, "p k"]
    V: Float[Tensor, "q k"]
    captured: float


def check_shares(density: float, beta: float) -> None:
    """Refuse a share of entries to keep, or a balance of the adapters, that is none."""
    check_density(density)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is how much norms count in the choice of bases and must be in [0, 1], got {beta}")


@merge_method(
    "ctm",
    paper="https://arxiv.org/abs/2606.03723",
    aliases=["compress_then_merge"],
    breaks={
        "identity": "its rule trims: one adapter comes back without small entries (all of it at density=1)",
        "duplicates": "an adapter given twice counts twice in the choice of the bases, and as two that agree",
    },
    check=check_shares,
)
@of_nonzero
def ctm(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seeds: Sequence[int] = (),
    rule: Rule = "ties",
    density: float = 0.2,
    beta: float = 0.5,
) -> Merged:
    """Compresses all updates into one pair of rank-k bases, then merges entries there (Compress-then-Merge).

    U [o, k] and V [n, k] maximise sum_i ||U^T X_i V||^2 for X_i = w_i delta_i scaled by
    (beta ||w_i delta_i|| + (1 - beta) mean_j ||w_j delta_j||) / ||w_i delta_i||, by alternating
    eigenvectors (HOOI). The rule merges the O_i = w_i U^T delta_i V into O, in the principal directions of the
    O_i, and M = U O V^T: the rank is k by construction, nothing is truncated after. k is the rank asked for, by
    default the largest of the inputs. The rule adds up what it keeps: the default weights of 1/N average. What
    is dropped is the part of the weighted sum outside the bases.

    Args:
        rule: how the entries of the O_i are merged: add up all (sum), the largest of each (magnitude), the
            largest that agree in sign (ties), random ones (dare), or random ones that agree in sign (dare_ties).
        density: share of each O_i's entries that the rule keeps, in (0, 1].
        beta: how much adapters with larger updates count in the choice of the bases, from all alike (0) to as
            they are (1).
    """
    shared = weighted_core(updates, weights)
    cores = shared.cores
    norms = cores.flatten(1).norm(dim=1)
    balance = beta + (1 - beta) * norms.mean() / norms
    U, V, captured = common_bases(balance[:, None, None] * cores, rank or max(update.rank for update in updates))
    merged = merged_in_principal_bases(U.T @ cores @ V, rule, density, seeds)
    update, _ = shared.expanded(U @ merged @ V.T)
    total = cores.sum(dim=0)
    outside = float(total.square().sum() - (U.T @ total @ V).square().sum())
    return Merged(update, max(outside, 0.0), {"captured_energy": captured})


def common_bases(matrices: Float[Tensor, "n p q"], rank: int) -> Tucker:
    """Orthonormal U and V of at most `rank` columns that maximise sum_i ||U^T X_i V||^2 (partial Tucker, HOOI).

    Each is to be the leading eigenvectors of sum_i (X_i V)(X_i V)^T, or of sum_i (X_i^T U)(X_i^T U)^T, given the
    other. They start there, and then take one step of orthogonal iteration in turn: as many sweeps as with
    eigenvectors anew each time, at a quarter of the time. Nesterov's momentum carries V on where it was heading, and
    starts anew when a sweep gains nothing: a third of the sweeps, on random adapters. There may be several maxima, of
    which this finds one, as HOOI does, and not always the same.
    """
    rows, columns = matrices.transpose(0, 1).contiguous(), matrices.permute(2, 0, 1).contiguous()  # p n q, q n p
    energy, captured, gains = float(matrices.square().sum()), 0.0, 0
    V = ahead = leading_eigenvectors(matrices.mT, rank)
    U = leading_eigenvectors(matrices @ V, rank)
    for _ in range(MAX_SWEEPS):
        written = (columns @ U).flatten(1)
        last, V = V, orthogonal_step(ahead, written)
        before, captured = captured, float((V.T @ written).norm()) ** 2
        gained = captured - before > SETTLED * energy
        if not gained and gains == 0:
            break
        gains = gains + 1 if gained else 0
        ahead = carried_on(V, last, (gains - 1) / (gains + 2)) if gains > 1 else V
        U = orthogonal_step(U, (rows @ ahead).flatten(1))
    return Tucker(U, V, captured / energy)


def leading_eigenvectors(matrices: Float[Tensor, "n p k"], rank: int) -> Float[Tensor, "p r"]:
    """The first `rank` eigenvectors of sum_i X_i X_i^T, strongest first."""
    wide = matrices.transpose(0, 1).flatten(1)
    return torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:].flip(1)


def orthogonal_step(basis: Float[Tensor, "p r"], X: Float[Tensor, "p m"]) -> Float[Tensor, "p r"]:
    """The basis turned once towards the leading eigenvectors of X X^T."""
    return torch.linalg.qr(X @ (X.T @ basis)).Q


def carried_on(basis: Float[Tensor, "p r"], last: Float[Tensor, "p r"], share: float) -> Float[Tensor, "p r"]:
    """The basis moved on by a share of what it has moved out of the span of the last one; not orthonormal."""
    return basis + share * (basis - last @ (last.T @ basis))

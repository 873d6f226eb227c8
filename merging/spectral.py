"""Spectral merges: all updates in one small core, and rules that act on entries in bases the updates share.

With bases Q_B and Q_A of what the updates write and read, w_i delta_i = Q_B C_i Q_A^T for cores C_i as small as the
ranks. Whatever depends on singular vectors, norms and angles is computed on the cores.
"""

from collections.abc import Callable, Sequence
from functools import wraps

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import NUMERICAL_RANK_TOLERANCE, SVD, Core, LowRank, core, span, stack
from moa.merging.dropout import RandomDrop, check_drawn, nearest_chance
from moa.merging.entrywise import Rule, check_density, merged_by_rule
from moa.merging.linear import weighted_sum
from moa.merging.registry import Merged, merge_method
from moa.merging.streaming import DenseRows, added, elected
from moa.merging.thresholds import Cut, thinnings


def of_nonzero(method: Callable[..., Merged]) -> Callable[..., Merged]:
    """Let a method see only the updates that change something, and return zeros where none does.

    An update of zeros (B = 0, or factors that cancel) still has rows in A: they must not enter a basis, a mean
    norm or a count of adapters.
    """

    @wraps(method)
    def on_nonzero(updates: Sequence[LowRank], weights: Tensor, **options) -> Merged:
        kept = [i for i, update in enumerate(updates) if update.changes_something()]
        if not kept:
            return Merged(*LowRank.zero(updates[0].shape, torch.float64).truncated())
        if "seeds" in options:
            options["seeds"] = [options["seeds"][i] for i in kept]
        return method([updates[i] for i in kept], weights[kept], **options)

    return on_nonzero


def weighted_core(updates: Sequence[LowRank], weights: Float[Tensor, " n"]) -> Core:
    """The core of the updates w_i delta_i."""
    left, small, right = core(updates)
    return Core(left, [update.scaled(w) for update, w in zip(small, weights.tolist(), strict=True)], right)


def nonzero_svd(matrix: Float[Tensor, "p q"], size: Tensor | float | None = None) -> SVD:
    """Thin SVD without the singular values that are rounding, and their vectors.

    `size` is that of the terms a matrix is the sum of, where they may cancel; by default its own.
    """
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = int((NUMERICAL_RANK_TOLERANCE * (S[:1] if size is None else size) < S).sum())
    return SVD(U[:, :kept], S[:kept], Vh[:kept].T)


def svd_of_factors(update: LowRank, size: float | None = None) -> SVD:
    """`nonzero_svd` of B @ A, where the rank is far below p and q: by QR of both, and the SVD of an r x r matrix."""
    (writes, R_B), (reads, R_A) = torch.linalg.qr(update.B), torch.linalg.qr(update.A.T)
    U, S, V = nonzero_svd(R_B @ R_A.T, size)
    return SVD(writes @ U, S, reads @ V)


def svd_of_sum(cores: Float[Tensor, "n p q"]) -> SVD:
    """Thin SVD of sum_i C_i, nothing where they cancel."""
    return nonzero_svd(cores.sum(dim=0), cores.norm())


def leading(whole: SVD, rank: int | None) -> SVD:
    """The first `rank` singular triplets, all of them for None."""
    return SVD(whole.U[:, :rank], whole.S[:rank], whole.V[:, :rank])


def principal_directions(cores: Float[Tensor, "n p q"]) -> Float[Tensor, "p k"]:
    """Eigenvectors of sum_i C_i C_i^T, strongest first, without those of eigenvalue zero.

    They depend on the deltas alone, unlike a basis of the stacked factors, which changes when an adapter is
    re-factored. `cores.mT` gives those of the other side.
    """
    strength, vectors = torch.linalg.eigh((cores @ cores.mT).sum(dim=0))
    return vectors[:, strength > NUMERICAL_RANK_TOLERANCE**2 * strength[-1:]].flip(1)


@merge_method("svd")
def svd(updates: Sequence[LowRank], weights: Float[Tensor, " n"], *, rank: int | None = None) -> Merged:
    """The best approximation of the weighted sum at a chosen rank, by default the largest of the inputs.

    The truncated SVD of M = sum_i w_i B_i A_i (Eckart-Young), from the Gram matrices of the stacked factors:
    the cost is 2 (o + n) R^2 flops for R ranks together, and no matrix of the layer's size is ever formed. At
    rank R the result is the sum itself.
    """
    return weighted_sum(updates, weights, rank=rank or max(update.rank for update in updates))


def check_rule(rule: Rule, density: float) -> None:
    """Refuse a share of entries that is none, or a chance that cannot be drawn."""
    (check_drawn if rule.startswith("dare") else check_density)(density)


@merge_method(
    "knots",
    paper="https://arxiv.org/abs/2410.19735",
    breaks={
        "identity": "its rule trims: one adapter comes back without small entries (all of it at density=1)",
        "duplicates": "its rule counts an adapter given twice as two that agree",
        "rotation": "its rule acts on the entries of what is read, which a rotation of the inputs mixes",
        "span": "its rule acts on the entries of what is read, which leaves the span of the adapters' A",
    },
    check=check_rule,
    computes_in="float32",
)
@of_nonzero
def knots(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seeds: Sequence[int] = (),
    rule: Rule = "ties",
    density: float = 0.2,
) -> Merged:
    """Writes all updates in one output basis by a joint SVD, and merges entries there (KnOTS).

    [w_1 delta_1 .. w_N delta_N] = U S [V_1^T .. V_N^T], each task's S V_i^T [K, n] is trimmed and merged by the
    rule into T, and M = U T. Weights are in before the SVD, the rule adds up what it keeps, and sums are not
    divided by how many adapters agree: the default weights of 1/N average, `scale` makes up for it. With
    rule=sum it is the weighted sum. The result has rank K, as many as the adapters write directions together,
    unless a smaller one is asked for.

    Args:
        rule: how the tasks' entries are merged: add up all (sum), the largest of each (magnitude), the largest
            that agree in sign (ties), random ones (dare), or random ones that agree in sign (dare_ties).
        density: share of each task's entries that the rule keeps, in (0, 1].
    """
    left = span(torch.cat([update.B for update in updates], dim=1))
    writes = left.coordinates.split([update.rank for update in updates], dim=1)
    reads = [torch.linalg.qr(update.A.T, mode="r").R for update in updates]
    U = nonzero_svd(torch.cat([w * b @ a.T for w, b, a in zip(weights, writes, reads, strict=True)], dim=1)).U
    tasks = [LowRank(U.T @ b, update.A) for b, update in zip(writes, updates, strict=True)]
    right = span(merged_entries(tasks, weights, rule, density, seeds).T)
    return Merged(*Core(left, [], right).expanded(U @ right.coordinates.T, rank))


def merged_entries(
    tasks: Sequence[LowRank], weights: Float[Tensor, " n"], rule: Rule, density: float, seeds: Sequence[int]
) -> Float[Tensor, "k i"]:
    """`merged_by_rule` for matrices too large to hold all at once: their rows are streamed, in float32."""
    if rule == "sum":
        return stack([task.scaled(w) for task, w in zip(tasks, weights.tolist(), strict=True)]).delta()
    if rule.startswith("dare"):
        density = nearest_chance(density)
        dense = DenseRows(tasks, weights / density)
        thin = {i: RandomDrop(density, seeds[i]) for i in dense}
    else:
        dense = DenseRows(tasks, weights)
        thin = thinnings(dense, Cut(density))
    return elected(dense, thin, weights, "total")[0] if rule.endswith("ties") else added(dense, thin)


@merge_method(
    "core_space",
    paper="https://arxiv.org/abs/2509.17786",
    breaks={
        "identity": "its rule trims: one adapter comes back without small entries (all of it at density=1)",
        "duplicates": "its rule counts an adapter given twice as two that agree",
    },
    check=check_density,
)
@of_nonzero
def core_space(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seeds: Sequence[int] = (),
    rule: Rule = "ties",
    density: float = 0.2,
) -> Merged:
    """Merges entries of the updates' small cores, in bases that all of them share (Core Space).

    w_i delta_i = U C_i V^T with U the eigenvectors of sum_i w_i^2 delta_i delta_i^T and V those of
    sum_i w_i^2 delta_i^T delta_i; the rule merges the C_i into C, and M = U C V^T. (The published bases, singular
    vectors of the stacked B and A, change with how an adapter is factored; these do not.) The rule adds up what
    it keeps: the default weights of 1/N average. With rule=sum it is the weighted sum. The result has at most
    the sum of the ranks, unless a smaller rank is asked for.

    Args:
        rule: how the cores' entries are merged: add up all (sum), the largest of each (magnitude), the largest
            that agree in sign (ties), random ones (dare), or random ones that agree in sign (dare_ties).
        density: share of each core's entries that the rule keeps, in (0, 1].
    """
    shared = weighted_core(updates, weights)
    return Merged(*shared.expanded(merged_in_principal_bases(shared.cores, rule, density, seeds), rank))


def merged_in_principal_bases(
    cores: Float[Tensor, "n p q"], rule: Rule, density: float, seeds: Sequence[int]
) -> Float[Tensor, "p q"]:
    """The cores merged by a rule on entries, turned for it to the principal directions of both sides."""
    U, V = principal_directions(cores), principal_directions(cores.mT)
    return U @ merged_by_rule(rule, U.T @ cores @ V, density, seeds) @ V.T

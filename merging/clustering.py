"""LoRA-LEGO: an adapter is a heap of rank-1 bricks; equal bricks of several adapters are merged into one.

A minimal semantic unit is m_j = [a_j; b_j], row j of A with column j of B, and delta = sum_j b_j a_j. The units of
all adapters are pooled, clustered into k by k-means, and every cluster becomes one rank of the result. k-means
needs only distances, which the R x R inner products of R units hold: it never sees o + n dimensions.
"""

import math
from collections.abc import Sequence
from functools import cache, partial
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import NUMERICAL_RANK_TOLERANCE, LowRank, core, inner, stack
from moa.merging.registry import Merged, merge_method
from moa.merging.spectral import leading, of_nonzero, svd_of_factors

PAPER = "https://arxiv.org/abs/2409.16167"
_CLUSTERING = Lock()
"""Held while k-means runs, which sets the threads of the whole process and then sets them back."""


@merge_method(
    "lego",
    paper=PAPER,
    degree=0,
    breaks={
        "gauge": "it clusters the rows of A and columns of B as they were trained (lego_gauge_safe does not)",
        "scale_split": "a unit is compared by both of its halves, so their relative size counts",
        "rotation": "the reweighting takes a unit's largest entry, which a rotation mixes (not with norm=2)",
        "duplicates": "the units of a copy count again in the mean of their cluster",
    },
    aliases=["lora_lego"],
)
def lego(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
    norm: Literal["inf", "2", "none"] = "inf",
    preserve: Literal["single", "sum", "norm", "none"] = "single",
) -> Merged:
    """Clusters the ranks of all adapters and keeps each cluster's mean: any ranks in, any rank out.

    The units [a_j; b_j], |w_i|^(1/2) in both halves and the sign of w_i on b_j, are clustered by k-means (k the
    rank, by default the largest of the inputs); mu_c is the mean of cluster c, and M = gamma sum_c mu_c^b mu_c^a.
    Two corrections of size follow: of each centroid, which is shorter than the units it stands for, and of the
    output, by gamma. With as many clusters as units (k = R), M is the weighted sum but for gamma, and with
    preserve=sum that sum itself. A result depends on how adapters are factored, and where the units form no
    groups, as the reported spread in clusters tells, also on the seed.

    Args:
        norm: bring a centroid to the mean norm of its units, by the largest entry (inf, as published) or the
            length (2) of [a; b], or leave it as it is (none).
        preserve: what gamma keeps of the size, for units that are independent: that of one adapter, whatever the
            weights add up to (single; for equal weights sqrt(r / k) times the published centroids), or that of the
            weighted sum, sqrt(R / k) (sum); the norm of the weighted sum exactly (norm); or gamma = 1 (none).
    """
    units, counts = weighted_units(updates, weights), unit_counts(updates)
    writes, reads = units.B.T @ units.B, units.A @ units.A.T
    member = clusters(writes + reads, unit_sizes(units), rank or int(counts.max()), seed)
    if member.shape[1] == 0:
        return Merged(*units.truncated())
    mean = member / member.sum(dim=0)
    centroids = regrown(LowRank(units.B @ mean, mean.T @ units.A), units, mean, norm)
    exact, got = math.sqrt((writes * reads).sum()), centroids.norm()
    if preserve == "norm":
        gamma = exact / got if got > NUMERICAL_RANK_TOLERANCE * exact else 1.0
    else:
        gamma = output_scale(preserve, weights, counts, centroids.rank)
    cosine = inner(centroids, units) / max(exact * got, torch.finfo(mean.dtype).tiny)
    facts = {"cosine_with_sum": cosine, "spread_in_clusters": _spread(writes + reads, member)}
    return Merged(centroids.scaled(gamma), facts=facts)


@merge_method("lego_gauge_safe", paper=PAPER)
@of_nonzero
def lego_gauge_safe(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
) -> Merged:
    """LoRA-LEGO on what adapters do instead of how they are factored: clusters of singular directions.

    The units of an adapter are its singular directions s_j u_j v_j^T, so they are the same however it is factored.
    They are compared as matrices, by cosine (u_j . u_l)(v_j . v_l), clustered by k-means with s_j w_i as mass, and
    each cluster's sum is replaced by its best approximation of rank 1. That approximates the weighted sum, with
    k = R exactly; `svd` is closer to the sum at the same rank, this keeps directions of different skills apart.
    k is the rank, by default the largest of the inputs. Equal singular values of one adapter leave the choice
    of its units open.
    """
    shared = core(updates)
    canonical = [singular_units(update) for update in shared.updates]
    units = weighted_units(canonical, weights)
    kernel = (units.B.T @ units.B) * (units.A @ units.A.T)
    sizes = unit_sizes(units)
    cosines = kernel / torch.outer(sizes, sizes).clamp(min=torch.finfo(kernel.dtype).tiny)
    member = clusters(cosines, sizes, rank or int(unit_counts(canonical).max()), seed, weigh=True)
    centroids = [singular_units(LowRank(units.B[:, of], units.A[of]), 1) for of in member.T.bool()]
    merged = stack(centroids)
    return Merged(shared.outside(merged), dropped=stack([units, merged.scaled(-1.0)]).norm() ** 2)


def weighted_units(updates: Sequence[LowRank], weights: Float[Tensor, " n"]) -> LowRank:
    """All units side by side: unit j is column j of B and row j of A, with |w|^(1/2) in both, the sign on B."""
    return stack([update.scaled(float(w)) for update, w in zip(updates, weights, strict=True)])


def singular_units(update: LowRank, count: int | None = None) -> LowRank:
    """The units s_j u_j v_j^T that an update is the sum of, or the first of them, s_j^(1/2) in both halves."""
    U, S, V = leading(svd_of_factors(update), count)
    return LowRank(U * S.sqrt(), (V * S.sqrt()).T)


def unit_sizes(update: LowRank) -> Float[Tensor, " r"]:
    """Norm ||b_j|| ||a_j|| of each unit as a matrix."""
    return update.B.norm(dim=0) * update.A.norm(dim=1)


def unit_counts(updates: Sequence[LowRank]) -> Float[Tensor, " n"]:
    """How many units of each adapter are not zero."""
    return torch.stack([(unit_sizes(update) > 0).sum() for update in updates]).to(torch.float64)


def clusters(
    kernel: Float[Tensor, "R R"], sizes: Float[Tensor, " R"], k: int, seed: int, *, weigh: bool = False
) -> Float[Tensor, "R k"]:
    """Which unit (row) is in which of at most k clusters (column): 1 or 0; units of size 0 are in none.

    k-means on points whose inner products are `kernel`, `weigh` with the sizes as mass, else all the same. With no
    more units than k each is a cluster; with no more different ones, each with its copies, which are never parted.
    Points go in by size, so that the order of adapters and of ranks has no say.
    """
    present = sizes.nonzero()[:, 0]
    labels = _labels(kernel[present][:, present], sizes[present], k, seed, weigh)
    member = torch.zeros(len(sizes), int(labels.max()) + 1 if len(labels) else 0, dtype=kernel.dtype)
    member[present, labels] = 1.0
    return member


def _labels(kernel: Float[Tensor, "R R"], sizes: Float[Tensor, " R"], k: int, seed: int, weigh: bool) -> Tensor:
    if k >= len(sizes):
        return torch.arange(len(sizes))
    different, copy_of = _without_copies(kernel)
    if k >= len(different):
        return copy_of
    size = torch.bincount(copy_of, weights=sizes)
    mass = size if weigh else torch.bincount(copy_of).to(size)
    order = size.argsort(descending=True, stable=True)
    rounded = _without_noise(kernel[different[order]][:, different[order]])
    found = torch.empty_like(order)
    found[order] = _kmeans(rounded, k, seed, _without_noise(mass[order]))
    return found[copy_of]


def _without_noise(values: Tensor) -> Tensor:
    """Values relative to the largest, rounded to 9 decimals and without negative zeros.

    Singular directions of one adapter are all equally far from each other, so that k-means has draws to decide:
    it must not decide them by the last bits, which differ with the order and the factoring of the adapters.
    """
    return (values / values.abs().max()).round(decimals=9) + 0.0


def _without_copies(kernel: Float[Tensor, "R R"]) -> tuple[Tensor, Tensor]:
    """The units that are copies of none before them, and for every unit which of those it is.

    Copies differ by rounding, and k-means would tell them apart by it where there are clusters to fill.
    """
    squares = kernel.diagonal()
    same = squares[:, None] + squares - 2 * kernel <= NUMERICAL_RANK_TOLERANCE**2 * squares.max()
    return torch.from_numpy(same.numpy().argmax(axis=1)).unique(return_inverse=True)


def _points(kernel: Float[Tensor, "R R"]) -> Float[Tensor, "R R"]:
    """R points with these inner products; k-means asks for no more, so it need not see o + n dimensions."""
    values, vectors = torch.linalg.eigh(kernel)
    return vectors * values.clamp(min=0).sqrt()


def _kmeans(kernel: Float[Tensor, "R R"], k: int, seed: int, mass: Float[Tensor, " R"]) -> Tensor:
    from sklearn.cluster import KMeans

    points, squares = _points(kernel), kernel.diagonal()
    distances = (squares[:, None] + squares - 2 * kernel).clamp(min=0)
    begin = partial(_far_apart, mass=mass.numpy(), distances=distances.numpy())
    means = KMeans(k, init=begin, n_init=10, random_state=seed % 2**32)
    # on one thread: a few units are clustered in less time than several take to meet
    with _CLUSTERING, _library_threads().limit(limits=1):
        fitted = means.fit(points.numpy(), sample_weight=mass.numpy())
    return torch.from_numpy(fitted.labels_).long().unique(return_inverse=True)[1]


def _far_apart(
    points: np.ndarray, k: int, random_state: np.random.RandomState, *, mass: np.ndarray, distances: np.ndarray
) -> np.ndarray:
    """Where k-means begins: scikit-learn's own k-means++, choice for choice, from squared distances [R, R].

    Which are computed once: scikit-learn does so for every center, and takes three quarters of its time over it.
    """
    chosen = [random_state.choice(len(points), p=mass / mass.sum())]
    nearest = distances[chosen[0]]
    for _ in range(1, k):
        odds = (mass * nearest).cumsum()
        tried = odds.searchsorted(random_state.uniform(size=2 + int(np.log(k))) * (nearest @ mass))
        tried = np.minimum(tried, len(points) - 1)
        closer = np.minimum(nearest, distances[tried])
        best = (closer @ mass).argmin()
        nearest = closer[best]
        chosen.append(tried[best])
    return points[chosen]


@cache
def _library_threads() -> Any:
    """Sets how many threads numerical libraries use; it looks for those that are loaded, which takes a while."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def regrown(centroids: LowRank, units: LowRank, mean: Float[Tensor, "R k"], norm: str) -> LowRank:
    """Each centroid brought to the mean norm of its units: mu_c <- mu_c mean_{m in c} ||m|| / ||mu_c||, m = [a; b].

    A centroid whose units cancel has no direction to grow in, and stays.
    """
    if norm == "none":
        return centroids

    def joint(update: LowRank) -> Tensor:
        halves = torch.stack([update.B.norm(float(norm), dim=0), update.A.norm(float(norm), dim=1)])
        return halves.norm(float(norm), dim=0)

    wanted, got = mean.T @ joint(units), joint(centroids)
    growth = torch.where(got > NUMERICAL_RANK_TOLERANCE * wanted, wanted / got, 1.0)
    return LowRank(centroids.B * growth, growth[:, None] * centroids.A)


def output_scale(preserve: str, weights: Float[Tensor, " n"], counts: Float[Tensor, " n"], k: int) -> float:
    """gamma by a count of units: the expected energy of a sum of k independent ones is proportional to k.

    For the size of one adapter that is sqrt(r / k), r the weighted mean of the ranks, times sum |w| / sum w^2, which
    takes the weights out of the units again: adapters of equal weight, whatever it is, merge as those of weight 1.
    """
    if preserve == "none":
        return 1.0
    if preserve == "sum":
        return math.sqrt(float(counts.sum()) / k)
    w = weights.abs() * (counts > 0)
    return float(w.sum() / w.square().sum()) * math.sqrt(float((w * counts).sum() / w.sum()) / k)


def _spread(kernel: Float[Tensor, "R R"], member: Float[Tensor, "R k"]) -> float:
    """Share of the units' energy that is distance to their centroids: 0 where each cluster holds copies of one."""
    centroids = ((member.T @ kernel @ member).diagonal() / member.sum(dim=0)).sum()
    return 1 - float(centroids / (kernel.diagonal() * member.sum(dim=1)).sum())

"""Element-wise merges by size: trim every update, then add up, or elect a sign for each entry and add what agrees.

These rules act on entries of the dense updates, so their result has no small rank: `streaming` forms the
entries, `thresholds` finds which are large, and the merged matrix is brought back to a rank, or kept whole where
rank="full" asks for it.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moa.low_rank import LowRank
from moa.merging.entrywise import check_density
from moa.merging.layers import Layers
from moa.merging.registry import Merged, merge_method
from moa.merging.streaming import DenseRows, added, elected, recompressed
from moa.merging.thresholds import Cut, thinnings

ACTS_ON_ENTRIES = {
    "rotation": "it acts on entries, which a rotation mixes",
    "span": "it acts on entries, which leaves the span of the adapters",
}


@merge_method(
    "magnitude",
    breaks={"identity": "it trims: one adapter comes back without its small entries (all of it at density=1)"}
    | ACTS_ON_ENTRIES,
    aliases=["magnitude_prune"],
    check=check_density,
    computes_in="float32",
)
def magnitude(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
    module: str = "",
    layers: Layers | None = None,
    density: float = 0.2,
    scope: Literal["module", "model"] = "module",
) -> Merged:
    """Trims each update to its largest entries, and adds up what is left.

    M = sum_i w_i D_i with D_i the floor(density * entries) largest entries of delta_i. The result is brought
    to a rank, by default the number of directions that the updates span together.

    Args:
        density: share of each update's entries to keep, largest first, in (0, 1].
        scope: compare an adapter's entries within each layer (module), or over all layers it changes (model).
    """
    dense = DenseRows(updates, weights)
    thin = thinnings(dense, Cut(density), layers if scope == "model" else None, module)
    return recompressed(added(dense, thin), updates, rank, seed)


@merge_method(
    "ties",
    paper="https://arxiv.org/abs/2306.01708",
    degree=0,
    breaks={"identity": "it trims: one adapter comes back without its small entries (all of it at density=1)"}
    | ACTS_ON_ENTRIES,
    check=check_density,
    computes_in="float32",
)
def ties(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
    module: str = "",
    layers: Layers | None = None,
    density: float = 0.2,
    scope: Literal["module", "model"] = "module",
    election: Literal["total", "frequency"] = "total",
    normalise: Literal["mean", "sum"] = "mean",
) -> Merged:
    """Trims each update to its largest entries, elects a sign per entry, and merges what agrees with it.

    With D_i the trimmed updates: sign = sgn(sum_i w_i D_i), and M = sum w_i D_i / sum |w_i|, both over the
    adapters with sgn(w_i D_i) = sign. Where the election is a draw, M = 0. It works on the updates, not on A
    and B, so re-factored adapters merge to the same, and weights count in the election. The result is brought
    to a rank, by default the number of directions that the updates span together. The report says which share
    of the trimmed entries, by size, lost the election.

    Args:
        density: share of each update's entries to keep, largest first, in (0, 1].
        scope: compare an adapter's entries within each layer (module, as PEFT and mergekit do), or over all
            layers that it changes (model, as published).
        election: weigh each vote by the entry's size (total, as published) or not (frequency).
        normalise: divide by the weights that agree (mean; only ratios of weights matter), or add up (sum).
    """
    dense = DenseRows(updates, weights)
    thin = thinnings(dense, Cut(density), layers if scope == "model" else None, module)
    matrix, outvoted = elected(dense, thin, weights, election, normalise)
    return recompressed(matrix, updates, rank, seed, {"outvoted": outvoted})


def check_shares(density: float, gamma: float) -> None:
    """Refuse shares of entries to keep and to remove that are none."""
    check_density(density)
    if not 0 <= gamma < 1:
        raise ValueError(f"gamma is the share of entries to remove as outliers and must be in [0, 1), got {gamma}")


@merge_method(
    "breadcrumbs",
    paper="https://arxiv.org/abs/2312.06795",
    breaks={"identity": "it removes the smallest and the largest entries (none at density=1)"} | ACTS_ON_ENTRIES,
    check=check_shares,
    computes_in="float32",
)
def breadcrumbs(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
    module: str = "",
    layers: Layers | None = None,
    density: float = 0.9,
    gamma: float = 0.01,
    scope: Literal["module", "model"] = "module",
    election: Literal["none", "total", "frequency"] = "none",
) -> Merged:
    """Removes the largest entries of each update as outliers and the smallest as noise, and adds up the rest.

    M = sum_i w_i D_i with D_i the floor(density * entries) entries of delta_i that come after its
    floor(gamma * entries) largest; where that is more than there are, fewer outliers go. The result is brought
    to a rank, by default the number of directions that the updates span together.

    Args:
        density: share of each update's entries to keep, in (0, 1].
        gamma: share of the entries to remove as outliers, largest first, in [0, 1).
        scope: compare an adapter's entries within each layer (module), or over all layers it changes (model).
        election: add up everything (none, as published), or what agrees with a sign that is elected per entry
            by size (total) or by number (frequency), as in TIES.
    """
    dense = DenseRows(updates, weights)
    thin = thinnings(dense, Cut(density, gamma), layers if scope == "model" else None, module)
    if election == "none":
        return recompressed(added(dense, thin), updates, rank, seed)
    matrix, outvoted = elected(dense, thin, weights, election)
    return recompressed(matrix, updates, rank, seed, {"outvoted": outvoted})

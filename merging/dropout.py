"""Merges that drop at random: entries with one chance (DARE) or by size (DELLA), or whole rank-1 units.

What is kept is divided by its chance of being kept, so that on average nothing changes. A chance is a multiple of
2^-16, the nearest to what is asked for: 16 bits draw an entry. Every adapter draws in every layer from a stream of
its own, entry after entry, so that neither the other adapters nor the size of the blocks matter.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from moa.low_rank import LowRank, stack, svd
from moa.merging.elementwise import ACTS_ON_ENTRIES
from moa.merging.entrywise import check_density
from moa.merging.registry import Merged, merge_method
from moa.merging.streaming import DenseRows, added, elected, recompressed

DROPS = {
    "identity": "it drops at random (nothing at density=1)",
    "duplicates": "each copy draws what it drops for itself",
}
DRAWS = 2**16
"""How many different draws there are."""
BFLOAT16_BITS = 7  # digits behind its point
SIZE_BITS = 5
SIZE_CLASSES = 12 * 2**SIZE_BITS
"""DELLA tells the sizes of a row apart by their power of two and this many binary digits more, in as many classes from
the largest down: 32 classes for each halving, to about 2^-12 of the largest."""


def check_drawn(density: float) -> None:
    """Refuse a chance that 16 bits cannot draw."""
    check_density(density)
    if density < 1 / DRAWS:
        raise ValueError(f"density is a chance that 16 bits draw and must be at least 2^-16 (1.5e-5), got {density:g}")


@merge_method(
    "dare_linear",
    paper="https://arxiv.org/abs/2311.03099",
    breaks=DROPS | ACTS_ON_ENTRIES,
    check=check_drawn,
    computes_in="float32",
)
def dare_linear(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
    seeds: Sequence[int],
    density: float = 0.5,
) -> Merged:
    """Drops entries of each update at random, divides the others by the density, and adds up.

    M = sum_i w_i m_i * delta_i / density with m_i ~ Bernoulli(density): on average the weighted sum. The
    report says how large the noise is against the sum before the result is brought to a rank, by default the
    number of directions that the updates span together, which removes much of it.

    Args:
        density: chance of each entry to be kept, in (0, 1], to the nearest multiple of 2^-16.
    """
    density = nearest_chance(density)
    dense = DenseRows(updates, weights / density)
    thin = {i: RandomDrop(density, seeds[i]) for i in dense}
    facts = {"noise_ratio": _noise_ratio(updates, weights, density)}
    return recompressed(added(dense, thin), updates, rank, seed, facts)


@merge_method(
    "dare_ties",
    paper="https://arxiv.org/abs/2311.03099",
    breaks=DROPS | ACTS_ON_ENTRIES,
    check=check_drawn,
    computes_in="float32",
)
def dare_ties(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
    seeds: Sequence[int],
    density: float = 0.5,
    election: Literal["total", "frequency"] = "total",
) -> Merged:
    """Drops entries of each update at random, divides the others by the density, and adds up what agrees.

    DARE in place of the trim of TIES: with D_i = m_i * delta_i / density and m_i ~ Bernoulli(density),
    sign = sgn(sum_i w_i D_i) and M = sum w_i D_i over the adapters with sgn(w_i D_i) = sign. The result is
    brought to a rank, by default the number of directions that the updates span together. The report says
    which share of the kept entries, by size, lost the election.

    Args:
        density: chance of each entry to be kept, in (0, 1], to the nearest multiple of 2^-16.
        election: weigh each vote by the entry's size (total) or not (frequency).
    """
    density = nearest_chance(density)
    dense = DenseRows(updates, weights / density)
    thin = {i: RandomDrop(density, seeds[i]) for i in dense}
    matrix, outvoted = elected(dense, thin, weights, election)
    return recompressed(matrix, updates, rank, seed, {"outvoted": outvoted})


def check_chances(density: float, epsilon: float) -> None:
    """Refuse chances of DELLA that are none."""
    check_drawn(density)
    if epsilon < 0 or not 0 < density - epsilon <= density + epsilon <= 1:
        raise ValueError(
            f"density - epsilon and density + epsilon are chances and must be in (0, 1], got {density} and "
            f"{epsilon}: choose an epsilon from 0 to below {min(density, 1 - density):g}"
        )


@merge_method(
    "della",
    paper="https://arxiv.org/abs/2406.11617",
    breaks=DROPS | ACTS_ON_ENTRIES,
    check=check_chances,
    computes_in="float32",
)
def della(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
    seeds: Sequence[int],
    density: float = 0.5,
    epsilon: float = 0.1,
    election: Literal["total", "frequency", "none"] = "total",
) -> Merged:
    """Drops entries at random, small ones more often than large ones, and adds up what agrees.

    The entry that is r-th smallest of the n in its row is kept with chance
    p = density - epsilon + 2 epsilon (r - 1) / (n - 1), and then divided by p, so that D_i is delta_i on
    average. Then sign = sgn(sum_i w_i D_i), and M = sum w_i D_i over the adapters with sgn(w_i D_i) = sign.
    Nothing is sorted: the c entries of a row whose sizes agree in their power of two and 5 binary digits more, or are
    below about 2^-12 of its largest, have the mean of their chances. That is within epsilon (c - 1) / (n - 1) of each
    one's own (0.016 epsilon for a long row of normally distributed entries) and leaves the mean of a row as it was,
    to 2^-17. The result is brought to a rank, by default the number of directions that the updates span together.

    Args:
        density: mean chance of an entry to be kept, in (0, 1].
        epsilon: how far the chances of the smallest and the largest entry of a row are from that.
        election: weigh each vote by the entry's size (total) or not (frequency), or add up everything (none).
    """
    dense = DenseRows(updates, torch.ones_like(weights))  # chances are those of the update, whatever its weight
    thin = {i: DropBySize(density, epsilon, seeds[i], float(weights[i])) for i in dense}
    if election == "none":
        return recompressed(added(dense, thin), updates, rank, seed)
    matrix, outvoted = elected(dense, thin, weights, election)
    return recompressed(matrix, updates, rank, seed, {"outvoted": outvoted})


@merge_method("dare_rank", breaks=DROPS, check=check_drawn)
def dare_rank(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seeds: Sequence[int],
    density: float = 0.5,
) -> Merged:
    """Drops whole ranks of each update at random, divides the others by the density, and adds up.

    With delta_i = sum_j S_j u_j v_j^T its singular value decomposition, each term is kept with chance
    `density` and divided by it: on average the weighted sum, as with DARE, but every draw keeps a low rank,
    and no noise is lost or added by fitting it into one.

    Args:
        density: chance of each rank to be kept, in (0, 1], to the nearest multiple of 2^-16.
    """
    density = nearest_chance(density)
    thinned = []
    for update, w, seed in zip(updates, weights.tolist(), seeds, strict=True):
        U, S, V = svd(update)
        kept = Draws(seed).kept(S.shape, density).bool()
        thinned.append(LowRank(U[:, kept] * S[kept], V[:, kept].T).scaled(w / density))
    return Merged(
        *stack(thinned).truncated(rank),
        facts={"noise_ratio": _noise_ratio(updates, weights, density)},
    )


def nearest_chance(chance: float) -> float:
    """The multiple of 2^-16 nearest to a chance, never 0."""
    return max(1, round(chance * DRAWS)) / DRAWS


class Draws:
    """A stream of random numbers, the same on every machine, however many are drawn at a time.

    numpy's SFC64 makes 64 bits in the time that torch's generator takes for 10, and its raw stream is fixed.
    """

    def __init__(self, seed: int):
        self._bits = np.random.SFC64(seed)

    def kept(self, shape: Sequence[int], chance: float | Tensor) -> Tensor:
        """1.0 with a chance, else 0.0, float32; a row starts anew in the stream at a whole word.

        Args:
            chance: of all, or of each; exact for multiples of 2^-16.
        """
        *rows, n = shape
        raw = self._bits.random_raw((*rows, -(-n // 4))).view(np.uint16)[..., :n]
        drawn = torch.from_numpy(raw).to(torch.float32)
        return torch.lt(drawn, chance * DRAWS, out=drawn)


class RandomDrop:
    """Keeps each entry with the same chance. What is left is not divided by it."""

    def __init__(self, density: float, seed: int):
        self.density, self.draws = density, Draws(seed)

    def __call__(self, rows: Tensor) -> Tensor:
        return rows.mul_(self.draws.kept(rows.shape, self.density))


class DropBySize:
    """Keeps the larger entries of a row with a larger chance, and multiplies each by weight / its own chance."""

    def __init__(self, density: float, epsilon: float, seed: int, weight: float = 1.0):
        self.density, self.epsilon, self.weight, self.draws = density, epsilon, weight, Draws(seed)

    def __call__(self, rows: Tensor) -> Tensor:
        chances = chances_by_size(rows, self.density, self.epsilon)
        return rows.mul_(self.draws.kept(rows.shape, chances)).div_(chances).mul_(self.weight)


def chances_by_size(rows: Float[Tensor, "b n"], density: float, epsilon: float) -> Float[Tensor, "b n"]:
    """DELLA's chance of each entry to be kept, from how many entries of its row are in smaller classes.

    The c entries of a class with s below it rank from s to s + c - 1, on average s + (c - 1) / 2 of n - 1. A chance is
    a multiple of 2^-16.
    """
    b, n = rows.shape
    step = 2 * epsilon / (n - 1) if n > 1 else 0.0
    places = size_classes(rows).add_(torch.arange(b, dtype=torch.int32)[:, None], alpha=SIZE_CLASSES).flatten()
    counts = torch.bincount(places, minlength=b * SIZE_CLASSES).view(b, SIZE_CLASSES).to(torch.float32)
    middle = counts.cumsum(dim=1).sub_(counts, alpha=0.5)  # s + c / 2
    chances = middle.mul_(step).add_(density - step * n / 2)
    chances = chances.mul_(DRAWS).round_().clamp_(min=1).div_(DRAWS)
    return chances.flatten().index_select(0, places).view(b, n)


def size_classes(rows: Float[Tensor, "b n"]) -> Int32[Tensor, "b n"]:
    """The class of each entry's size: `SIZE_CLASSES` - 1 for the largest of its row, 0 for the smallest.

    Read off the bits of bfloat16, its exponent and the digits behind its point: they are ordered as integers, too.
    """
    bits = rows.to(torch.bfloat16).view(torch.int16)
    classes = bits.bitwise_and_(0x7FFF).bitwise_right_shift_(BFLOAT16_BITS - SIZE_BITS)
    largest = classes.amax(dim=1, keepdim=True)
    return classes.sub_(largest - (SIZE_CLASSES - 1)).clamp_(min=0).int()


def _noise_ratio(updates: Sequence[LowRank], weights: Tensor, density: float) -> float:
    """sqrt((1 - density) / density sum_i ||w_i delta_i||^2) / ||sum_i w_i delta_i||, the expected error."""
    weighted = [update.scaled(w) for update, w in zip(updates, weights.tolist(), strict=True)]
    noise = (1 - density) / density * sum(update.norm() ** 2 for update in weighted)
    return noise**0.5 / max(stack(weighted).norm(), torch.finfo().tiny)

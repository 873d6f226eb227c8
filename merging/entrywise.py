"""Rules that act on the entries of a few matrices of one shape: trim, drop, elect a sign, add what agrees.

`elementwise`, `dropout` and `consensus` stream them over the rows of dense updates, `merged_by_rule` applies
them to small stacks [n, o, i], such as the matrices of a core.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Rule = Literal["sum", "magnitude", "ties", "dare", "dare_ties"]
CANCELLED = 1e-6
"""A sum smaller than this share of its terms' sizes is zero but for rounding, and has no sign."""


class Ballot:
    """Votes for a sign at each entry, counted one matrix at a time.

    Two sums are enough: T of all votes and P of the positive ones. The negative ones come to T - P, the sizes
    to 2 P - T, and the votes that agree with the sign of T to P where it is positive and T - P where not.

    Args:
        like: a tensor of the votes' shape and dtype.
    """

    def __init__(self, like: Float[Tensor, "..."]):
        self.total, self.positive = torch.zeros_like(like), torch.zeros_like(like)
        self._above_zero = torch.empty_like(like)

    def add(self, votes: Float[Tensor, "..."], weight: float = 1.0) -> None:
        """Count one matrix of votes, each `weight` times (> 0)."""
        self.total.add_(votes, alpha=weight)
        self.positive.add_(torch.clamp(votes, min=0, out=self._above_zero), alpha=weight)

    def sizes(self) -> Float[Tensor, "..."]:
        """The sum of the votes' sizes at each entry."""
        return 2 * self.positive - self.total

    def sign(self) -> Float[Tensor, "..."]:
        """The elected sign of each entry: that of the sum, 0 where the votes cancel."""
        return self.total.sign() * (self.total.abs() > CANCELLED * self.sizes())

    def agreeing(self, sign: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The sum of the votes that have this sign, 0 where it is 0."""
        return self.positive * sign.relu() + (self.total - self.positive) * (-sign).relu()


def keep_largest(deltas: Float[Tensor, "n o i"], density: float) -> Float[Tensor, "n o i"]:
    """Each matrix cut to its floor(density * o * i) largest entries; of equal ones, the first by row and column."""
    kept = int(density * deltas[0].numel())
    order = deltas.abs().flatten(1).argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(deltas).flatten(1).scatter_(1, order[:, :kept], 1.0)
    return deltas * mask.view_as(deltas)


def keep_random(deltas: Float[Tensor, "n o i"], density: float, seeds: Sequence[int]) -> Float[Tensor, "n o i"]:
    """Each entry kept with probability `density` and divided by it: unbiased (DARE)."""
    masks = [
        torch.rand(d.shape, generator=torch.Generator().manual_seed(s)) for d, s in zip(deltas, seeds, strict=True)
    ]
    return deltas * (torch.stack(masks) < density) / density


def agreeing_sum(deltas: Float[Tensor, "n o i"]) -> Float[Tensor, "o i"]:
    """The sum over the matrices of the entries that have the sign of their sum."""
    ballot = Ballot(deltas[0])
    for votes in deltas:
        ballot.add(votes)
    return ballot.agreeing(ballot.sign())


def merged_by_rule(
    rule: Rule, deltas: Float[Tensor, "n o i"], density: float, seeds: Sequence[int]
) -> Float[Tensor, "o i"]:
    """Sparsify each matrix, then add up: all entries (sum, magnitude, dare) or the agreeing ones (ties, dare_ties).

    The matrices come with their weights in; the result is homogeneous of degree 1 in them.

    Raises:
        ValueError: a density outside (0, 1].
    """
    check_density(density)
    if rule in ("magnitude", "ties"):
        deltas = keep_largest(deltas, density)
    elif rule in ("dare", "dare_ties"):
        deltas = keep_random(deltas, density, seeds)
    return agreeing_sum(deltas) if rule.endswith("ties") else deltas.sum(dim=0)


def check_density(density: float) -> None:
    """Refuse a share of entries to keep that is none."""
    if not 0 < density <= 1:
        raise ValueError(f"density is the share of entries to keep and must be in (0, 1], got {density}")

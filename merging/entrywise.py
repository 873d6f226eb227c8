"""Rules that act on the entries of a few matrices of one shape: trim, drop, elect a sign, average what agrees.

Each is a plain function on stacked tensors [n, o, i], one matrix an adapter. `elementwise` streams them over the
rows of dense updates, `spectral` applies them to the small matrices of a core.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Rule = Literal["sum", "magnitude", "ties", "dare", "dare_ties"]
CANCELLED = 1e-6
"""A sum smaller than this share of its terms' sizes is zero but for rounding, and has no sign."""


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


def elected_sign(votes: Float[Tensor, "n o i"]) -> Float[Tensor, "o i"]:
    """The sign of the sum over adapters for each entry, 0 where the votes cancel."""
    total = votes.sum(dim=0)
    return total.sign() * (total.abs() > CANCELLED * votes.abs().sum(dim=0))


def agreeing_sum(votes: Float[Tensor, "n o i"], sign: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
    """The sum over the adapters whose entry has the elected sign."""
    return torch.where(votes.sign() == sign, votes, 0.0).sum(dim=0)


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
    return agreeing_sum(deltas, elected_sign(deltas)) if rule.endswith("ties") else deltas.sum(dim=0)


def check_density(density: float) -> None:
    """Refuse a share of entries to keep that is none."""
    if not 0 < density <= 1:
        raise ValueError(f"density is the share of entries to keep and must be in (0, 1], got {density}")

"""Which rank each layer of a merge should have: from its singular values, within what a server or a disk allows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import NUMERICAL_RANK_TOLERANCE, LowRank, core, stack
from moa.merging.layers import Layers

By = Literal["energy", "gap", "loss", "erank"]
LEAST_GAP = 1.5
"""A ratio of neighbouring singular values that is smaller is no gap between signal and rest."""


@dataclass(frozen=True)
class RankRule:
    """How to choose ranks, from the singular values S_1 >= S_2 >= .. of each layer's weighted sum.

    Attributes:
        by: keep a share of sum_j S_j^2 (energy); cut at the largest ratio S_k / S_(k+1), where one is over 1.5, else
            by energy (gap); exp of the entropy of S / sum S, rounded (erank); or a share as by energy, not of the
            matrix but of the outputs that the adapters' inputs produce (loss; needs statistics): what is dropped
            is the least mean squared error in a layer's outputs that its rank allows.
        energy: that share, in (0, 1]; by default 0.99, and all of it under a budget.
        budget: parameters that all layers may have together; each goes where it keeps most energy (or loss). That
            is the optimum up to the last rank that does not fit.
        max_rank: no layer gets more.
        uniform: one rank for all layers, the largest that one of them needs or that the budget allows.
        power_of_two: ranks 1, 2, 4, 8, ..: the next above within max_rank and the budget, or else the next below. A
            larger rank than needed costs nothing in accuracy.
        noise: standard deviation of noise in the entries of the sum, known from elsewhere: singular values up to
            noise (sqrt(o) + sqrt(n)), the most that noise alone reaches, then count for nothing.

    Raises:
        ValueError: a value outside its range, or noise by loss, where no such limit is known.
    """

    by: By = "energy"
    energy: float | None = None
    budget: int | None = None
    max_rank: int | None = None
    uniform: bool = False
    power_of_two: bool = False
    noise: float | None = None

    def __post_init__(self):
        if self.by not in get_args(By):
            raise ValueError(f"ranks are chosen by one of {', '.join(get_args(By))}, got {self.by!r}")
        for name in ("energy", "noise"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if self.energy is None:
            object.__setattr__(self, "energy", 0.99 if self.budget is None else 1.0)
        if not 0 < self.energy <= 1:
            raise ValueError(
                f"energy is the share of the squared singular values to keep, in (0, 1], got {self.energy}"
            )
        for name in ("budget", "max_rank"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.noise is not None and not (math.isfinite(self.noise) and self.noise >= 0):
            raise ValueError(f"noise is a standard deviation, a finite number of at least 0, got {self.noise}")
        if self.noise is not None and self.by == "loss":
            raise ValueError("noise is a limit on singular values of the sum itself: choose by energy, gap or erank")

    @property
    def pads(self) -> bool:
        """Whether a layer that fills less than its rank is brought up to it by zeros, as a server wants it."""
        return self.uniform or self.power_of_two

    def rank_of(self, S: Float[Tensor, " p"], edge: float) -> int:
        """The rank of a layer with these singular values taken alone; those up to `edge` count for nothing."""
        floor = (NUMERICAL_RANK_TOLERANCE * S[:1]).clamp(min=edge)
        significant = S[S.gt(floor)]
        if significant.numel() == 0:
            return 1
        if self.by == "erank":
            return max(1, round(float(torch.special.entr(significant / significant.sum()).sum().exp())))
        if self.by == "gap":
            ratios = (S[:-1] / S.clamp(min=floor)[1:])[: self.max_rank]
            if ratios.numel() and ratios.max() > LEAST_GAP:
                return int(ratios.argmax()) + 1
        kept = significant.square().cumsum(0)
        return int((kept < self.energy * kept[-1]).sum()) + 1


def chosen_ranks(
    layers: Layers,
    rule: RankRule,
    most: Mapping[str, int],
    statistics: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, int]:
    """The rank that each layer should be stored with.

    From 1 to `most`, which is what the layer can fill, but for `uniform` and `power_of_two`: where these ask for
    more, zeros make it up (`padded`).

    Args:
        layers: the updates and weights of all adapters.
        rule: how to choose.
        most: layer name to the largest rank that has a use there.
        statistics: for by="loss", for each adapter layer name to an object with `gram` [n, n], the mean of x x^T
            over inputs x of the layer.

    Raises:
        ValueError: a budget below rank 1 everywhere, or no statistics where the rule needs them.
    """

    def spectrum(module: str, updates: list[LowRank]) -> Tensor:
        total = stack([u.scaled(float(w)) for u, w in zip(updates, layers.weights, strict=True)])
        if rule.by == "loss":
            total = _as_inputs_see_it(total, layers.weights, module, statistics)
        return torch.linalg.svdvals(core([total]).cores[0])

    spectra, wanted = {}, {}
    for module, S in layers.mapped("choosing ranks", spectrum):
        spectra[module] = S
        edge = (rule.noise or 0.0) * sum(math.sqrt(size) for size in layers.shapes[module])
        rank = rule.rank_of(S, edge)
        wanted[module] = min(rank, most[module], rule.max_rank or rank)
    costs = {module: sum(layers.shapes[module]) for module in wanted}
    _check_budget(rule.budget, costs)
    if rule.uniform:
        affordable = rule.budget // sum(costs.values()) if rule.budget else None
        return dict.fromkeys(wanted, _allowed(max(wanted.values()), rule, affordable))
    if rule.budget is None:
        return {module: _allowed(rank, rule) for module, rank in wanted.items()}
    return _spent(spectra, {module: _steps(rank, rule) for module, rank in wanted.items()}, costs, rule.budget)


def padded(update: LowRank, rank: int) -> LowRank:
    """The same update with columns and rows of zeros up to a rank, for servers that want one rank everywhere."""
    missing = max(0, rank - update.rank)
    pad = torch.nn.functional.pad
    return LowRank(pad(update.B, (0, missing)), pad(update.A, (0, 0, 0, missing)))


def _as_inputs_see_it(total: LowRank, weights: Tensor, module: str, statistics) -> LowRank:
    """An update with the singular values of delta C, for inputs with sum_i |w_i| G_i = C C^T.

    ||delta C||^2 is the mean squared output over the inputs. delta C = B (A C), and any matrix with the Gram of
    A C serves in its place: an R x R one, so that C is never needed.

    Raises:
        ValueError: no statistics at all, or none of this layer.
    """
    if statistics is None:
        raise ValueError("ranks by loss need statistics of each adapter's inputs, got none: run moa statistics first")
    S = total.A.new_zeros(total.shape[1], total.shape[1])
    for w, of in zip(weights, statistics, strict=True):
        if (known := of.get(module)) is not None and known.gram is not None:
            S.add_(known.gram, alpha=abs(float(w)))
    if not S.any():
        raise ValueError(f"ranks by loss need statistics of every layer, and no adapter has any of {module!r}")
    values, vectors = torch.linalg.eigh(total.A @ (S @ total.A.T))
    return LowRank(total.B, vectors * values.clamp(min=0).sqrt())


def _allowed(rank: int, rule: RankRule, affordable: int | None = None) -> int:
    """The rank itself or, if powers of two are asked for, the next above, or below where a limit is in between."""
    limit = min((k for k in (rule.max_rank, affordable) if k is not None), default=math.inf)
    if not rule.power_of_two:
        return min(rank, limit)
    above = 1 << (rank - 1).bit_length()
    return above if above <= limit else 1 << (limit.bit_length() - 1)


def _steps(rank: int, rule: RankRule) -> list[int]:
    """The ranks from 1 on that lead to a rank, in the steps that the rule allows."""
    if rule.power_of_two:
        return [1 << j for j in range(_allowed(rank, rule).bit_length())]
    return list(range(1, rank + 1))


def _check_budget(budget: int | None, costs: Mapping[str, int]) -> None:
    least = sum(costs.values())
    if budget is not None and budget < least:
        raise ValueError(
            f"a budget of {budget:,} parameters is too small: rank 1 in each of the {len(costs)} layers, the least "
            f"there is, takes {least:,}"
        )


def _spent(
    spectra: Mapping[str, Tensor], steps: Mapping[str, Sequence[int]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Rank 1 everywhere, then the step with the most sum S_j^2 per parameter, as long as there is one that fits.

    Squared singular values descend, so in each layer a step is worth no more than the one before it (and costs no
    less): the best are taken in order, and until one does not fit no other ranks of the same total keep more.
    """
    ranks = dict.fromkeys(steps, 1)
    left = budget - sum(costs.values())
    offers = []
    for module, S in spectra.items():
        value = math.inf
        for lower, upper in pairwise(steps[module]):
            cost = (upper - lower) * costs[module]
            value = min(value, float(S[lower:upper].square().sum()) / cost)  # descends, but for rounding
            offers.append((value, cost, module, upper))
    for _, cost, module, upper in sorted(offers, key=lambda offer: -offer[0]):
        if cost <= left:
            ranks[module], left = upper, left - cost
    return ranks

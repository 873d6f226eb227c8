"""Whether a classifier's confidence can be believed: calibration error, risk at coverage, sets that hold the answer.

Pure functions of how sure it was and whether it was right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BINS = 15  # of the calibration error, of equal width, as in Guo et al. 2017
STEPS = 20  # of coverage that a stored curve has


@dataclass
class Calibration:
    """How a router's confidence fits its accuracy, on held-out prompts.

    Attributes:
        prompts: how many.
        ece: expected calibration error, see `calibration_error`.
        aurc: area under the risk-coverage curve, see `risk_coverage`.
        risks: the curve, at coverages of 5 %, 10 %, ..., 100 %.
    """

    prompts: int
    ece: float
    aurc: float
    risks: list[float]


@dataclass
class ConformalSet:
    """Which experts the routing `conformal` mixes: all that are at least this likely.

    Attributes:
        coverage: share of prompts whose own expert should be among them.
        floor: the probability.
    """

    coverage: float
    floor: float

    def __post_init__(self) -> None:
        if not 0 < self.coverage < 1:
            raise ValueError(f"the coverage of a conformal set lies between 0 and 1, got {self.coverage}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"the floor of a conformal set is a probability, got {self.floor}: fit the router again")


def measure(confidence: Float[Tensor, " prompts"], right: Bool[Tensor, " prompts"]) -> Calibration:
    """All of it at once; a prompt has the confidence of what was chosen for it."""
    curve = risk_coverage(confidence, right)
    prompts = len(curve)
    places = [math.ceil(prompts * step / STEPS) - 1 for step in range(1, STEPS + 1)]
    return Calibration(
        prompts, calibration_error(confidence, right), float(curve.mean()), [float(curve[place]) for place in places]
    )


def reliability(confidence: Float[Tensor, " prompts"], right: Bool[Tensor, " prompts"]) -> Float[Tensor, "3 bins"]:
    """Prompts, confidence and hits, summed in `BINS` bins of equal width, (0, 1/15], (1/15, 2/15], ..."""
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    rows = torch.stack([torch.ones_like(confidence), confidence, right.to(confidence)])
    return confidence.new_zeros(3, BINS).index_add(1, place, rows)


def calibration_error(confidence: Float[Tensor, " prompts"], right: Bool[Tensor, " prompts"]) -> float:
    """sum_b n_b / n |accuracy_b - confidence_b| over the bins of `reliability` (Guo et al. 2017, arXiv:1706.04599)."""
    _, sure, hits = reliability(confidence.double(), right)
    return float((sure - hits).abs().sum()) / len(confidence)


def risk_coverage(confidence: Float[Tensor, " prompts"], right: Bool[Tensor, " prompts"]) -> Float[Tensor, " prompts"]:
    """Share of wrong choices among the k surest prompts, for k = 1 ... n; the mean over k is the area under it (AURC).

    Prompts of equal confidence could come in any order: each counts as wrong as they are on average. Geifman and
    El-Yaniv 2017, arXiv:1705.08500.
    """
    sure, order = confidence.double().sort(descending=True, stable=True)
    wrong = (~right[order]).double()
    _, group, sizes = sure.unique_consecutive(return_inverse=True, return_counts=True)
    shared = torch.zeros(len(sizes), dtype=wrong.dtype).index_add(0, group, wrong) / sizes
    return shared[group].cumsum(dim=0) / torch.arange(1, len(wrong) + 1)


def conformal_quantile(scores: Float[Tensor, " prompts"], rate: float, alike: int = 1) -> float:
    """A threshold that one more prompt like these exceeds with a probability of at most `rate`.

    The ceil((n + alike) (1 - rate))-th smallest of n scores; infinite where n is too small for the rate, see
    `promised`. Split conformal prediction, Vovk et al. 2005; Angelopoulos and Bates 2021, arXiv:2107.07511.

    Args:
        alike: how many of the prompts come of one row: only rows can be exchanged with one another.
    """
    place = math.ceil((len(scores) + alike) * (1 - rate) - 1e-9)  # 20 * 0.95 is 19, whatever floats say
    return math.inf if place > len(scores) else float(scores.sort().values[place - 1])


def promised(rate: float, prompts: int, alike: int = 1) -> float:
    """The share beyond a threshold that so many prompts can promise: `rate`, or the least that they can."""
    return max(rate, alike / (prompts + alike))


def fit_conformal(
    probabilities: Float[Tensor, "prompts experts"], own: Int[Tensor, " prompts"], coverage: float, alike: int = 1
) -> ConformalSet:
    """The least probable sets that hold a prompt's own expert `coverage` of the time (LAC).

    {i: p_i >= 1 - q}, q the conformal quantile of 1 - p_own: on average the smallest sets of this coverage (Sadinle et
    al. 2019, arXiv:1609.00451). Prompts too few for the coverage give a floor of 0: every expert.

    Args:
        own: index of the expert that is right for each prompt.
        alike: how many of the prompts come of one row.
    """
    missed = 1 - probabilities.double().gather(1, own[:, None])[:, 0]
    return ConformalSet(coverage, max(0.0, 1 - conformal_quantile(missed, 1 - coverage, alike)))

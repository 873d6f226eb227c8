"""What a fitted router should doubt: how far its confidence holds, and which prompts are not for its experts.

All of it is measured on held-out prompts, which the router was not trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moa.calibration import conformal_quantile, fit_conformal, measure
from moa.config import RouterConfig
from moa.router import SequenceRouter
from moa.strangeness import Abstention, Score, energy, larger
from moa.training.router_options import NO_SCORE, RouterChoices


@dataclass(frozen=True)
class Strangeness:
    """One score of held-out prompts.

    Attributes:
        own: of each prompt.
        left_out: the same, had the mixture no expert for the prompt's task: what a new task would look like.
        typical: what `both` compares the single scores by.
    """

    own: Float[Tensor, " prompts"]
    left_out: Float[Tensor, " prompts"]
    typical: dict[str, list[float]] = field(default_factory=dict)

    @property
    def auroc(self) -> float:
        """How likely a prompt of a left-out task is stranger than an own one; 0.5 is chance."""
        from sklearn.metrics import roc_auc_score

        labels = [0] * len(self.own) + [1] * len(self.left_out)
        return float(roc_auc_score(labels, torch.cat([self.own, self.left_out]).numpy()))

    def limits(self, score: Score, rate: float) -> Abstention:
        """Thresholds that `rate` of own prompts pass, and `rate` of a left-out task's: those run the base model.

        Fewer than 1 / rate - 1 prompts cannot promise the rate; then it is the smallest that they can, 1 / (n + 1).
        """
        rate = max(rate, 1 / (len(self.own) + 1))
        merged = conformal_quantile(self.own, rate)
        base = max(merged, conformal_quantile(self.left_out, rate))
        return Abstention(score, rate, merged, base, self.typical)


@torch.no_grad()
def with_doubt(
    router: SequenceRouter,
    config: RouterConfig,
    pooled: Float[Tensor, "prompts hidden"],
    targets: Float[Tensor, "prompts experts"],
    labels: Int[Tensor, " prompts"],
    choices: RouterChoices,
) -> tuple[RouterConfig, dict[Score, Strangeness]]:
    """The router's description with its calibration, its conformal set and its thresholds, and what they come from.

    Args:
        router: calibrated, with a detector.
        pooled: features of the held-out prompts.
        targets: the share that each expert should have of them; the largest is right.
        labels: index of the expert whose prompt each is.
    """
    right, logits = targets.argmax(dim=-1), router(pooled)
    honest, chosen = halves(router, pooled, targets).max(dim=-1)
    found: dict[Score, Strangeness] = {
        "mahalanobis": _strangeness(router.detector.distances(router.standardised(pooled)), labels),
        "energy": _energies(logits, router.temperature, labels),
    }
    found["both"] = _both(found)
    limits = None if choices.ood == NO_SCORE else found[choices.ood].limits(choices.ood, choices.ood_rate)
    return replace(
        config,
        calibration=measure(honest, chosen == right),
        conformal=fit_conformal(logits.softmax(dim=-1), right, choices.coverage),
        abstention=limits,
    ), found


def halves(
    router: SequenceRouter, pooled: Float[Tensor, "prompts hidden"], targets: Float[Tensor, "prompts experts"]
) -> Float[Tensor, "prompts experts"]:
    """Probabilities under a temperature fitted on the other half of the prompts, which flatters no error."""
    other = copy.deepcopy(router)
    found = torch.empty_like(targets)
    for one in (slice(0, None, 2), slice(1, None, 2)):
        rest = slice(1 - one.start, None, 2)
        other.calibrate(pooled[rest], targets[rest])
        found[one] = other(pooled[one]).softmax(dim=-1)
    return found


def _strangeness(distances: Float[Tensor, "prompts experts"], labels: Int[Tensor, " prompts"]) -> Strangeness:
    others = distances.scatter(1, labels[:, None], torch.inf)
    return Strangeness(distances.amin(dim=-1), others.amin(dim=-1))


def _both(single: Mapping[Score, Strangeness]) -> Strangeness:
    typical = {name: [float(of.own.mean()), _spread(of.own)] for name, of in single.items()}
    own, left_out = (
        larger({name: getattr(of, part) for name, of in single.items()}, typical) for part in ("own", "left_out")
    )
    return Strangeness(own, left_out, typical)


def _spread(scores: Float[Tensor, " prompts"]) -> float:
    return float(scores.std(correction=0)) or 1.0


def _energies(
    logits: Float[Tensor, "prompts experts"], temperature: Tensor, labels: Int[Tensor, " prompts"]
) -> Strangeness:
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return Strangeness(energy(logits, temperature), energy(others, temperature))

"""What a fitted router should doubt: how far its confidence holds, and which prompts are not for its experts.

All of it is measured on held-out prompts, which the router was not trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moa.calibration import conformal_quantile, fit_conformal, measure, promised
from moa.config import RouterConfig
from moa.router import SequenceRouter
from moa.strangeness import Abstention, Score, energy, larger, looks_plain
from moa.training.router_options import NO_SCORE, RouterChoices


@dataclass(frozen=True)
class Strangeness:
    """One score of held-out prompts.

    Attributes:
        own: of each prompt.
        left_out: the same, had the mixture no expert for the prompt's task: what a new task would look like.
        typical: what `both` compares the single scores by: up to 1 neither is beyond its reach.
        alike: how many of the prompts come of one row, with and without its template.
        least: the smallest share of own prompts that these can promise to be beyond a threshold.
    """

    own: Float[Tensor, " prompts"]
    left_out: Float[Tensor, " prompts"]
    typical: dict[str, list[float]] = field(default_factory=dict)
    alike: int = 1
    least: float = 0.0

    @property
    def auroc(self) -> float:
        """How likely a prompt of a left-out task is stranger than an own one; 0.5 is chance."""
        from sklearn.metrics import roc_auc_score

        labels = [0] * len(self.own) + [1] * len(self.left_out)
        return float(roc_auc_score(labels, torch.cat([self.own, self.left_out]).numpy()))

    def limits(self, score: Score, rate: float) -> Abstention:
        """Thresholds that `rate` of own prompts pass, and `rate` of a left-out task's: those run the base model.

        Too few prompts cannot promise the rate; then it is the smallest that they can.
        """
        rate = max(rate, self.least)
        merged = 1.0 if self.typical else conformal_quantile(self.own, rate, self.alike)
        base = max(merged, conformal_quantile(self.left_out, rate, self.alike))
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
    by_form = router.detector.by_form(router.standardised(pooled))
    of_rows = {"alike": by_form.shape[-1], "least": promised(0.0, len(labels), by_form.shape[-1])}
    others = by_form.scatter(1, labels[:, None, None].expand(-1, -1, by_form.shape[-1]), torch.inf)
    found: dict[Score, Strangeness] = {
        "mahalanobis": Strangeness(by_form.amin(dim=(1, 2)), others.amin(dim=(1, 2)), **of_rows),
        "energy": Strangeness(*_energies(logits, router.temperature, labels), **of_rows),
    }
    found["both"] = _both(found, looks_plain(by_form), looks_plain(others), choices.ood_rate)
    limits = None if choices.ood == NO_SCORE else found[choices.ood].limits(choices.ood, choices.ood_rate)
    return replace(
        config,
        calibration=measure(honest, chosen == right),
        conformal=fit_conformal(logits.softmax(dim=-1), right, choices.coverage, of_rows["alike"]),
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


def _both(
    single: Mapping[Score, Strangeness],
    plain: Bool[Tensor, " prompts"] | None,
    left_plain: Tensor | None,
    rate: float,
) -> Strangeness:
    """The larger of the single scores.

    Each may let half of `rate` fall back, so that both together never let more. Where one form alone has too few
    prompts to promise what all of them can, the forms are taken together.

    Args:
        plain, left_plain: which prompts look as if they came without a template; and if their own expert is left out.
        rate: share of own prompts that may fall back.
    """
    prompts, alike = len(single["energy"].own), single["energy"].alike
    kept = promised(rate / 2, prompts, alike)
    forms, of_row = [torch.ones(prompts, dtype=torch.bool)], alike
    if plain is not None and all(promised(rate / 2, int(form.sum())) <= kept for form in (~plain, plain)):
        forms, of_row = [~plain, plain], 1
    typical = {
        name: [number for form in forms for number in _typical(of.own[form], kept, of_row)]
        for name, of in single.items()
    }
    own = larger({name: of.own for name, of in single.items()}, typical, plain)
    left_out = larger({name: of.left_out for name, of in single.items()}, typical, left_plain)
    return Strangeness(own, left_out, typical, alike, least=2 * promised(0.0, prompts, alike))


def _typical(scores: Float[Tensor, " prompts"], rate: float, alike: int) -> tuple[float, float]:
    """Median, and how far above it the scores of all but `rate` of such prompts reach.

    Their standard deviation would not do: tails differ, and the heaviest would set the threshold of all.
    """
    median = float(scores.median())
    return median, conformal_quantile(scores, rate, alike) - median or 1.0


def _energies(
    logits: Float[Tensor, "prompts experts"], temperature: Tensor, labels: Int[Tensor, " prompts"]
) -> tuple[Float[Tensor, " prompts"], Float[Tensor, " prompts"]]:
    """With all experts, and without the prompt's own."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return energy(logits, temperature), energy(others, temperature)

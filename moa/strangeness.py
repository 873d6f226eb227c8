"""How unlike a mixture's own prompts a prompt is, so that a router can say that none of its experts is for it.

    mahalanobis:  min_i |W (z - m_i)|,  W' W = inverse of the covariance that all tasks share
    energy:       -T logsumexp_i(f_i / T)
    both:         the larger of the two, each less its median on own held-out prompts, over how far above they reach;
                  above 1 it is beyond what all but half of the promised share of own prompts reach, in either score

A router that knows prompts with and without their templates has two means of each expert, and `both` compares each
prompt with what is typical of its own form, that of the nearest mean: bare prompts differ more among each other.

The distance misses new tasks that are near the known ones, the energy what is like nothing at all; `both` sees both.
z is a pooled, standardised prompt, m_i the mean of the prompts of expert i, f its logits and T their temperature.
Higher is stranger. Lee et al. 2018, arXiv:1807.03888; Liu et al. 2020, arXiv:2010.03759.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Score = Literal["both", "mahalanobis", "energy"]
SINGLE: tuple[Score, ...] = ("mahalanobis", "energy")
"""The scores that `both` is made of."""


@dataclass
class Abstention:
    """From when on a mixture does not trust its experts.

    Attributes:
        score: `both`, `mahalanobis` or `energy`.
        rate: share of the experts' own prompts that may fall back all the same.
        merged_above: stranger prompts run the merged adapter.
        base_above: still stranger ones run the base model.
        typical: of `both`, the median of either score over own held-out prompts, and how far above it they reach; two
            more numbers are those of prompts without their templates.
    """

    score: Score
    rate: float
    merged_above: float
    base_above: float
    typical: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_score(self.score)
        if not 0 < self.rate < 1:
            raise ValueError(f"the rate of own prompts that may fall back lies between 0 and 1, got {self.rate}")
        if not (math.isfinite(self.merged_above) and self.merged_above <= self.base_above < math.inf):
            raise ValueError(
                "prompts fall back to the merged adapter before they fall back to the base model: got thresholds "
                f"merged_above={self.merged_above} and base_above={self.base_above}, fit the router again"
            )
        if self.score == "both" and set(self.typical) != set(SINGLE):
            raise ValueError(
                f"strangeness by both scores needs what is typical of {' and '.join(SINGLE)}, got "
                f"{', '.join(self.typical) or 'nothing'}: fit the router again"
            )
        for name, numbers in self.typical.items():
            if len(numbers) not in (2, 4) or not all(map(math.isfinite, numbers)) or min(numbers[1::2]) <= 0:
                raise ValueError(
                    f"what is typical of {name} is a median and a reach above it, of one form of prompts or of two: "
                    f"got {numbers}, fit the router again"
                )


def check_score(score: str) -> None:
    """Refuse a score that does not exist."""
    if score not in get_args(Score):
        raise ValueError(f"strangeness {score!r} does not exist: choose one of {', '.join(get_args(Score))}")


class Mahalanobis(nn.Module):
    """Distance of a prompt to the nearest expert's mean, in standard deviations of prompts about their own mean.

    The covariance is `directions' diag(variances) directions`, and `floor` in all directions beside them: as it comes
    from a Ledoit-Wolf estimate on fewer prompts than a hidden state is wide.

    Attributes:
        means: of each expert's prompts, standardised.
        plain: the same of prompts without their templates; None where nobody showed them.
        directions: orthonormal.
        variances: along them.
        floor: variance everywhere else.
    """

    means: Float[Tensor, "experts hidden"]
    plain: Float[Tensor, "experts hidden"] | None
    directions: Float[Tensor, "rank hidden"]
    variances: Float[Tensor, " rank"]
    floor: Float[Tensor, ""]

    def __init__(self, experts: int, hidden_size: int, rank: int, *, plain: bool = False):
        super().__init__()
        self.register_buffer("means", torch.zeros(experts, hidden_size))
        self.register_buffer("plain", torch.zeros(experts, hidden_size) if plain else None)
        self.register_buffer("directions", torch.zeros(rank, hidden_size))
        self.register_buffer("variances", torch.ones(rank))
        self.register_buffer("floor", torch.ones(()))

    def forward(self, standardised: Float[Tensor, "batch hidden"]) -> Float[Tensor, " batch"]:
        return self.distances(standardised).amin(dim=-1)

    def distances(self, standardised: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch experts"]:
        """To each expert's mean, or the nearer of its two."""
        return self.by_form(standardised).amin(dim=-1)

    def by_form(self, standardised: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch experts forms"]:
        """To each expert's mean with, and where there is one without, templates."""
        ours = self.whitened(standardised)
        forms = [self.means] if self.plain is None else [self.means, self.plain]
        return torch.stack([_distances(ours, self.whitened(means)) for means in forms], dim=-1)

    def whitened(self, z: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows rank_and_hidden"]:
        """Where Euclidean distances are Mahalanobis distances: along the directions, then what is left of `z`."""
        z, directions = z.float(), self.directions.float()
        along = z @ directions.T
        return torch.cat([along / self.variances.float().sqrt(), (z - along @ directions) / self.floor.sqrt()], dim=-1)


def looks_plain(distances: Float[Tensor, "batch experts forms"]) -> Bool[Tensor, " batch"] | None:
    """Whether the nearest mean is of prompts without templates; None where there are no such means."""
    return None if distances.shape[-1] == 1 else distances.amin(dim=1).argmin(dim=-1) == 1


def _distances(ours: Tensor, means: Tensor) -> Float[Tensor, "batch experts"]:
    return torch.cdist(ours, means, compute_mode="donot_use_mm_for_euclid_dist")  # products would cancel


def fit_mahalanobis(
    standardised: Float[Tensor, "prompts hidden"],
    labels: Int[Tensor, " prompts"],
    experts: int,
    plain: Bool[Tensor, " prompts"] | None = None,
) -> Mahalanobis:
    """Means of each expert's training prompts, and one covariance about them, shrunk as Ledoit and Wolf (2004) do.

    Where no prompt differs from its expert's mean (one prompt each), distances are in standard deviations of all.

    Args:
        labels: index of the expert whose prompt each is; every expert has one.
        plain: which prompts come without their template; an expert without any has one mean.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    z = standardised.detach().double()
    bare = torch.zeros_like(labels, dtype=torch.bool) if plain is None else plain
    means = torch.stack([z[(labels == expert) & ~bare].mean(dim=0) for expert in range(experts)])
    plain_means = means.clone()
    for expert in labels[bare].unique().tolist():
        plain_means[expert] = z[(labels == expert) & bare].mean(dim=0)
    about = z - torch.where(bare[:, None], plain_means[labels], means[labels])
    _, roots, directions = torch.linalg.svd(about, full_matrices=False)
    variances = roots.square() / len(z)
    mean_variance = float(variances.sum()) / z.shape[1]
    shrinkage = float(ledoit_wolf_shrinkage(about.numpy(), assume_centered=True))
    kept = roots > 1e-6 * max(float(roots.max()), 1e-6)
    detector = Mahalanobis(experts, z.shape[1], int(kept.sum()), plain=bool(bare.any()))
    detector.means.copy_(means)
    if detector.plain is not None:
        detector.plain.copy_(plain_means)
    detector.directions.copy_(directions[kept])
    detector.variances.copy_((1 - shrinkage) * variances[kept] + shrinkage * mean_variance)
    detector.floor.fill_(max(shrinkage, 1e-6) * mean_variance if kept.any() else 1.0)
    return detector


def empty_detector(state: Mapping[str, Tensor], prefix: str = "") -> Mahalanobis | None:
    """A detector of the shape that a saved router's state has, to load it into; None where it has none."""
    means, directions = (state.get(f"{prefix}detector.{name}") for name in ("means", "directions"))
    if means is None or directions is None or means.dim() != 2:
        return None
    return Mahalanobis(*means.shape, rank=len(directions), plain=f"{prefix}detector.plain" in state)


def energy(logits: Float[Tensor, "batch experts"], temperature: Float[Tensor, ""]) -> Float[Tensor, " batch"]:
    """-T logsumexp(f / T).

    Args:
        logits: calibrated, f / T.
        temperature: T.
    """
    return -temperature * logits.logsumexp(dim=-1)


def larger(
    scores: Mapping[str, Float[Tensor, " batch"]],
    typical: Mapping[str, Sequence[float]],
    plain: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """The score `both`, from each single one.

    Args:
        plain: which prompts are to be compared with those without templates.
    """
    standardised = []
    for name, (median, reach, *of_plain) in sorted(typical.items()):
        usual = (scores[name] - median) / reach
        if plain is not None and of_plain:
            usual = torch.where(plain, (scores[name] - of_plain[0]) / of_plain[1], usual)
        standardised.append(usual)
    return torch.stack(standardised).amax(dim=0)


def strangeness(
    router: nn.Module,
    limits: Abstention,
    pooled: Float[Tensor, "batch hidden"],
    logits: Float[Tensor, "batch experts"],
) -> Float[Tensor, " batch"]:
    """How strange pooled prompts are to a `SequenceRouter`, which found these calibrated logits for them."""
    if limits.score == "energy":
        return energy(logits, router.temperature)
    by_form = router.detector.by_form(router.standardised(pooled))
    distance = by_form.amin(dim=(1, 2))
    if limits.score == "mahalanobis":
        return distance
    single = {"mahalanobis": distance, "energy": energy(logits, router.temperature)}
    return larger(single, limits.typical, looks_plain(by_form))

"""A router with one expert more or less: a row of its head comes or goes, nothing is trained again.

z is a standardised pooled prompt, m_i the mean of those of expert i, S the covariance about them that all experts
share (`moa.strangeness`). The row of a new expert n is

    centroid head:  f_n(z) = m_n' z - |m_n|^2 / 2
    linear head:    f_n(z) = f(z) + a (g_n(z) - g(z)),    g_i(z) = m_i' S^-1 z - m_i' S^-1 m_i / 2

g_i is the linear discriminant of expert i; f and g without an index are means over the experts that were there. A
trained head differs from discriminants in scale, hence a: by least squares over the m_i, f_i - f = a (g_i - g).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moa.router import SequenceRouter
from moa.strangeness import Mahalanobis

FOLDS = 5  # of a new expert's prompts: each is judged by a row made of the others


def with_expert(
    router: SequenceRouter,
    pooled: Float[Tensor, "prompts hidden"],
    at_depths: Mapping[str, Float[Tensor, "prompts hidden"]] = MappingProxyType({}),
) -> SequenceRouter:
    """The router with one expert more, last, whose prompts have these features; temperature and other rows stay.

    Args:
        at_depths: what each of the router's `others` reads of the prompts.
    """
    mean = router.standardised(pooled).mean(dim=0)
    weight, bias = _row(router, mean)
    grown = copy.deepcopy(router)
    grown.head = _linear(torch.vstack([router.head.weight, weight]), torch.cat([router.head.bias, bias[None]]))
    if router.clusters is not None:
        grown.clusters = [*router.clusters, router.num_experts]
    grown.num_experts += 1
    grown.others = nn.ModuleDict({depth: with_expert(router.others[depth], at) for depth, at in at_depths.items()})
    if router.detector is not None:
        grown.detector = _with_means(router.detector, lambda means: torch.vstack([means, mean]))
    return grown


def without_expert(router: SequenceRouter, index: int) -> SequenceRouter:
    """The router without the rows of one expert."""
    of_rows = router.clusters or list(range(router.num_experts))
    kept = [row for row, expert in enumerate(of_rows) if expert != index]
    shrunk = copy.deepcopy(router)
    last = router.head[-1] if router.head_kind == "mlp" else router.head
    smaller = _linear(last.weight[kept], last.bias[kept])
    if router.head_kind == "mlp":
        shrunk.head[-1] = smaller
    else:
        shrunk.head = smaller
    if router.clusters is not None:
        shrunk.clusters = [of_rows[row] - (of_rows[row] > index) for row in kept]
    shrunk.num_experts -= 1
    shrunk.others = nn.ModuleDict({depth: without_expert(other, index) for depth, other in router.others.items()})
    if router.detector is not None:
        shrunk.detector = _with_means(router.detector, lambda means: means[kept])
    return shrunk


def check_growable(router: SequenceRouter) -> None:
    """Refuse a router whose head cannot gain a row without training."""
    if router.head_kind == "mlp":
        raise ValueError(
            "an mlp head cannot gain a row without training: fit a linear or centroid head with 'moa fit-router', "
            "or fit a router for all experts together"
        )
    if router.head_kind == "linear" and router.detector is None:
        raise ValueError(
            "this linear router was fitted without the means of its prompts, from which a row more follows: "
            "fit it again with 'moa fit-router'"
        )


def _row(router: SequenceRouter, mean: Float[Tensor, " hidden"]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the new expert; see the top of this file."""
    if router.head_kind == "centroid":
        return mean, -mean.square().sum() / 2
    means = router.detector.means.double()
    weights, biases = _discriminants(router.detector, torch.vstack([means, mean]))
    trained = _centred(means @ router.head.weight.double().T + router.head.bias.double())
    ours = _centred(means @ weights[:-1].T + biases[:-1])
    # one expert has nothing to compare with: then discriminants alone tell the two apart
    scale = (trained * ours).sum() / ours.square().sum() if len(means) > 1 else 1.0
    weight = router.head.weight.double().mean(dim=0) + scale * (weights[-1] - weights[:-1].mean(dim=0))
    bias = router.head.bias.double().mean() + scale * (biases[-1] - biases[:-1].mean())
    return weight.float(), bias.float()


def _discriminants(detector: Mahalanobis, means: Float[Tensor, "experts hidden"]) -> tuple[Tensor, Tensor]:
    """S^-1 m_i and -m_i' S^-1 m_i / 2, in fp64."""
    directions, means = detector.directions.double(), means.double()
    along = means @ directions.T
    weights = (along / detector.variances.double()) @ directions + (means - along @ directions) / detector.floor
    return weights, -(weights * means).sum(dim=1) / 2


def _centred(logits: Float[Tensor, "rows experts"]) -> Float[Tensor, "rows experts"]:
    return logits - logits.mean(dim=1, keepdim=True)


def _linear(weight: Float[Tensor, "rows width"], bias: Float[Tensor, " rows"]) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear.requires_grad_(weight.requires_grad)


def _with_means(detector: Mahalanobis, change: Callable[[Tensor], Tensor]) -> Mahalanobis:
    other = copy.deepcopy(detector)
    other.means = change(detector.means).clone()
    if detector.plain is not None:
        other.plain = change(detector.plain).clone()
    return other


def folds(router: SequenceRouter, pooled: Float[Tensor, "prompts hidden"]) -> Iterator[tuple[SequenceRouter, Tensor]]:
    """Routers that have seen the other folds of a new expert's prompts, with the fold that they have not."""
    fold = torch.arange(len(pooled), device=pooled.device) % FOLDS
    for index in range(min(FOLDS, len(pooled))):
        yield with_expert(router, pooled[fold != index]), pooled[fold == index]

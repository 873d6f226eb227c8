"""Spherical merges: a direction between those of the updates, at their mean length.

A sum of updates that have little in common is shorter than each of them. These methods take updates for points on a
sphere, so that directions are averaged, and lengths apart from them. Each result is a sum of the updates whose
coefficients follow from lengths and angles alone: the Gram matrix of the updates is all that is computed of them.

Weights enter all of them in one way: as shares p_i = |w_i| / sum |w|, so that only their ratios matter, and a negative
weight stands for the negated update. An update of zero has no direction: it is left out of the angles, and in the mean
length it counts as zero.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import LowRank, gram
from moa.merging.layers import Layers, whole_gram
from moa.merging.linear import weighted_sum
from moa.merging.registry import Merged, merge_method

Scope = Literal["module", "model"]
PARALLEL = 0.9995
"""Points of a larger cosine, of either sign, lie on no well-defined arc."""
CANCELLED = 1e-6
"""A mean of unit vectors that is shorter than this points where rounding has put it."""
CONVERGED = 1e-7
"""The step, in radians, below which a mean is found; the rounding of a Gram matrix allows little less."""
MOST_STEPS = 200
HAS_A_SHARE = "an update of zero has no direction but a share in the mean length, as a layer left unchanged should"


class Sphere(NamedTuple):
    """Updates as points u_i on the unit sphere; a point between them is given by its coefficients on the u_i.

    Attributes:
        signs: -1 where the weight is negative and the point that of the negated update.
        shares: p, of each adapter in the result; they add up to 1.
        norms: of the updates.
        cosines: <u_i, u_j>; 0 for an update of zero.
    """

    signs: Float[Tensor, " n"]
    shares: Float[Tensor, " n"]
    norms: Float[Tensor, " n"]
    cosines: Float[Tensor, "n n"]

    @classmethod
    def of(cls, updates: Sequence[LowRank], weights: Float[Tensor, " n"], scope: Scope, layers: Layers) -> "Sphere":
        """The sphere of this layer's updates, or that of the whole adapters, which is the same for all layers."""
        G = layers.once(whole_gram) if scope == "model" else gram(updates)
        norms = G.diagonal().clamp(min=0).sqrt()
        to_unit = weights.sign() * inverse(norms)
        cosines = (to_unit[:, None] * G * to_unit).clamp(-1, 1)
        return cls(weights.sign(), weights.abs() / weights.abs().sum(), norms, cosines)

    @property
    def pointing(self) -> Float[Tensor, " n"]:
        """The shares among the updates that have a direction, 0 for the others."""
        shares = self.shares * (self.norms > 0)
        return shares / shares.sum() if shares.any() else shares

    def mean_cosine(self) -> float | None:
        """sum p_i p_j <u_i, u_j> / sum p_i p_j over the pairs; None where there is no pair."""
        pairs = torch.outer(self.pointing, self.pointing).fill_diagonal_(0)
        return float((pairs * self.cosines).sum() / pairs.sum()) if pairs.any() else None

    def length(self, point: Float[Tensor, " n"]) -> float:
        """||sum_i c_i u_i||."""
        return math.sqrt(max(float(point @ self.cosines @ point), 0.0))

    def at_mean_length(self, point: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Coefficients on the updates that give the point, at the length sum_i p_i ||delta_i||."""
        return (self.shares @ self.norms) * point * inverse(self.norms)

    def merged(
        self, updates: Sequence[LowRank], coefficients: Float[Tensor, " n"], rank: int | None, **facts: float
    ) -> Merged:
        """sum_i c_i sgn(w_i) delta_i, with the facts and the mean cosine where there is one."""
        cosine = self.mean_cosine()
        known = {} if cosine is None else {"mean_cosine": cosine}
        return replace(weighted_sum(updates, self.signs * coefficients, rank=rank), facts=known | facts)


@merge_method(
    "slerp",
    paper="https://doi.org/10.1145/325334.325242",
    degree=0,
    breaks={"zero_adapter": HAS_A_SHARE, "duplicates": "it takes two adapters, and with a copy there are three"},
)
def slerp(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    layers: Layers,
    rank: int | None = None,
    scope: Scope = "module",
) -> Merged:
    """Spherical interpolation between two adapters, along the arc from one to the other.

    M = sin((1 - t) theta) / sin(theta) delta_1 + sin(t theta) / sin(theta) delta_2 with theta the angle between
    the two and t = |w_2| / (|w_1| + |w_2|): weights of 0.7 and 0.3 go 0.3 of the way. Lengths are not normalised
    (as in mergekit): the path leads from one length to the other. Where there is no arc,
    M = (1 - t) delta_1 + t delta_2: updates that are parallel or opposite (|cos theta| > 0.9995), or a layer that
    one of them leaves unchanged; the report says so as `lerp`. One adapter, the end of an arc, comes back.

    Args:
        scope: whose angle: that of each layer's updates (module) or that of the whole adapters (model).

    Raises:
        ValueError: more than two adapters.
    """
    if len(updates) > 2:
        raise ValueError(
            f"slerp takes two adapters, got {len(updates)}: use multislerp or karcher, which take any number"
        )
    sphere = Sphere.of(updates, weights, scope, layers)
    cosine = sphere.mean_cosine()
    if cosine is None or abs(cosine) > PARALLEL:
        return sphere.merged(updates, sphere.shares, rank, lerp=1.0)
    theta = math.acos(cosine)
    return sphere.merged(updates, (sphere.shares * theta).sin() / math.sin(theta), rank, lerp=0.0)


@merge_method(
    "multislerp",
    paper="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    degree=0,
    breaks={"zero_adapter": HAS_A_SHARE},
)
def multislerp(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    layers: Layers,
    rank: int | None = None,
    scope: Scope = "module",
) -> Merged:
    """The mean direction of any number of adapters, at their mean length.

    M = sum_i p_i ||delta_i|| m / ||m|| with m = sum_i p_i delta_i / ||delta_i||, so that a long update has no
    more say in the direction than a short one. (As published, the updates are projected to the tangent plane at
    m and averaged there; that average is zero, since m is where their mean is, and the step changes nothing.
    karcher takes the step along the sphere.) Where the directions cancel, M = sum_i p_i delta_i, and the report
    says so as `lerp`.

    Args:
        scope: whose directions: those of each layer's updates (module) or those of the whole adapters (model).
    """
    sphere = Sphere.of(updates, weights, scope, layers)
    length = sphere.length(sphere.pointing)
    if length < CANCELLED:
        return sphere.merged(updates, sphere.shares, rank, lerp=1.0)
    return sphere.merged(updates, sphere.at_mean_length(sphere.pointing / length), rank, lerp=0.0)


@merge_method(
    "karcher",
    paper="https://arxiv.org/abs/2603.04972",
    degree=0,
    breaks={"zero_adapter": HAS_A_SHARE},
)
def karcher(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    layers: Layers,
    rank: int | None = None,
    scope: Scope = "module",
) -> Merged:
    """The Riemannian mean of the directions of any number of adapters, at their mean length.

    M = sum_i p_i ||delta_i|| m, with m the point of the sphere that minimises sum_i p_i angle(m, delta_i)^2.
    For two adapters of one length, slerp. The report has the mean cosine, and as `residual` how far, in radians,
    the last step still went: next to nothing, unless updates point away from each other. Where the directions
    cancel, no mean is nearer than others: M = sum_i p_i delta_i, and the report says so as `lerp`.

    Args:
        scope: whose directions: those of each layer's updates (module) or those of the whole adapters (model).
    """
    sphere = Sphere.of(updates, weights, scope, layers)
    length = sphere.length(sphere.pointing)
    if length < CANCELLED:
        return sphere.merged(updates, sphere.shares, rank, lerp=1.0)
    mean, residual = riemannian_mean(sphere, sphere.pointing / length)
    return sphere.merged(updates, sphere.at_mean_length(mean), rank, lerp=0.0, residual=residual)


def riemannian_mean(sphere: Sphere, start: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], float]:
    """The point m where the arcs to all points, weighted by their shares, add up to nothing, and the last step.

    Each step goes there as seen from m: T = sum_i p_i log_m(u_i), m <- exp_m(T), in coefficients on the u_i.
    """
    m, step = start, math.inf
    for _ in range(MOST_STEPS):
        cosines = (sphere.cosines @ m).clamp(-1, 1)
        theta = cosines.acos()
        # a point at m, or opposite to it, pulls nowhere
        pull = sphere.pointing * torch.where(theta.sin() < CONVERGED, 1.0, theta / theta.sin())
        T = pull - (pull @ cosines) * m
        step = sphere.length(T)
        if step < CONVERGED:
            break
        m = math.cos(step) * m + math.sin(step) / step * T
        m = m / sphere.length(m)
    return m, step


@merge_method(
    "model_stock",
    paper="https://arxiv.org/abs/2403.19522",
    degree=0,
    breaks={
        "zero_adapter": HAS_A_SHARE,
        "duplicates": "an adapter agrees with its copy, which raises c",
    },
)
def model_stock(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    layers: Layers,
    rank: int | None = None,
    scope: Scope = "module",
) -> Merged:
    """The mean of the adapters, shrunk to what they agree on. Made for runs of one task, not for different skills.

    M = t sum_i p_i delta_i with t = n c / (1 + (n - 1) c), kept within [0, 1]: c is the mean cosine between the
    updates and n = 1 / sum p_i^2 their number (N for equal weights, as published; weights other than equal count as
    fewer adapters). If each update is one common signal and noise of its own, this is the point nearest to
    the signal. Adapters of different tasks are nearly orthogonal, so c and t are nearly 0 and NEARLY EVERYTHING IS
    ERASED: look at `t` in the report, and use restore_norm or another method if it is small.

    Args:
        scope: whose cosines: those of each layer's updates (module) or those of the whole adapters (model).
    """
    sphere = Sphere.of(updates, weights, scope, layers)
    cosine = sphere.mean_cosine()
    if cosine is None:
        return sphere.merged(updates, sphere.shares, rank, t=1.0)
    c, n = max(cosine, 0.0), 1 / float(sphere.pointing.square().sum())
    t = n * c / (1 + (n - 1) * c)
    return sphere.merged(updates, t * sphere.shares, rank, t=t)


def inverse(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """1 / x, and 0 where x is 0."""
    return torch.where(x == 0, 0.0, 1 / x)

"""How far a merge can be trusted: what each adapter contributes, which inputs any adapter knows, how weights spread.

from moa.merging.uncertainty import jackknife
jackknife(["adapters/sst2", "adapters/mnli", "adapters/squad"], "ties", density=0.3)   # {"sst2": 0.41, ...}
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moa.adapters import Adapter
from moa.errors import nearest
from moa.low_rank import NUMERICAL_RANK_TOLERANCE, LowRank, stack
from moa.merging.api import merge
from moa.merging.checks import check_same_base, checked_weights, common_shapes, layer_ranks, read_all
from moa.merging.layers import Layers, whole_gram
from moa.merging.registry import MergeMethod, find_method

LINEAR = ("average", "concatenation", "weighted_sum")
"""Methods whose result is a sum of the updates with coefficients that the weights alone decide."""
CANCELLED = 1e-7
"""A merge smaller than this share of what an adapter changes is zero, as far as a Gram matrix can tell."""


def jackknife(
    adapters: Sequence[str | Path | Adapter],
    method: str = "svd",
    weights: Sequence[float] | None = None,
    **options: Any,
) -> dict[str, float]:
    """How much of a merge rests on each adapter: ||M - M_(-i)|| / ||M||, over the updates of all layers.

    M_(-i) is the merge without adapter i, the other weights unchanged. 0 means that the adapter might as well be
    absent, and 1 that the change is as large as the merge. For sums and averages it follows from the Gram matrix of
    the adapters; any other method is run once more for each adapter.

    Args:
        adapters, method, weights: as in `merge`.
        options: all else that `merge` takes, and the method's own. A rank that the others do not hold without
            adapter i is as many as they do.

    Raises:
        ValueError: fewer than two adapters with a weight, a merge that is zero, adapters that hold more than updates
            of linear layers, and what `merge` refuses.
    """
    sources = read_all(adapters)
    w = torch.tensor(checked_weights(weights, len(sources)), dtype=torch.float64)
    if (count := int(w.count_nonzero())) < 2:
        raise ValueError(f"jackknife leaves one adapter out, so at least two must have a weight, got {count}")
    chosen = find_method(method)
    if chosen.name in LINEAR and not options:
        size, changes = _changes_by_gram(sources, chosen, w)
    else:
        size, changes = _changes_by_merging(sources, chosen, w, options)
    if size <= CANCELLED * max(changes):
        raise ValueError(f"the adapters cancel to a {chosen.name} of zero, in which none of them can have a share")
    return {source.name: change / size for source, change in zip(sources, changes, strict=True)}


def _changes_by_gram(
    sources: Sequence[Adapter], method: MergeMethod, weights: Float[Tensor, " n"]
) -> tuple[float, list[float]]:
    """||M|| and all ||M - M_(-i)||, where M = sum c_i delta_i: ||sum c_i delta_i||^2 = c^T G c."""
    check_same_base(sources)
    G = whole_gram(Layers(sources, weights, common_shapes(sources)))

    def norm(c: Tensor) -> float:
        return math.sqrt(max(float(c @ G @ c), 0.0))

    c = coefficients(method, weights)
    return norm(c), [norm(c - coefficients(method, without)) for without in _each_left_out(weights)]


def coefficients(method: MergeMethod, weights: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """c in M = sum_i c_i delta_i of a linear method: what it makes of updates that are unit vectors."""
    there = weights.nonzero().flatten()
    unit_rows = torch.eye(len(weights), dtype=weights.dtype)[there, None]
    units = [LowRank(weights.new_ones(1, 1), row) for row in unit_rows]
    return method.function(units, weights[there]).update.delta()[0]


def _changes_by_merging(
    sources: Sequence[Adapter], method: MergeMethod, weights: Float[Tensor, " n"], options: Mapping[str, Any]
) -> tuple[float, list[float]]:
    """||M|| and all ||M - M_(-i)||, by merging without each adapter."""

    def merged(weights: Float[Tensor, " n"], options: Mapping[str, Any]) -> dict[str, LowRank]:
        return merge(sources, method.name, weights=weights.tolist(), dtype=torch.float64, **options).modules

    whole = merged(weights, options)
    changes = []
    for without in _each_left_out(weights):
        left = [source for source, w in zip(sources, without.tolist(), strict=True) if w]
        changes.append(_distance(whole, merged(without, _within_rank(options, method, left))))
    return _distance(whole, {}), changes


def _each_left_out(weights: Float[Tensor, " n"]) -> Float[Tensor, "n n"]:
    return weights.repeat(len(weights), 1).fill_diagonal_(0.0)


def _within_rank(options: Mapping[str, Any], method: MergeMethod, left: Sequence[Adapter]) -> Mapping[str, Any]:
    """The options with a rank that these adapters can have."""
    if not isinstance(options.get("rank"), int):
        return options
    most = layer_ranks("full", method, left, common_shapes(left))
    return {**options, "rank": min(options["rank"], max(most.values()))}


def _distance(merged: Mapping[str, LowRank], other: Mapping[str, LowRank]) -> float:
    """Of two sets of layers, the second of which may lack some, where it is zero."""
    parts = (stack([update, other[m].scaled(-1.0)]) if m in other else update for m, update in merged.items())
    return math.sqrt(sum(part.norm() ** 2 for part in parts))


class Support(NamedTuple):
    """How much of each input no adapter reads, from 0 (all of it is read) to 1 (none is).

    Attributes:
        each: adapter name to [tokens].
        together: [tokens], what none of the adapters reads.
    """

    each: dict[str, Float[Tensor, " tokens"]]
    together: Float[Tensor, " tokens"]


def support(adapters: Sequence[str | Path | Adapter], module: str, x: Float[Tensor, "tokens n"]) -> Support:
    """How little the adapters see of the inputs x of a layer: sqrt(1 - ||Q^T x||^2 / ||x||^2).

    The columns of Q span the inputs to which an adapter responds, or any of them. An input of score 1 passes
    through every merge of these adapters unchanged: whatever was learned says nothing about it. Adapters that
    lack the layer, and inputs of zero, have score 1.

    Raises:
        ValueError: a layer that none of the adapters changes, or inputs of another size.
    """
    sources = read_all(adapters)
    shapes = common_shapes(sources)
    if module not in shapes:
        raise ValueError(f"none of the adapters changes a layer {module!r}{nearest(module, shapes)}")
    size = shapes[module][1]
    if x.ndim != 2 or x.shape[1] != size:
        raise ValueError(f"inputs of {module!r} are [tokens, {size}], got {list(x.shape)}")
    x = x.to(torch.float64)
    updates = {s.name: s.modules[module].to(torch.float64) for s in sources if module in s.modules}
    rows = {name: row_space(update.truncated()[0].A) for name, update in updates.items()}
    nothing = x.new_zeros(0, size)
    each = {source.name: _unread(x, rows.get(source.name, nothing)) for source in sources}
    return Support(each, _unread(x, row_space(torch.cat(list(rows.values())))))


def row_space(rows: Float[Tensor, "r n"]) -> Float[Tensor, "k n"]:
    """An orthonormal basis of what the rows span."""
    _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    return Vh[NUMERICAL_RANK_TOLERANCE * S.max() < S] if S.numel() else rows


def _unread(x: Float[Tensor, "tokens n"], basis: Float[Tensor, "k n"]) -> Float[Tensor, " tokens"]:
    size = x.norm(dim=1)
    rest = (x - (x @ basis.T) @ basis).norm(dim=1)
    return torch.where(size > 0, rest / size, 1.0).clamp(max=1.0)


class OutputSpread(NamedTuple):
    """Mean and variance of what a merge adds to a layer's outputs.

    Attributes:
        mean: [tokens, o].
        variance: [tokens, o], of each output by itself.
    """

    mean: Float[Tensor, "tokens o"]
    variance: Float[Tensor, "tokens o"]


def output_variance(
    updates: Sequence[LowRank],
    weights_mean: Float[Tensor, " N"],
    covariance: Float[Tensor, "N N"],
    x: Float[Tensor, "tokens n"],
) -> OutputSpread:
    """What uncertain weights do to the output of a merged layer.

    With w of mean mu and covariance Sigma, M x = sum_i w_i delta_i x has mean Z mu and variance
    diag(Z Sigma Z^T), where Z = [delta_1 x .. delta_N x] is [o, N] for each token.

    Raises:
        ValueError: sizes that do not match, or a matrix that is no covariance.
    """
    n = len(updates)
    if weights_mean.shape != (n,) or covariance.shape != (n, n):
        raise ValueError(
            f"{n} updates need a mean [{n}] and a covariance [{n}, {n}] of their weights, "
            f"got {list(weights_mean.shape)} and {list(covariance.shape)}"
        )
    root = _root(covariance.to(torch.float64))
    x = x.to(torch.float64)
    Z = torch.stack([(x @ u.A.to(x).T) @ u.B.to(x).T for u in updates])
    mean = torch.einsum("i,ito->to", weights_mean.to(x), Z)
    return OutputSpread(mean, torch.einsum("ik,ito->kto", root, Z).square().sum(dim=0))


def _root(covariance: Float[Tensor, "N N"]) -> Float[Tensor, "N N"]:
    """L with L L^T = Sigma; of its columns, some may be zero."""
    values, vectors = torch.linalg.eigh(covariance)
    if not torch.allclose(covariance, covariance.T) or values.min() < -1e-8 * values.abs().max():
        raise ValueError("a covariance is symmetric and has no negative eigenvalue, which this one is not or has")
    return vectors * values.clamp(min=0).sqrt()

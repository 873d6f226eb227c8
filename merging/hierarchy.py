"""Hierarchical merging: the most similar adapters first, by any method, along one tree for the whole model.

How similar adapters are is seen from their factors alone, over all layers together, so that every layer is merged in
the same order. A cluster stands in the tree as the merge of its members at a total weight of one, beside the weight
that they have together.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import LowRank, stack
from moa.merging.layers import Layers, whole_gram
from moa.merging.registry import Merged, MergeMethod, find_method, merge_method, option_from_text

Linkage = Literal["average", "ward", "complete", "single"]
Distance = Literal["cosine", "subspace"]


class Fusion(NamedTuple):
    """Two clusters that become one.

    Attributes:
        left: names of the adapters in one cluster.
        right: names of those in the other.
        height: the distance between the two by the linkage.
    """

    left: tuple[str, ...]
    right: tuple[str, ...]
    height: float


class Cluster(NamedTuple):
    """Adapters merged so far, in one layer.

    Attributes:
        update: their merge at a total weight of one.
        weight: what they weigh together, sum |w_i|.
        seed: for methods that draw random numbers; whatever the order of the members.
        dropped: energy that ranks have cost in here, at the weight of one.
    """

    update: LowRank
    weight: float
    seed: int
    dropped: float = 0.0


def check_node(node: str) -> None:
    """Refuse a node that is no method, or has options that it cannot have."""
    Node.parse(node)


@merge_method(
    "hierarchical",
    check=check_node,
    breaks={
        "duplicates": "an adapter and its copy are merged by the node, before all others",
        "rotation": "as ties, the default node: it acts on entries",
        "span": "as ties, the default node: it acts on entries",
    },
)
def hierarchical(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    layers: Layers,
    module: str,
    seed: int,
    seeds: Sequence[int],
    rank: int | None = None,
    node: str = "ties",
    linkage: Linkage = "average",
    distance: Distance = "cosine",
    groups: int = 1,
) -> Merged:
    """Merges the two most similar clusters of adapters, again and again, each time by a method of your choice.

    The tree is agglomerative, over distances between whole adapters, and all layers follow it; the report has its
    fusions and their heights. An adapter enters as sgn(w_i) delta_i of weight |w_i|; clusters of weights W_a and
    W_b become node(M_a, M_b) with weights W_a / (W_a + W_b) and W_b / (W_a + W_b), and weigh W_a + W_b together.
    The result is M = sum_g W_g M_g over the groups that are left. So weights multiply along the tree, and with a
    linear node any tree gives the weighted sum of all adapters. A rank is that of the last merge in each group
    and of the sum; merges below have the node's own. An adapter that leaves a layer unchanged has no part in it.

    Args:
        node: the method that merges two clusters, with options if wanted, as in ties, slerp, "ties density=0.4".
        linkage: which distance between adapters is that between clusters: the mean (average), the largest
            (complete), the smallest (single), or the increase in variance (ward).
        distance: between adapters: 1 - cos of their updates (cosine), or the chordal distance of the subspaces
            that they read and write (subspace), to which sizes and signs do not matter.
        groups: where to cut the tree: merge by the node down to so many groups, and add these up.

    Raises:
        ValueError: an unknown node, one that needs more than the updates of a layer, or more groups than adapters.
    """
    merger = Node.parse(node)
    fusions = cut(layers.once(tree, linkage, distance), groups)
    fused_again = {side for fusion in fusions for side in (fusion.left, fusion.right)}
    clusters = leaves(layers.names, updates, weights, seeds)
    for left, right, _ in fusions:
        parts = [clusters.pop(side) for side in (left, right) if side in clusters]
        if len(parts) == 2:
            asked = None if left + right in fused_again else rank
            clusters[left + right] = merger.fuse(*parts, rank=asked, seed=seed, module=module, layers=layers)
        elif parts:  # the other side leaves this layer unchanged
            clusters[left + right] = parts[0]
    merged = weighted_clusters(clusters.values(), updates[0].shape, rank)
    heights = {f"distance from {'+'.join(left)} to {'+'.join(right)}": height for left, right, height in fusions}
    return replace(merged, facts=heights)


def leaves(
    names: Sequence[str], updates: Sequence[LowRank], weights: Float[Tensor, " n"], seeds: Sequence[int]
) -> dict[tuple[str, ...], Cluster]:
    """One cluster for each adapter that changes the layer; a negative weight goes into its update."""
    return {
        (name,): Cluster(update.scaled(1.0 if w > 0 else -1.0), abs(w), seed)
        for name, update, w, seed in zip(names, updates, weights.tolist(), seeds, strict=True)
        if update.norm() > 0
    }


def weighted_clusters(clusters: Collection[Cluster], shape: tuple[int, int], rank: int | None) -> Merged:
    """sum_g W_g M_g, at its numerical rank or the rank asked for; a cluster alone keeps the form it has."""
    whole = stack([LowRank.zero(shape, torch.float64), *(c.update.scaled(c.weight) for c in clusters)])
    inside = sum(c.weight**2 * c.dropped for c in clusters)
    if len(clusters) == 1 and (rank is None or whole.rank <= rank):
        return Merged(whole, inside)
    update, dropped = whole.truncated(rank)
    return Merged(update, dropped + inside)


@dataclass(frozen=True)
class Node:
    """What merges two clusters: a method and its options."""

    method: MergeMethod
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Node":
        """Read "ties density=0.4".

        Raises:
            ValueError: no such method or option, or a method that cannot merge two clusters in one layer.
            TypeError: an option of another type.
        """
        name, *settings = text.split() or [""]
        method, options = find_method(name), {}
        for setting in settings:
            option, equals, value = setting.partition("=")
            if not equals:
                raise ValueError(
                    f"options of a node are written as in 'ties density=0.4', got {setting!r} in {text!r}"
                )
            options[option] = option_from_text(method, option, value)
        options = method.check_options(options)
        if reason := _unfit(method, options):
            raise ValueError(f"{text!r} cannot be a node, because {reason}: take another, such as ties, slerp or svd")
        return cls(method, options)

    def fuse(self, a: Cluster, b: Cluster, **given: Any) -> Cluster:
        """The cluster of both, by the method."""
        weight = a.weight + b.weight
        shares = torch.tensor([a.weight / weight, b.weight / weight], dtype=torch.float64)
        given = self.method.given(seeds=[a.seed, b.seed], **given)
        merged = self.method.function([a.update, b.update], shares, **given, **self.options)
        inside = (a.weight / weight) ** 2 * a.dropped + (b.weight / weight) ** 2 * b.dropped
        return Cluster(merged.update, weight, a.seed ^ b.seed, merged.dropped + inside)


def _unfit(method: MergeMethod, options: Mapping[str, Any]) -> str | None:
    """Why the method cannot merge two clusters in one layer, if so."""
    if method.needs:
        return f"it needs {' and '.join(method.needs)}, and a merged cluster has none of its own"
    if "layers" in method.parameters and options.get("scope") != "module":
        return "it decides over the whole model, and a node merges two clusters in one layer"
    return None


def tree(layers: Layers, linkage: Linkage = "average", distance: Distance = "cosine") -> list[Fusion]:
    """Which adapters are most alike: from each alone to all in one cluster, nearest first.

    The distance of two adapters is 1 - cos of their whole updates, negated where the weight is negative; Ward's
    linkage, which is about squared distances, takes that of the unit updates, sqrt(2 - 2 cos). Or it is the chordal
    distance sqrt((r_a + r_b) / 2 - sum_k cos^2 theta_k) of subspaces, theta their principal angles, as the root mean
    square over the inputs and outputs of all layers. Adapters that change nothing are not in the tree.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    D = cosine_distances(layers, linkage) if distance == "cosine" else subspace_distances(layers)
    there = (layers.once(whole_gram).diagonal() > 0).nonzero().flatten()
    if len(there) < 2:
        return []
    clusters = [(layers.names[i],) for i in there]
    fusions = []
    condensed = squareform(D[there][:, there].numpy(), checks=False)
    for left, right, height, _ in hierarchy.linkage(condensed, linkage):
        fusions.append(Fusion(clusters[int(left)], clusters[int(right)], float(height)))
        clusters.append(fusions[-1].left + fusions[-1].right)
    return fusions


def cut(fusions: Sequence[Fusion], groups: int) -> Sequence[Fusion]:
    """The fusions that leave so many groups."""
    adapters = len(fusions) + 1
    if not 1 <= groups <= adapters:
        raise ValueError(f"groups must be from 1 to {adapters}, the adapters that change anything, got {groups}")
    return fusions[: adapters - groups]


def cosine_distances(layers: Layers, linkage: Linkage) -> Float[Tensor, "n n"]:
    """1 - cos between whole updates, sqrt(2 - 2 cos) for Ward's linkage; NaN for an adapter that changes nothing."""
    G = layers.once(whole_gram)
    to_unit = layers.weights.sign() / G.diagonal().sqrt()
    distances = (1 - to_unit[:, None] * G * to_unit).clamp(min=0).fill_diagonal_(0)
    return (2 * distances).sqrt() if linkage == "ward" else distances


def subspace_distances(layers: Layers) -> Float[Tensor, "n n"]:
    """Chordal distances of what adapters read and write, the root mean square over layers."""
    overlaps = torch.zeros(len(layers.names), len(layers.names), dtype=torch.float64)
    for _, updates in layers.streamed("comparing subspaces"):
        for bases in zip(*map(directions, updates), strict=True):
            overlaps += torch.stack([torch.stack([(P.T @ Q).square().sum() for Q in bases]) for P in bases])
    ranks = overlaps.diagonal()
    squared = ((ranks[:, None] + ranks) / 2 - overlaps).clamp(min=0).fill_diagonal_(0)
    return (squared / (2 * len(layers))).sqrt()


def directions(update: LowRank) -> tuple[Float[Tensor, "o r"], Float[Tensor, "n r"]]:
    """Orthonormal bases of what the update writes and of what it reads."""
    whole, _ = update.truncated()
    scale = whole.A.norm(dim=1).clamp(min=torch.finfo(whole.A.dtype).tiny)
    return whole.B / scale, (whole.A / scale[:, None]).T

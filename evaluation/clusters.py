"""Which adapters belong together, from their updates and from their answers, and who shares an adapter at each budget.

Two adapters agree as much as the mean of

    cosine of their updates                                  what a merge adds up: 1 the same, 0 unrelated, -1 opposite
    (L_base(t) - L_other(t)) / (L_base(t) - L_own(t))        share of one's gain on its own task t that the other has

with L(t) the negative log-likelihood of answers to validation rows of t; the share is that of both ways, averaged, and
kept between -1 and 1. Both are 1 where two adapters are the same and 0 where they have nothing in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moa.adapters import Adapter
from moa.merging.checks import common_shapes
from moa.merging.geometry import tree
from moa.merging.hierarchy import cosine_distances
from moa.merging.layers import Layers

NAMED = 3  # members that a cluster's name has at most


@dataclass(frozen=True)
class Composition:
    """Who shares an adapter with whom, at one budget.

    Attributes:
        clusters: names of the members of each, in the experts' order; the clusters in that of their first members.
    """

    clusters: tuple[tuple[str, ...], ...]

    @property
    def budget(self) -> int:
        """How many adapters are left."""
        return len(self.clusters)

    @property
    def names(self) -> tuple[str, ...]:
        """What the clusters' adapters are called: an expert alone keeps its name."""
        return tuple(map(cluster_name, self.clusters))

    def cluster_of(self, experts: Sequence[str]) -> list[int]:
        """Index of the cluster that holds each expert."""
        return [next(i for i, members in enumerate(self.clusters) if name in members) for name in experts]


def cluster_name(members: Sequence[str]) -> str:
    """sst2-squad; of more than three members sst2-and-4-more, which no other cluster of one tree is called."""
    return "-".join(members) if len(members) <= NAMED else f"{members[0]}-and-{len(members) - 1}-more"


def cosines(adapters: Sequence[Adapter]) -> Float[Tensor, "n n"]:
    """Of whole updates, over all layers together, from the factors alone; NaN of an adapter that changes nothing."""
    layers = Layers(adapters, torch.ones(len(adapters), dtype=torch.float64), common_shapes(adapters))
    return 1 - cosine_distances(layers, "average")


def gains_kept(
    nll: Float[Tensor, "experts tasks"], base: Float[Tensor, " tasks"], own: Sequence[int | None]
) -> Float[Tensor, "experts experts"]:
    """Row i, column j: the share of expert j's gain over the base model, on its own task, that expert i has there.

    NaN in the column of an expert whose task was not measured, or on which it is no better than the base model.

    Args:
        nll: of each expert's answers to each task.
        base: of the base model's.
        own: index of each expert's own task, None where it is not among them.
    """
    shares = torch.full((len(own), len(own)), torch.nan, dtype=torch.float64)
    for expert, task in enumerate(own):
        if task is not None and nll[expert, task] < base[task]:
            shares[:, expert] = (base[task] - nll[:, task]) / (base[task] - nll[expert, task])
    return shares.clamp(-1, 1)


def agreement(
    cosines: Float[Tensor, "n n"], gains: Float[Tensor, "n n"], geometry_share: float = 0.5
) -> Float[Tensor, "n n"]:
    """geometry_share * cosine + (1 - geometry_share) * share of the gain, averaged over both ways.

    A pair of which no gain is known has its cosine alone; an adapter that changes nothing agrees with none.
    """
    both_ways = torch.stack([gains, gains.T]).nanmean(dim=0)
    cosines = cosines.nan_to_num(0.0)
    return torch.where(both_ways.isnan(), cosines, geometry_share * cosines + (1 - geometry_share) * both_ways)


def compositions(
    names: Sequence[str], agreement: Float[Tensor, "n n"], budgets: Sequence[int]
) -> dict[int, Composition]:
    """One tree, by average linkage over 1 - agreement, cut at every budget: clusters of a smaller one hold whole ones.

    Args:
        budgets: numbers of adapters, from 1 to all.

    Raises:
        ValueError: a cluster that would be called as an expert is, or as another cluster.
    """
    fusions = tree(agreement)[:, :2].astype(int).tolist()
    composed = {budget: _composition(names, fusions[: len(names) - budget]) for budget in sorted(set(budgets))}
    clusters = {members for of in composed.values() for members in of.clusters}
    called = {name: (name,) for name in names}
    for members in sorted(clusters):
        other = called.setdefault(cluster_name(members), members)
        if other != members:
            raise ValueError(
                f"the merge of {', '.join(members)} would be called {cluster_name(members)!r}, and so is "
                f"{'an expert' if len(other) == 1 else 'that of ' + ', '.join(other)}: give the experts other names"
            )
    return composed


def _composition(names: Sequence[str], fusions: Sequence[Sequence[int]]) -> Composition:
    """What these fusions leave; as scipy has it, the k-th of n adapters makes cluster n + k."""
    clusters = {place: [place] for place in range(len(names))}
    for step, (left, right) in enumerate(fusions):
        clusters[len(names) + step] = clusters.pop(left) + clusters.pop(right)
    return Composition(
        tuple(tuple(names[place] for place in sorted(of)) for of in sorted(map(sorted, clusters.values())))
    )

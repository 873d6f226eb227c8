"""The adapters of a merge, their weights, and what those that are merged have in common."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from moa.adapters import Adapter, Kind
from moa.merging.checks import common_kinds, common_shapes


@dataclass(frozen=True)
class Members:
    """The adapters of a merge.

    Attributes:
        sources: all of them.
        weights: one for each.
    """

    sources: list[Adapter]
    weights: list[float]

    @cached_property
    def places(self) -> list[int]:
        """Where those with a weight other than 0 stand; these alone are merged."""
        return [place for place, weight in enumerate(self.weights) if weight != 0]

    @cached_property
    def merging(self) -> list[Adapter]:
        """Those that are merged."""
        return [self.sources[place] for place in self.places]

    @cached_property
    def used(self) -> Float[Tensor, " n"]:
        """Their weights."""
        return torch.tensor([self.weights[place] for place in self.places], dtype=torch.float64)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Every layer that one of them changes, with the size of its matrix."""
        return common_shapes(self.merging)

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """The kinds of their layers that are not linear."""
        return common_kinds(self.merging)

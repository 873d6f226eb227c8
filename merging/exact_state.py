"""A merge state that keeps all: every member's updates, in bases that they share."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moa.adapters import Adapter
from moa.low_rank import LowRank
from moa.merging.api import MergeResult, merge
from moa.merging.kept_layers import Layers
from moa.merging.kept_members import Member
from moa.merging.layers import Progress
from moa.merging.merge_state import MergeState
from moa.merging.shared_bases import SharedBases


class ExactState(MergeState):
    """All members in shared bases."""

    kind = "exact"

    def merged(self, method: str = "svd", **options: Any) -> MergeResult:
        """See `MergeState.merged`."""
        members, weights = [self.adapter(name) for name in self.members], list(self.weights.values())
        return merge(members, method, weights=weights, **{"check_base": self.check_base, **options})

    def _reader(self, member: Member) -> Callable[[str, torch.dtype], LowRank]:
        layers = self.layers  # as they are now: a change makes others
        return lambda module, dtype: layers[module].update(member.name).to(dtype)

    def _moved(
        self, layers: Layers, adapter: Adapter, before: float | None, after: float | None, progress: Progress
    ) -> Layers:
        layers = dict(layers)
        for module in progress(list(adapter.shapes), f"storing {adapter.name}") if None in (before, after) else ():
            if before is None:
                update = adapter.modules[module]
                layers[module] = layers.get(module, SharedBases.empty(update.shape)).plus(adapter.name, update)
            else:
                layers[module] = layers[module].minus(adapter.name)
        return layers

    def _scaled(self, factor: float) -> Layers:
        return self.layers  # weights are not in them

    def _packed(self) -> dict[str, Tensor]:
        tensors = {}
        for module, layer in self.layers.items():
            tensors |= {f"{module}.writes": layer.writes, f"{module}.reads": layer.reads}
            for index, name in enumerate(self.members):
                if name in layer.coordinates:
                    own = layer.coordinates[name]
                    tensors |= {f"{module}.{index}.B": own.B, f"{module}.{index}.A": own.A}
        return tensors

    @classmethod
    def _unpacked(cls, members: Mapping[str, Member], tensors: Mapping[str, Tensor]) -> Layers:
        coordinates: dict[str, dict[str, LowRank]] = {}
        for index, (name, member) in enumerate(members.items()):
            for module in member.ranks:
                own = LowRank(tensors[f"{module}.{index}.B"], tensors[f"{module}.{index}.A"])
                coordinates.setdefault(module, {})[name] = own
        return {m: SharedBases(tensors[f"{m}.writes"], tensors[f"{m}.reads"], own) for m, own in coordinates.items()}

"""What a kind of merge state keeps of each layer: the part in which the kinds differ."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from moa.adapters import Adapter
from moa.errors import nearest
from moa.low_rank import LowRank
from moa.merging.kept_members import Member
from moa.merging.layers import Progress

Layers = dict[str, Any]
"""Layer name to what a kind of state keeps of it."""


class KeptLayers(ABC):
    """Layers that members can be moved into, out of and within, and that can be stored.

    Attributes:
        kind: the name by which users ask for it.
        takes: what it is created with beside adapters and weights.
    """

    kind: ClassVar[str]
    takes: ClassVar[tuple[str, ...]] = ()
    _by_kind: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls):
        if "kind" in vars(cls):
            KeptLayers._by_kind[cls.kind] = cls

    @staticmethod
    def of_kind(name: str) -> type:
        """The class of that kind; a ValueError lists the kinds."""
        kinds = KeptLayers._by_kind
        if name not in kinds:
            raise ValueError(f"a merge state is {' or '.join(sorted(kinds))}, got {name!r}{nearest(name, kinds)}")
        return kinds[name]

    @classmethod
    def check_taken(cls, **given: Any) -> None:
        """A ValueError for what another kind takes."""
        for name, value in given.items():
            if value is not None and name not in cls.takes:
                (other,) = (kind for kind, of in KeptLayers._by_kind.items() if name in of.takes)
                what = f"a state of kind {cls.kind!r} takes no {name}, got {value!r}"
                raise ValueError(f"{what}: leave it out, or create one of kind {other!r}")

    @abstractmethod
    def _reader(self, member: Member) -> Callable[[str, torch.dtype], LowRank]:
        """What gives a member's update of a layer in a dtype."""

    @abstractmethod
    def _moved(
        self, layers: Layers, adapter: Adapter, before: float | None, after: float | None, progress: Progress
    ) -> Layers:
        """The layers after a member's factor has changed; None for not being there."""

    @abstractmethod
    def _scaled(self, factor: float) -> Layers:
        """The layers when all factors are multiplied by one."""

    @abstractmethod
    def _packed(self) -> dict[str, Tensor]:
        """The layers as named tensors."""

    @classmethod
    @abstractmethod
    def _unpacked(cls, members: Mapping[str, Member], tensors: Mapping[str, Tensor]) -> Layers:
        """The layers of named tensors."""

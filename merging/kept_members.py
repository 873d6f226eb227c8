"""Who is in a merge that is kept, and with which weight."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moa.adapters import Adapter, AdapterError, Kind, LazyUpdates, Shape
from moa.errors import nearest
from moa.low_rank import LowRank
from moa.merging.checks import LARGEST_WEIGHT, check_same_base, common_kinds, common_shapes
from moa.merging.report import Source


@dataclass(frozen=True)
class Member:
    """What a state knows of an adapter beside its updates.

    Attributes:
        weight: its weight, None where every member has 1/N.
        path: the folder it was read from, None for an adapter of a live model.
        sha256, config_sha256: hashes of its weights file and its config's meaning when it was added.
        ranks: layer name to rank.
        kinds: of the layers that are not linear.
    """

    name: str
    weight: float | None
    path: str | None
    sha256: str | None
    config_sha256: str | None
    initial_sha256: str | None
    base_model: str | None
    revision: str | None
    task_type: str | None
    dtype: str
    ranks: dict[str, int]
    kinds: dict[str, Kind]

    @classmethod
    def of(cls, adapter: Adapter, weight: float | None) -> "Member":
        """What is to be known of an adapter."""
        return cls(
            name=adapter.name,
            weight=weight,
            path=str(adapter.path.resolve()) if adapter.path else None,
            sha256=adapter.sha256,
            config_sha256=adapter.config_sha256,
            initial_sha256=adapter.initial_sha256,
            base_model=adapter.base_model,
            revision=adapter.config.get("revision"),
            task_type=adapter.config.get("task_type"),
            dtype=str(adapter.dtype).removeprefix("torch."),
            ranks={module: shape.r for module, shape in adapter.shapes.items()},
            kinds=dict(adapter.kinds),
        )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Member":
        """A member as `dataclasses.asdict` wrote it."""
        kinds = {module: Kind(kind["name"], tuple(kind["kernel"])) for module, kind in stored["kinds"].items()}
        return cls(**{**stored, "kinds": kinds})

    @property
    def factor(self) -> float:
        """What its update counts in a running sum."""
        return 1.0 if self.weight is None else self.weight

    def adapter(
        self, sizes: Mapping[str, tuple[int, int]], read: Callable[[str, torch.dtype], LowRank]
    ) -> "KeptAdapter":
        """The member as an adapter, float64.

        Args:
            sizes: layer name to the shape [o, n] of its matrix.
            read: gives its update of a layer in a dtype.
        """
        shapes = {module: Shape(sizes[module][0], rank, sizes[module][1]) for module, rank in self.ranks.items()}
        return KeptAdapter(
            name=self.name,
            base_model=self.base_model,
            modules=LazyUpdates(read, shapes, torch.float64),
            dtype=getattr(torch, self.dtype),
            path=Path(self.path) if self.path else None,
            config={"revision": self.revision, "task_type": self.task_type},
            kinds=self.kinds,
            member=self,
        )

    def source(self, weight: float, layers: Mapping[str, Any]) -> Source:
        """The member as a merge report names it; `layers` are those of the merge."""
        return Source(
            name=self.name,
            weight=weight,
            path=self.path,
            sha256=self.sha256,
            base_model=self.base_model,
            dtype=self.dtype,
            modules=len(self.ranks),
            ranks=(min(self.ranks.values()), max(self.ranks.values())),
            missing=[module for module in layers if module not in self.ranks],
            config_sha256=self.config_sha256,
            initial_sha256=self.initial_sha256,
        )


@dataclass(frozen=True, eq=False)
class KeptAdapter(Adapter):
    """A member as an adapter whose updates are in a state: its folder may be gone, its hashes are known."""

    member: Member = field(kw_only=True)

    @property
    def sha256(self) -> str | None:
        """Hash of its weights file when it was added."""
        return self.member.sha256

    @property
    def config_sha256(self) -> str | None:
        """Hash of what its config said when it was added."""
        return self.member.config_sha256

    @property
    def initial_sha256(self) -> str | None:
        """Hash of its weights before training, where their product was taken out."""
        return self.member.initial_sha256


class KeptMembers(dict[str, Member]):
    """Name to member, in order of arrival. All weigh 1/N until one is given a weight; changes give others back."""

    @property
    def equal(self) -> bool:
        """Whether all weigh 1/N for the N that there are."""
        return all(member.weight is None for member in self.values())

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each by name."""
        equal = 1 / max(len(self), 1)
        return {name: equal if of.weight is None else of.weight for name, of in self.items()}

    def find(self, name: str) -> Member:
        """A ValueError names who is there instead."""
        if name not in self:
            raise ValueError(f"the state has no member {name!r}: it has {', '.join(self)}{nearest(name, self)}")
        return self[name]

    def weighted(self) -> "KeptMembers":
        """Where 1/N for all has become a weight of 1/N for each."""
        return KeptMembers({name: replace(self[name], weight=weight) for name, weight in self.weights.items()})

    def plus(self, member: Member) -> "KeptMembers":
        """With one more, or with another weight for one."""
        return KeptMembers({**self, member.name: member})

    def minus(self, name: str) -> "KeptMembers":
        """Without one."""
        return KeptMembers({other: of for other, of in self.items() if other != name})


def check_fits(adapter: Adapter, members: Sequence[Adapter], *, check_base: bool) -> None:
    """Refuse an adapter that cannot join these.

    Raises:
        ValueError: its name is taken.
        AdapterError: it holds more than updates, or is of another base model.
    """
    if adapter.name in (member.name for member in members):
        raise ValueError(
            f"the state has a member {adapter.name!r} already: remove it first, or rename the folder of the new one"
        )
    if adapter.extras:
        raise AdapterError(
            f"adapter {adapter.name!r} holds {' and '.join(adapter.extras.names)} beside its updates, "
            f"which a merge state does not keep: merge it without a state"
        )
    if check_base:
        check_same_base([*members, adapter])
    common_shapes([*members, adapter])
    common_kinds([*members, adapter])


def checked_weight(name: str, weight: float) -> float:
    """A ValueError unless it is a finite number that `merge` would take."""
    if not math.isfinite(weight):
        raise ValueError(f"the weight of {name!r} must be a finite number, got {weight}")
    if abs(weight) > LARGEST_WEIGHT:
        raise ValueError(f"the weight of {name!r} must be at most {LARGEST_WEIGHT:g} in size, got {weight}")
    return float(weight)

"""What a kept merge is, whatever it keeps of each layer: members, weights, changes, and the way to disk and back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from moa.adapters import Adapter, AdapterError, LazyUpdates, Shape, read_adapter
from moa.errors import nearest
from moa.low_rank import LowRank
from moa.merging.api import MergeResult
from moa.merging.checks import (
    check_same_base,
    checked_weights,
    common_kinds,
    common_shapes,
    read_all,
)
from moa.merging.layers import Progress, no_progress
from moa.merging.state_files import KeptAdapter, Member, read_state, write_state

Layers = dict[str, Any]
"""Layer name to what a kind of state keeps of it."""


class MergeState(ABC):
    """Adapters and their weights, ready to be merged, changed and stored.

    Weights are all 1/N for the N members that there are, until one is given; the others then keep the weight that
    they have at that moment. A change that is refused leaves the state as it was.

    Attributes:
        members: name to what is known of each adapter, in order of arrival.
        layers: layer name to its updates.
        check_base: whether adapters of other base models are refused.
        rank: of a truncated state's sum; None for an exact one.
    """

    kind: ClassVar[str]
    _by_kind: ClassVar[dict[str, type["MergeState"]]] = {}

    def __init_subclass__(cls):
        MergeState._by_kind[cls.kind] = cls

    def __init__(self, members: Mapping[str, Member], layers: Layers, *, check_base: bool, rank: int | None):
        self.members, self.layers, self.check_base, self.rank = dict(members), dict(layers), check_base, rank

    @staticmethod
    def create(
        adapters: Sequence[str | Path | Adapter],
        weights: Sequence[float] | None = None,
        *,
        kind: Literal["exact", "truncated"] = "exact",
        rank: int | None = None,
        check_base: bool = True,
        progress: Progress = no_progress,
    ) -> "MergeState":
        """A state of these adapters.

        Args:
            adapters: folders, Hub repositories, or adapters in memory; a truncated state takes folders only.
            weights: one for each adapter; 1/N for all by default, also when N changes.
            kind: exact keeps all updates, truncated their weighted sum.
            rank: what a truncated state cuts the sum to after each change.
            check_base: refuse adapters of different base models, now and later.
            progress: shows passes over the layers, as `tqdm.tqdm` and `rich.progress.track` do.

        Raises:
            ValueError: an unknown kind, a rank that the kind does not take or lacks, weights that make no sense.
            AdapterError: an adapter that cannot be read or kept, or adapters that do not belong together.
            FileNotFoundError: no such folder.
        """
        state = _kind(kind)({}, {}, check_base=check_base, rank=_checked_rank(kind, rank))
        sources = read_all(adapters, plain=False)
        given = [None] * len(sources) if weights is None else checked_weights(weights, len(sources))
        for adapter, weight in zip(sources, given, strict=True):
            state.add(adapter, weight, progress=progress)
        return state

    @staticmethod
    def load(directory: str | Path) -> "MergeState":
        """The state that `save` wrote.

        Raises:
            FileNotFoundError: no state there.
            ValueError: a state of an unknown format, or damaged files.
        """
        facts, tensors = read_state(Path(directory))
        members = {stored["name"]: Member.from_json(stored) for stored in facts["members"]}
        kind = _kind(facts["kind"])
        layers = kind._unpacked(members, tensors)
        return kind(members, layers, check_base=facts["check_base"], rank=facts["rank"])

    def save(self, directory: str | Path) -> Path:
        """Write the state as safetensors and JSON; an earlier state in the folder stays whole until it is replaced.

        Raises:
            ValueError: the folder holds something else.
        """
        facts = {
            "kind": self.kind,
            "rank": self.rank,
            "check_base": self.check_base,
            "members": list(self.members.values()),
        }
        write_state(Path(directory), facts, self._packed())
        return Path(directory)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each member by name."""
        equal = 1 / max(len(self.members), 1)
        return {name: equal if of.weight is None else of.weight for name, of in self.members.items()}

    def add(
        self,
        adapter: str | Path | Adapter,
        weight: float | None = None,
        *,
        name: str | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Take in one adapter more.

        Args:
            adapter: folder, Hub repository, or adapter in memory.
            weight: its weight; may be left out while all members have 1/N.
            name: what to call it, by default its own name.
            progress: shows the pass over its layers.

        Raises:
            ValueError: a name that is taken, or a weight that is missing or not finite.
            AdapterError: an adapter that cannot be read or kept, or that does not belong to the members.
            FileNotFoundError: no such folder.
        """
        adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter, name)
        adapter = replace(adapter, name=name or adapter.name).to(torch.float64)
        self._check_new(adapter)
        if weight is None and not self._equal:
            raise ValueError(f"the members have weights of their own: give {adapter.name!r} one too")
        member = Member.of(adapter, None if weight is None else _finite(adapter.name, weight))
        members, layers = (self.members, self.layers) if weight is None else self._with_own_weights()
        self.layers = self._moved(layers, adapter, None, factor_of(member), progress)
        self.members = {**members, member.name: member}

    def remove(self, name: str, *, progress: Progress = no_progress) -> None:
        """Leave a member out.

        Raises:
            ValueError: no such member, the only one, or one of a truncated state whose file has changed.
            FileNotFoundError: a truncated state reads the member's folder again, and it is gone.
        """
        member = self._find(name)
        if len(self.members) == 1:
            raise ValueError(f"{name!r} is the only member: delete the state's folder instead")
        layers = self._moved(self.layers, self.adapter(name), factor_of(member), None, progress)
        self.members = {other: of for other, of in self.members.items() if other != name}
        changed = {module for of in self.members.values() for module in of.ranks}
        self.layers = {module: layer for module, layer in layers.items() if module in changed}

    def reweight(self, name: str, weight: float, *, progress: Progress = no_progress) -> None:
        """Give a member another weight; the others keep theirs.

        Raises:
            ValueError: as for `remove`, or a weight that is not finite.
            FileNotFoundError: as for `remove`.
        """
        adapter, weight = self.adapter(name), _finite(name, weight)
        members, layers = self._with_own_weights()
        self.layers = self._moved(layers, adapter, factor_of(members[name]), weight, progress)
        self.members = {**members, name: replace(members[name], weight=weight)}

    @abstractmethod
    def merged(self, method: str = "svd", **options: Any) -> MergeResult:
        """Merge the members with their weights; options are those of `moa.merging.merge`.

        Raises:
            ValueError: as `moa.merging.merge`, or a method that this kind of state cannot serve.
        """

    def adapter(self, name: str) -> Adapter:
        """A member as it was added, float64; a truncated state reads the factors from its folder.

        Raises:
            ValueError: no such member.
        """
        member = self._find(name)
        sizes = {module: self.layers[module].shape for module in member.ranks}
        shapes = {module: Shape(sizes[module][0], rank, sizes[module][1]) for module, rank in member.ranks.items()}
        return KeptAdapter(
            name=member.name,
            base_model=member.base_model,
            modules=LazyUpdates(self._reader(member), shapes, torch.float64),
            dtype=getattr(torch, member.dtype),
            path=Path(member.path) if member.path else None,
            config={"revision": member.revision, "task_type": member.task_type},
            kinds=member.kinds,
            member=member,
        )

    @property
    def _equal(self) -> bool:
        return all(member.weight is None for member in self.members.values())

    def _with_own_weights(self) -> tuple[dict[str, Member], Layers]:
        """Members and layers where 1/N for all has become a weight of 1/N for each."""
        if not self._equal:
            return self.members, self.layers
        members = {name: replace(self.members[name], weight=weight) for name, weight in self.weights.items()}
        return members, self._scaled(1 / max(len(members), 1))

    def _find(self, name: str) -> Member:
        if name not in self.members:
            hint = nearest(name, self.members)
            raise ValueError(f"the state has no member {name!r}: it has {', '.join(self.members)}{hint}")
        return self.members[name]

    def _check_new(self, adapter: Adapter) -> None:
        if adapter.name in self.members:
            raise ValueError(f"the state has a member {adapter.name!r} already: remove it first, or give another name")
        if adapter.extras:
            raise AdapterError(
                f"adapter {adapter.name!r} holds {' and '.join(adapter.extras.names)} beside its updates, "
                f"which a merge state does not keep: merge it without a state"
            )
        sources = [*map(self.adapter, self.members), adapter]
        if self.check_base:
            check_same_base(sources)
        common_shapes(sources)
        common_kinds(sources)

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


def _kind(name: str) -> type[MergeState]:
    kinds = MergeState._by_kind
    if name not in kinds:
        raise ValueError(f"a merge state is {' or '.join(kinds)}, got {name!r}{nearest(name, kinds)}")
    return kinds[name]


def _checked_rank(kind: str, rank: int | None) -> int | None:
    if kind == "exact" and rank is not None:
        raise ValueError(f"an exact state keeps every rank, got rank {rank}: leave it out, or choose kind='truncated'")
    if kind == "truncated" and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"a truncated state needs the rank to cut its sum to, a whole number from 1, got {rank!r}")
    return rank


def factor_of(member: Member) -> float:
    """What an update counts in a running sum."""
    return 1.0 if member.weight is None else member.weight


def _finite(name: str, weight: float) -> float:
    if not math.isfinite(weight):
        raise ValueError(f"the weight of {name!r} must be a finite number, got {weight}")
    return float(weight)

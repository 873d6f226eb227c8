"""What a kept merge is, whatever it keeps of each layer: members, weights, changes, and the way to disk and back."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from moa.adapters import Adapter, read_adapter
from moa.merging.api import MergeResult
from moa.merging.checks import checked_weights, read_all
from moa.merging.kept_layers import KeptLayers, Layers
from moa.merging.kept_members import KeptMembers, Member, check_fits, checked_weight
from moa.merging.kept_statistics import KeptStatistics
from moa.merging.layers import Progress, no_progress
from moa.merging.report import REPORT_FILE
from moa.merging.state_files import read_state, write_state
from moa.merging.statistics import Given, statistics_of


class MergeState(KeptLayers):
    """Adapters and their weights, ready to be merged, changed and stored.

    Weights are all 1/N for the N members that there are, until one is given; the others then keep the weight that
    they have at that moment. A change that is refused leaves the state as it was.

    Attributes:
        members: name to what is known of each adapter, in order of arrival.
        layers: layer name to its updates.
        check_base: whether adapters of other base models are refused.
        rank: of a truncated state's sum; None for the others.
        settings: how a state with statistics merges; how any other was merged last by `merge_kept`, None before.
        statistics: name to the statistics of each member of a state that keeps them; empty for the others.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        layers: Layers,
        *,
        check_base: bool,
        rank: int | None = None,
        settings: Mapping[str, Any] | None = None,
        statistics: Mapping[str, KeptStatistics] | None = None,
    ):
        self.members, self.layers, self.check_base = KeptMembers(members), dict(layers), check_base
        self.rank, self.settings, self.statistics = rank, settings, dict(statistics or {})

    @staticmethod
    def create(
        adapters: Sequence[str | Path | Adapter],
        weights: Sequence[float] | None = None,
        *,
        kind: Literal["exact", "statistics", "truncated"] = "exact",
        rank: int | None = None,
        settings: Mapping[str, Any] | None = None,
        statistics: Sequence[Given] | None = None,
        check_base: bool = True,
        progress: Progress = no_progress,
    ) -> "MergeState":
        """A state of these adapters.

        Args:
            adapters: folders, Hub repositories, or adapters in memory; a truncated state takes folders only.
            weights: one for each adapter; 1/N for all by default, also when N changes.
            kind: exact keeps all updates, statistics also what a method reads of each adapter's data, truncated the
                weighted sum alone.
            rank: what a truncated state cuts the sum to after each change.
            settings: how a state with statistics merges, now and later: parameters of `merge` and options of the
                method, such as {"method": "regmean", "rank": 16, "off_diagonal": 0.5}.
            statistics: for such a state, what `moa statistics` wrote for each adapter; by default the file beside it.
            check_base: refuse adapters of different base models, now and later.
            progress: shows passes over the layers, as `tqdm.tqdm` and `rich.progress.track` do.

        Raises:
            ValueError: an unknown kind, a rank or settings that the kind does not take or lacks, weights that make
                no sense, or an adapter without the statistics that are to be kept.
            AdapterError: an adapter that cannot be read or kept, or adapters that do not belong together.
            FileNotFoundError: no such folder.
        """
        cls = MergeState.of_kind(kind)
        cls.check_taken(rank=rank, settings=settings, statistics=statistics)
        state = cls({}, {}, check_base=check_base, rank=rank, settings=settings)
        sources = read_all(adapters, plain=False)
        nothing = [None] * len(sources)
        given = nothing if weights is None else checked_weights(weights, len(sources))
        if statistics is not None:
            statistics_of(sources, statistics)  # refuses another number or order of them
        for adapter, weight, known in zip(sources, given, statistics or nothing, strict=True):
            state.add(adapter, weight, statistics=known, progress=progress)
        return state

    @staticmethod
    def load(directory: str | Path) -> "MergeState":
        """The state that `save` wrote.

        Raises:
            FileNotFoundError: no state there.
            ValueError: a state of an unknown format, or damaged files.
        """
        facts, tensors, statistics = read_state(Path(directory))
        members = {stored["name"]: Member.from_json(stored) for stored in facts["members"]}
        kind = MergeState.of_kind(facts["kind"])
        own = {name: facts.get(name) for name in ("check_base", "rank", "settings")}
        return kind(members, kind._unpacked(members, tensors), statistics=statistics, **own)

    def save(self, directory: str | Path) -> Path:
        """Write the state as safetensors and JSON; an earlier state in the folder stays whole until it is replaced.

        Raises:
            ValueError: the folder holds something else.
        """
        facts = {
            "kind": self.kind,
            "rank": self.rank,
            "settings": self.settings,
            "check_base": self.check_base,
            "members": list(self.members.values()),
        }
        self.statistics = write_state(Path(directory), facts, self._packed(), self.statistics)
        return Path(directory)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each member by name."""
        return self.members.weights

    def add(
        self,
        adapter: str | Path | Adapter,
        weight: float | None = None,
        *,
        name: str | None = None,
        statistics: Given | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Take in one adapter more.

        Args:
            adapter: folder, Hub repository, or adapter in memory.
            weight: its weight; may be left out while all members have 1/N.
            name: what to call it, by default its own name.
            statistics: what `moa statistics` wrote for it, for a state that keeps them; by default the file beside it.
            progress: shows the pass over its layers.

        Raises:
            ValueError: a name that is taken, a weight that is missing or not finite, or statistics that are missing,
                not its own, or not kept.
            AdapterError: an adapter that cannot be read or kept, or that does not belong to the members.
            FileNotFoundError: no such folder.
        """
        adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter, name)
        adapter = replace(adapter, name=name or adapter.name).to(torch.float64)
        self.check_taken(statistics=statistics)
        self._check_new(adapter)
        known = self._known(adapter, statistics)
        if weight is None and not self.members.equal:
            raise ValueError(f"the members have weights of their own: give {adapter.name!r} one too")
        member = Member.of(adapter, None if weight is None else checked_weight(adapter.name, weight))
        members, layers = (self.members, self.layers) if weight is None else self._weighted()
        self.layers = self._moved(layers, adapter, None, member.factor, progress)
        self.members = members.plus(member)
        self.statistics |= known

    def remove(self, name: str, *, progress: Progress = no_progress) -> None:
        """Leave a member out.

        Raises:
            ValueError: no such member, the only one, or one of a truncated state whose file has changed.
            FileNotFoundError: a truncated state reads the member's folder again, and it is gone.
        """
        member = self.members.find(name)
        if len(self.members) == 1:
            raise ValueError(f"{name!r} is the only member: delete the state's folder instead")
        layers = self._moved(self.layers, self.adapter(name), member.factor, None, progress)
        self.members = self.members.minus(name)
        self.statistics = {other: of for other, of in self.statistics.items() if other != name}
        changed = {module for of in self.members.values() for module in of.ranks}
        self.layers = {module: layer for module, layer in layers.items() if module in changed}

    def reweight(self, name: str, weight: float, *, progress: Progress = no_progress) -> None:
        """Give a member another weight; the others keep theirs.

        Raises:
            ValueError: as for `remove`, or a weight that is not finite.
            FileNotFoundError: as for `remove`.
        """
        adapter, weight = self.adapter(name), checked_weight(name, weight)
        members, layers = self._weighted()
        self.layers = self._moved(layers, adapter, members[name].factor, weight, progress)
        self.members = members.plus(replace(members[name], weight=weight))

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
        member = self.members.find(name)
        return member.adapter({module: self.layers[module].shape for module in member.ranks}, self._reader(member))

    def _weighted(self) -> tuple[KeptMembers, Layers]:
        """KeptMembers and layers where 1/N for all has become a weight of 1/N for each."""
        if not self.members.equal:
            return self.members, self.layers
        return self.members.weighted(), self._scaled(1 / max(len(self.members), 1))

    def _check_new(self, adapter: Adapter) -> None:
        """Refuse what cannot be a member."""
        check_fits(adapter, list(map(self.adapter, self.members)), check_base=self.check_base)

    def _known(self, adapter: Adapter, statistics: Given | None) -> dict[str, KeptStatistics]:
        """Name to the statistics of a new member, from a state that keeps them."""
        return {}


def retold(result: MergeResult, **facts: Any) -> MergeResult:
    """A merge with other facts in its report, also in the one that was written."""
    report = replace(result.report, **facts)
    if result.path:
        (result.path / REPORT_FILE).write_text(report.to_json())
    return replace(result, report=report)

"""A merge state for methods that know each adapter's data: RegMean, Fisher, and ranks chosen by predicted loss.

    state = MergeState.create(["adapters/sst2", "adapters/mnli"], kind="statistics", settings={"method": "regmean"})
    state.add("adapters/squad")          # with its merge_statistics.safetensors
    state.remove("sst2")                 # whose folder may have gone
    state.merged(output="merged")        # by RegMean, with the options and the rank of the settings

The sums that these methods solve with, S = sum_i |w_i| G_i and sum_i w_i delta_i G_i for RegMean, numerators and
denominators by rows for Fisher, are formed anew from each member's own part: a merge is then that of the members there
are to the rounding of float64, also where an option looks at all members at once (`ridge`, `eps`), and a member can be
taken out or re-weighted without its folder. A member weighs its factors and, for RegMean, n^2 numbers for each
distinct input of n features (as much as its merge_statistics.safetensors), for Fisher o numbers a layer.
"""

from collections.abc import Mapping
from typing import Any

from moa.adapters import Adapter
from moa.merging.api import MergeResult
from moa.merging.checks import checked_dtype
from moa.merging.exact_state import ExactState
from moa.merging.kept_layers import Layers
from moa.merging.kept_members import Member
from moa.merging.kept_statistics import CALLED, KeptStatistics, read_by
from moa.merging.merge_state import retold
from moa.merging.provenance import seen_from
from moa.merging.ranks import RankRule
from moa.merging.registry import find_method
from moa.merging.statistics import Given

SHARED = ("name", "rank", "scale", "restore_norm", "seed", "dtype")
"""Settings that are parameters of `merge`; the others are the method's options."""


class StatisticsState(ExactState):
    """All members in shared bases, with the statistics that one method reads, and the settings of that method."""

    kind = "statistics"
    takes = ("settings", "statistics")

    def __init__(
        self, members: Mapping[str, Member], layers: Layers, *, settings: Mapping[str, Any] | None, **own: Any
    ):
        super().__init__(members, layers, settings=_checked(settings or {}), **own)

    def merged(self, method: str | None = None, **options: Any) -> MergeResult:
        """Merge the members with their weights, as the settings say.

        Args:
            method: another method than that of the settings, which then count for nothing.
            options: those of `moa.merging.merge`, in the place of the settings'.

        Raises:
            ValueError: as `moa.merging.merge`, or a method that reads statistics of which the state keeps others.
        """
        if method is None or find_method(method).name == self.settings["method"]:
            options = {**self.settings, **options}
            method = options.pop("method")
        reads = read_by(find_method(method), options.get("rank"))
        if lacking := reads - self._parts:
            raise ValueError(
                f"this merge reads {_listed(lacking)} and the state keeps {_listed(self._parts)} alone, for "
                f"{self.settings['method']}: create another state by {method}"
            )
        if not reads or "statistics" in options:
            return super().merged(method, **options)
        known = [self.statistics[name].statistics for name in self.members]
        result = super().merged(method, statistics=known, **options)
        return retold(result, statistics=seen_from(self._given(), result.path))

    @property
    def _parts(self) -> frozenset[str]:
        """Which of the statistics are kept."""
        return read_by(find_method(self.settings["method"]), self.settings.get("rank"))

    def _given(self) -> list[str | None] | None:
        """Where a merge of the members themselves would find their statistics; None for: beside each."""
        given = {name: known.given for name, known in self.statistics.items()}
        if not any(given.values()):
            return None
        return [given[name] or member.path for name, member in self.members.items()]

    def _known(self, adapter: Adapter, statistics: Given | None) -> dict[str, KeptStatistics]:
        return {adapter.name: KeptStatistics.of(adapter, statistics, self._parts, check_base=self.check_base)}


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, all options of the method among them: what its defaults are may change."""
    method = find_method(settings.get("method", "svd"))
    shared = {name: settings[name] for name in SHARED if settings.get(name) is not None}
    if isinstance(shared.get("rank"), Mapping):
        shared["rank"] = RankRule(**shared["rank"])
    if not read_by(method, shared.get("rank")):
        raise ValueError(
            f"{method.name} reads no statistics: choose kind='exact', or another method than {method.name}"
        )
    if "dtype" in shared:
        shared["dtype"] = str(checked_dtype(shared["dtype"])).removeprefix("torch.")
    options = {name: value for name, value in settings.items() if name not in ("method", *SHARED)}
    return {"method": method.name, **shared, **method.check_options(options)}


def _listed(parts: frozenset[str]) -> str:
    return " and ".join(CALLED[part] for part in sorted(parts))

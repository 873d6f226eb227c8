"""`moa merge --state`: a merge that is kept in a folder, changed, and merged again.

A merge goes on as it was: by the method and the settings of the last time, unless a method is named. A state with
statistics, which one method reads, always goes back to that method. (`MergeState` says what is kept.)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.merging.api import MergeResult
from moa.merging.checks import checked_dtype
from moa.merging.incremental import MergeState, StatisticsState
from moa.merging.kept_statistics import read_by
from moa.merging.layers import Progress
from moa.merging.ranks import RankRule
from moa.merging.registry import find_method
from moa.merging.state_files import MANIFEST, check_ours, held


def merge_kept(
    state: str | Path,
    *,
    adapters: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    reweight: Sequence[tuple[str, float]] = (),
    state_rank: int | None = None,
    statistics: Sequence[str] | None = None,
    check_base: bool = True,
    config: str | None = None,
    output: str | Path | None = None,
    progress: Progress,
    **merging: Any,
) -> MergeResult:
    """Create the state in this folder or change the one that is there, merge its members, and store it.

    What is refused leaves the state as it was, and writes no adapter.

    Args:
        adapters, weights, state_rank: of a new state; with a rank it keeps the weighted sum alone.
        add: folders to take in, each with its weight as FOLDER=W if the members have weights of their own.
        remove, reweight: members to change, by name.
        statistics: files by `moa statistics`, one for each adapter that comes in; by default those beside them.
        check_base: False lets adapters of other base models in, from now on.
        output: folder of the merged adapter, outside the state's.
        merging: parameters of `merge`, and the method's options.

    Raises:
        ValueError: adapters for a state that exists, none for a new one, changes that make no sense, statistics that
            are missing or nobody's, or folders that are in each other's way.
    """
    if config is not None:
        raise ValueError("a merge is kept from adapters, not from a recipe: leave --config or --state out")
    folder = _checked_folder(state, output)
    new = later = None
    if statistics is not None:
        new, later = statistics[: len(adapters)], statistics[len(adapters) :]
    with held(folder):
        if (folder / MANIFEST).is_file():
            if adapters or weights is not None or state_rank is not None:
                raise ValueError(f"{folder} holds a merge already: change it by --add, --remove and --reweight")
            kept = MergeState.load(folder)
            kept.check_base = kept.check_base and check_base
        elif adapters:
            own = _kind_for(state_rank, merging, new)
            kept = MergeState.create(adapters, weights, **own, check_base=check_base, progress=progress)
        else:
            raise ValueError(f"{folder} holds no merge yet: name the adapters to keep there")
        if isinstance(kept, StatisticsState):
            known = _one_each(later, add)
        else:
            known, merging["statistics"] = [None] * len(add), statistics
        _change(kept, list(zip(add, known, strict=True)), remove, reweight, progress)
        if not isinstance(kept, StatisticsState):
            merging = _as_last_time(kept, merging)
        result = kept.merged(output=output, progress=progress, **merging)
        kept.save(folder)
        return result


def _change(
    kept: MergeState,
    add: Sequence[tuple[str, str | None]],
    remove: Sequence[str],
    reweight: Sequence[tuple[str, float]],
    progress: Progress,
) -> None:
    """Take members out, give others their weights, and take in folders with their statistics."""
    named = [name for name, _ in reweight]
    if twice := [name for name in named if named.count(name) > 1]:
        raise ValueError(f"--reweight gives {twice[0]!r} {named.count(twice[0])} weights: give it one")
    for name in remove:
        kept.remove(name)
    for name, weight in reweight:
        kept.reweight(name, weight)
    for member, statistics in add:
        path, weight = _weighted(member)
        kept.add(path, weight, statistics=statistics, progress=progress)


def _as_last_time(kept: MergeState, merging: dict[str, Any]) -> dict[str, Any]:
    """What the merge is asked for: what it was asked for the last time and now, or now alone where a method is named.

    The state remembers it for the next time, but for the base model and statistics.
    """
    asked = {**({} if "method" in merging else kept.settings or {}), **merging}
    if isinstance(asked.get("rank"), Mapping):
        asked["rank"] = RankRule(**asked["rank"])
    if asked.get("dtype") is not None:
        asked["dtype"] = str(checked_dtype(asked["dtype"])).removeprefix("torch.")
    kept.settings = {name: value for name, value in asked.items() if name not in ("base", "statistics", "objective")}
    return asked


def _checked_folder(state: str | Path, output: str | Path | None) -> Path:
    """The state's folder, which may not hold anything else, nor the output."""
    folder = Path(state)
    check_ours(folder)
    if output is not None and folder.resolve() in (Path(output).resolve(), *Path(output).resolve().parents):
        raise ValueError(f"{output} is in {folder}, which holds the kept merge: choose another output folder")
    return folder


def _kind_for(state_rank: int | None, merging: Mapping[str, Any], statistics: Sequence[str] | None) -> dict[str, Any]:
    """The kind of state that serves a first merge, and what it is created with."""
    if state_rank is not None:
        return {"kind": "truncated", "rank": state_rank}
    if read_by(find_method(merging.get("method", "svd")), merging.get("rank")):
        settings = {name: value for name, value in merging.items() if name != "base"}
        return {"kind": "statistics", "settings": settings, "statistics": statistics}
    return {"kind": "exact"}


def _one_each(statistics: Sequence[str] | None, adapters: Sequence[str]) -> Sequence[str | None]:
    """The statistics of each adapter that is added, None where they lie beside it."""
    if statistics is None:
        return [None] * len(adapters)
    if len(statistics) != len(adapters):
        raise ValueError(
            "--statistics names one file for each adapter that comes in, and the state keeps those of its members: "
            f"got {len(statistics)} for {len(adapters)} by --add"
        )
    return statistics


def _weighted(member: str) -> tuple[str, float | None]:
    """FOLDER or FOLDER=W; a folder may have = in its name."""
    path, equals, text = member.rpartition("=")
    try:
        return (path, float(text)) if equals and not Path(member).exists() else (member, None)
    except ValueError:
        return member, None

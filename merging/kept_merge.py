"""`moa merge --state`: a merge that is kept in a folder, changed, and merged again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moa.merging.api import MergeResult
from moa.merging.incremental import MergeState
from moa.merging.layers import Progress
from moa.merging.state_files import MANIFEST, check_ours


def merge_kept(
    state: str | Path,
    *,
    adapters: Sequence[str] = (),
    weights: Sequence[float] | None = None,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    reweight: Sequence[tuple[str, float]] = (),
    state_rank: int | None = None,
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
        check_base: False lets adapters of other base models in, from now on.
        output: folder of the merged adapter, outside the state's.
        merging: parameters of `merge`, and the method's options.

    Raises:
        ValueError: adapters for a state that exists, none for a new one, changes that make no sense, or folders
            that are in each other's way.
    """
    if config is not None:
        raise ValueError("a merge is kept from adapters, not from a recipe: leave --config or --state out")
    folder = Path(state)
    check_ours(folder)
    if output is not None and folder.resolve() in (Path(output).resolve(), *Path(output).resolve().parents):
        raise ValueError(f"{output} is in {folder}, which holds the kept merge: choose another output folder")
    if (folder / MANIFEST).is_file():
        if adapters or weights is not None or state_rank is not None:
            raise ValueError(f"{folder} holds a merge already: change it by --add, --remove and --reweight")
        kept = MergeState.load(folder)
        kept.check_base = kept.check_base and check_base
    elif adapters:
        kind = "exact" if state_rank is None else "truncated"
        kept = MergeState.create(
            adapters, weights, kind=kind, rank=state_rank, check_base=check_base, progress=progress
        )
    else:
        raise ValueError(f"{folder} holds no merge yet: name the adapters to keep there")
    for name in remove:
        kept.remove(name)
    for name, weight in reweight:
        kept.reweight(name, weight)
    for member in add:
        path, weight = _weighted(member)
        kept.add(path, weight, progress=progress)
    result = kept.merged(output=output, progress=progress, **merging)
    kept.save(folder)
    return result


def _weighted(member: str) -> tuple[str, float | None]:
    """FOLDER or FOLDER=W; a folder may have = in its name."""
    path, equals, text = member.rpartition("=")
    try:
        return (path, float(text)) if equals and not Path(member).exists() else (member, None)
    except ValueError:
        return member, None

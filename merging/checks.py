"""What is asked of a merge, checked before anything is computed: adapters, weights, ranks, dtypes."""

import math
import operator
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moa.adapters import LINEAR, Adapter, AdapterError, Kind, read_adapter
from moa.base_model import same_base
from moa.errors import nearest
from moa.merging.registry import MergeMethod

DTYPES = ("float32", "bfloat16", "float16", "float64")


def read_all(
    adapters: Sequence[str | Path | Adapter],
    initial: Mapping[str, str | Path] | None = None,
    *,
    plain: bool = True,
) -> list[Adapter]:
    """Adapters with names that differ, so that a report can tell two folders called checkpoint-60 apart.

    Args:
        initial: the folder before training of those that it names, by their folder or by the last part of it.
        plain: refuse what is more than B @ A on linear layers, for callers that look at nothing else.
    """
    if isinstance(adapters, str | Path | Adapter):
        raise TypeError(f"merge takes a list of adapters, got {adapters!r}: put it in a list")
    before = before_training(adapters, initial or {})
    sources: list[Adapter] = []
    for given in adapters:
        adapter = given if isinstance(given, Adapter) else read_adapter(given, initial=before.get(str(given)))
        same = sum(1 for other in sources if re.fullmatch(rf"{re.escape(adapter.name)}(#\d+)?", other.name))
        sources.append(replace(adapter, name=f"{adapter.name}#{same + 1}") if same else adapter)
    if not sources:
        raise ValueError("merge needs at least one adapter, got none")
    for adapter in sources if plain else ():
        if more := [*adapter.extras.names, *(f"a LoRA on the {kind.name} {m}" for m, kind in adapter.kinds.items())]:
            raise AdapterError(
                f"adapter {adapter.name!r} also holds {more[0]}, and only updates of linear layers are looked at "
                f"here: merge it with moa merge, or leave it out"
            )
    return sources


def before_training(
    adapters: Sequence[str | Path | Adapter], initial: Mapping[str, str | Path]
) -> dict[str, str | Path]:
    """Folder of an adapter to its folder before training; each name must mean one of the folders to merge."""
    folders = {str(adapter) for adapter in adapters if not isinstance(adapter, Adapter)}
    found = {}
    for name, before in initial.items():
        meant = [folder for folder in folders if str(name) in (folder, Path(folder).name)]
        if len(meant) != 1:
            raise ValueError(
                f"initial names {str(name)!r}, and {len(meant)} folders to merge are called so: give the adapter's "
                f"folder as it stands in the list"
            )
        found[meant[0]] = before
    return found


def check_output(output: str | Path) -> None:
    """Refuse a folder that cannot be created, before there is anything to lose.

    Raises:
        AdapterError: an empty path, something that exists, or a place inside a file.
        PermissionError: a place where nothing may be written.
    """
    if not str(output):
        raise AdapterError("the output folder is an empty path: name a folder to create")
    if os.path.lexists(output):  # also a link to nowhere, inside which nothing can be created
        raise AdapterError(f"{output} exists already: choose another output folder, or remove it first")
    place = next(parent for parent in Path(output).resolve().parents if parent.exists())
    if not place.is_dir():
        raise AdapterError(f"{output} cannot be created: {place} is a file, choose another output folder")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{output} cannot be created: {place} is not writable")


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name}{nearest(name, DTYPES)}")
    return getattr(torch, name)


LARGEST_WEIGHT = 1e15
"""Squares of larger ones, times those of an update, may leave the range of float32."""


def checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    if isinstance(weights, str):
        raise TypeError(f"weights must be a list of numbers, got the text {weights!r}")
    weights = [float(w) for w in weights]
    if len(weights) != count:
        raise ValueError(f"weights must be one for each adapter: got {len(weights)} for {count} adapters")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite numbers, got {weights}")
    if max(map(abs, weights)) > LARGEST_WEIGHT:
        raise ValueError(f"weights must lie between -{LARGEST_WEIGHT:g} and {LARGEST_WEIGHT:g}, got {weights}")
    if not any(weights):
        raise ValueError("all weights are zero, so there is nothing to merge: give at least one another value")
    return weights


def check_same_base(sources: Sequence[Adapter], base: Any = None) -> None:
    """Refuse adapters of different task types or base models, or of another one than `base`, a name, folder or model.

    Raises:
        AdapterError: naming the two that differ.
    """
    _check_same_task_type(sources)
    for of, same in ((lambda a: a.base_model, same_base), (lambda a: a.config.get("revision"), operator.eq)):
        known = [a for a in sources if of(a)]
        for other in known[1:]:
            if not same(of(known[0]), of(other)):
                raise AdapterError(
                    f"adapter {known[0].name!r} was trained on {of(known[0])!r} and {other.name!r} on "
                    f"{of(other)!r}: merge adapters of one base model, or pass check_base=False "
                    f"(--no-check-base) if these share their weights"
                )
    ours = str(base or "") if base is None or isinstance(base, str | Path) else getattr(base, "name_or_path", "")
    for adapter in sources if ours else ():
        if adapter.base_model and not same_base(adapter.base_model, ours):
            raise AdapterError(
                f"adapter {adapter.name!r} was trained on {adapter.base_model!r} and base is {ours!r}: pass its own "
                f"base model, or check_base=False (--no-check-base) if they share their weights"
            )


def _check_same_task_type(sources: Sequence[Adapter]) -> None:
    """A classifier's layers and a language model's have the same names and sizes, and nothing else in common."""
    first, *others = [a for a in sources if a.config.get("task_type")] or [None]
    for other in others:
        ours, theirs = first.config["task_type"], other.config["task_type"]
        if ours != theirs:
            raise AdapterError(
                f"adapter {first.name!r} is for {ours} and {other.name!r} for {theirs}: merge adapters of one task "
                f"type, or pass check_base=False (--no-check-base) to merge them all the same"
            )


def common_shapes(sources: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
    """Every layer that any adapter changes, with the size of its matrix, on which all must agree."""
    found: dict[str, tuple[tuple[int, int], str]] = {}
    for adapter in sources:
        for module, shape in adapter.shapes.items():
            size, first = found.setdefault(module, ((shape.o, shape.n), adapter.name))
            if size != (shape.o, shape.n):
                raise AdapterError(
                    f"layer {module!r} is {list(size)} for adapter {first!r} and {[shape.o, shape.n]} for "
                    f"{adapter.name!r}: they belong to different base models"
                )
    return {module: size for module, (size, _) in sorted(found.items())}


def common_kinds(sources: Sequence[Adapter]) -> dict[str, Kind]:
    """The kinds of layers that are not linear, on which all adapters must agree."""
    kinds: dict[str, Kind] = {}
    for adapter in sources:
        for module in adapter.shapes:
            kind = adapter.kinds.get(module, LINEAR)
            if kinds.setdefault(module, kind) != kind:
                raise AdapterError(
                    f"layer {module!r} is {kinds[module].name} {list(kinds[module].kernel)} for another adapter and "
                    f"{kind.name} {list(kind.kernel)} for {adapter.name!r}: they belong to different base models"
                )
    return {module: kind for module, kind in kinds.items() if kind != LINEAR}


def check_rank(rank: int | str | None, method: MergeMethod) -> None:
    """Refuse a rank that the method does not take, or that is none."""
    if rank is not None and "rank" not in method.parameters:
        raise ValueError(f"{method.name} keeps every rank it is given and takes no rank: use svd to choose one")
    if rank not in (None, "full") and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"rank must be a whole number, auto or full, got {rank!r}")


def layer_ranks(
    rank: int | str | None,
    method: MergeMethod,
    sources: Sequence[Adapter],
    sizes: Mapping[str, tuple[int, int]],
) -> dict[str, int | None]:
    """The rank to ask of each layer; None is the method's own.

    A rank that no layer can have is refused; a layer that holds fewer ranks keeps those it has.
    """
    check_rank(rank, method)
    if rank is None:
        return dict.fromkeys(sizes)
    stacked: Counter[str] = Counter()
    for adapter in sources:
        stacked.update({module: shape.r for module, shape in adapter.shapes.items()})
    if method.fills_the_layer:
        most = {module: min(size) for module, size in sizes.items()}
    else:
        most = {module: min(stacked[module], *size) for module, size in sizes.items()}
    if rank == "full":
        return dict(most)
    if not 1 <= rank <= max(most.values()):
        what = "the size of the layers" if method.fills_the_layer else "all that these adapters hold together"
        raise ValueError(f"rank must be from 1 to {max(most.values())}, {what}, got {rank}")
    return {module: min(rank, most[module]) for module in sizes}


def common_base(sources: Sequence[Adapter]) -> str | None:
    """The name of the one base model, a Hub's before a folder's, which other machines do not have; or None."""
    names = sorted((a.base_model for a in sources if a.base_model), key=lambda name: Path(name).is_dir())
    return names[0] if names and all(same_base(names[0], name) for name in names) else None


def agreed(values: Iterable[str | None]) -> str | None:
    """What all that say something say, or None."""
    said = {value for value in values if value}
    return said.pop() if len(said) == 1 else None

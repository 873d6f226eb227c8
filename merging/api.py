"""One call from adapters to a merged adapter: read, check, merge layer by layer, write, report."""

import hashlib
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moa.adapters import Adapter, AdapterError, check_name, read_adapter, write_adapter
from moa.base_model import same_base
from moa.errors import nearest
from moa.low_rank import LowRank, stack
from moa.merging.registry import Merged, MergeMethod, find_method
from moa.merging.report import REPORT_FILE, Layer, MergeReport, Source
from moa.peft_checks import widest

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class MergeResult:
    """What `merge` gives back.

    Attributes:
        modules: layer name to merged update, in the dtype that is or would be stored.
        report: what was done and what it cost.
        path: the folder that was written, None when none was asked for.
    """

    modules: dict[str, LowRank]
    report: MergeReport
    path: Path | None


def merge(
    adapters: Sequence[str | Path | Adapter],
    method: str = "svd",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    check_base: bool = True,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
    **options: Any,
) -> MergeResult:
    """Merge LoRA adapters into one, without their base model.

    Layers are streamed: the factors of one layer are read, merged in float64, rounded once and kept; nothing
    but the result grows with the model. A layer that an adapter lacks counts as unchanged by it.

    Args:
        adapters: folders, Hub repositories, or adapters in memory.
        method: a name of `methods()`.
        weights: one for each adapter, used as they are; by default 1/N each. (With a weight of 1 each, N
            adapters add up to N times the change that any of them was trained for.)
        rank: rank of the result, at most the sum of the ranks; the default depends on the method.
        output: folder to create, with the adapter and merge_report.json.
        name: what the report calls the result, by default the method's name.
        scale: factor on the result, lambda in the papers.
        seed: for methods that draw random numbers.
        dtype: dtype to store, or its name: float32, bfloat16, float16, float64; the widest of the inputs by default.
        check_base: refuse adapters of different base models.
        progress: wraps the list of layer names, as `tqdm.tqdm` and `rich.progress.track` do.
        options: options of the method, see `moa methods`.

    Raises:
        ValueError: an unknown method, option or dtype, weights, a rank or a scale that make no sense.
        AdapterError: an adapter that cannot be read, or adapters that do not belong together.
        FileNotFoundError: no such folder.
    """
    chosen = find_method(method)
    options = chosen.check_options(options)
    if name is not None:
        check_name(name)
    if output is not None and Path(output).exists():
        raise AdapterError(f"{output} exists already: choose another output folder, or remove it first")
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be a finite number other than 0, got {scale}")
    wanted = None if dtype is None else _checked_dtype(dtype)
    sources = _read(adapters)
    weights = _checked_weights(weights, len(sources))
    if check_base:
        _check_same_base(sources)
    merging = [a.to(torch.float64) for a, w in zip(sources, weights, strict=True) if w != 0]
    shapes = _common_shapes(merging)
    _check_rank(rank, chosen, merging, shapes)
    stored_dtype = wanted or widest(a.dtype for a in merging)

    w = torch.tensor([w for w in weights if w != 0], dtype=torch.float64)
    modules: dict[str, LowRank] = {}
    layers: dict[str, Layer] = {}
    for module in progress(list(shapes)):
        updates = [a.modules.get(module, LowRank.zero(shapes[module], torch.float64)) for a in merging]
        given = chosen.given(rank=rank, seed=_seed_of(module, seed))
        merged = chosen.function(updates, w, **given, **options)
        modules[module], layers[module] = _stored(merged, scale, stored_dtype, sum(u.rank for u in updates))
    report = MergeReport(
        name=name or method,
        method=method,
        paper=chosen.paper,
        base_model=_common_base(sources),
        scale=scale,
        rank=rank,
        seed=seed,
        dtype=str(stored_dtype).removeprefix("torch."),
        options=options,
        sources=_described(sources, weights, shapes),
        layers=layers,
        versions={"moa-peft": version("moa-peft"), "torch": torch.__version__},
    )
    return MergeResult(modules, report, _write(output, modules, sources, stored_dtype, report) if output else None)


def _read(adapters: Sequence[str | Path | Adapter]) -> list[Adapter]:
    """Adapters with names that differ, so that a report can tell two folders called checkpoint-60 apart."""
    if isinstance(adapters, str | Path | Adapter):
        raise TypeError(f"merge takes a list of adapters, got {adapters!r}: put it in a list")
    sources: list[Adapter] = []
    for adapter in (a if isinstance(a, Adapter) else read_adapter(a) for a in adapters):
        same = sum(1 for other in sources if re.fullmatch(rf"{re.escape(adapter.name)}(#\d+)?", other.name))
        sources.append(replace(adapter, name=f"{adapter.name}#{same + 1}") if same else adapter)
    if not sources:
        raise ValueError("merge needs at least one adapter, got none")
    return sources


def _checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name}{nearest(name, DTYPES)}")
    return getattr(torch, name)


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    weights = [float(w) for w in weights]
    if len(weights) != count:
        raise ValueError(f"weights must be one for each adapter: got {len(weights)} for {count} adapters")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be finite numbers, got {weights}")
    if not any(weights):
        raise ValueError("all weights are zero, so there is nothing to merge: give at least one another value")
    return weights


def _check_same_base(sources: Sequence[Adapter]) -> None:
    for of, same in ((lambda a: a.base_model, same_base), (lambda a: a.config.get("revision"), operator.eq)):
        known = [a for a in sources if of(a)]
        for other in known[1:]:
            if not same(of(known[0]), of(other)):
                raise AdapterError(
                    f"adapter {known[0].name!r} was trained on {of(known[0])!r} and {other.name!r} on "
                    f"{of(other)!r}: merge adapters of one base model, or pass check_base=False "
                    f"(--no-check-base) if these share their weights"
                )


def _common_shapes(sources: Sequence[Adapter]) -> dict[str, tuple[int, int]]:
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


def _check_rank(
    rank: int | None,
    method: MergeMethod,
    sources: Sequence[Adapter],
    sizes: dict[str, tuple[int, int]],
) -> None:
    """A rank that no layer can have is refused; a layer that holds fewer ranks keeps those it has."""
    if rank is None:
        return
    if "rank" not in method.parameters:
        raise ValueError(f"{method.name} keeps every rank it is given and takes no rank: use svd to choose one")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be a whole number, got {rank!r}")
    stacked: Counter[str] = Counter()
    for adapter in sources:
        stacked.update({module: shape.r for module, shape in adapter.shapes.items()})
    most = max(min(r, *sizes[module]) for module, r in stacked.items())
    if not 1 <= rank <= most:
        raise ValueError(f"rank must be from 1 to {most}, all that these adapters hold together, got {rank}")


def _stored(merged: Merged, scale: float, dtype: torch.dtype, stacked_rank: int) -> tuple[LowRank, Layer]:
    """Scale and round one merged layer, and say what that and its rank have cost."""
    update = merged.update.scaled(scale)
    stored = update.to(dtype)
    kept = merged.update.norm() ** 2
    exact = kept + merged.dropped
    error = stack([update, stored.to(torch.float64).scaled(-1.0)]).norm()
    return stored, Layer(
        stacked_rank=stacked_rank,
        rank=stored.rank,
        energy=exact * scale**2,
        dropped=merged.dropped / exact if exact else 0.0,
        rounding=error / update.norm() if kept else 0.0,
        facts=dict(merged.facts),
    )


def _described(sources: Sequence[Adapter], weights: Sequence[float], merged: Iterable[str]) -> list[Source]:
    return [
        Source(
            name=adapter.name,
            weight=weight,
            path=str(adapter.path) if adapter.path else None,
            sha256=adapter.sha256,
            base_model=adapter.base_model,
            dtype=str(adapter.dtype).removeprefix("torch."),
            modules=len(adapter.shapes),
            ranks=(min(s.r for s in adapter.shapes.values()), max(s.r for s in adapter.shapes.values())),
            missing=[module for module in merged if module not in adapter.shapes],
        )
        for adapter, weight in zip(sources, weights, strict=True)
    ]


def _write(
    output: str | Path, modules: dict[str, LowRank], sources: Sequence[Adapter], dtype, report: MergeReport
) -> Path:
    return write_adapter(
        output,
        modules,
        base_model=report.base_model,
        base_revision=_agreed(a.config.get("revision") for a in sources),
        task_type=_agreed(a.config.get("task_type") for a in sources),
        dtype=dtype,
        extra_files={REPORT_FILE: report.to_json()},
    )


def _common_base(sources: Sequence[Adapter]) -> str | None:
    """The name of the one base model, a Hub's before a folder's, which other machines do not have; or None."""
    names = sorted((a.base_model for a in sources if a.base_model), key=lambda name: Path(name).is_dir())
    return names[0] if names and all(same_base(names[0], name) for name in names) else None


def _agreed(values: Iterable[str | None]) -> str | None:
    """What all that say something say, or None."""
    said = {value for value in values if value}
    return said.pop() if len(said) == 1 else None


def _seed_of(module: str, seed: int) -> int:
    """A seed of the layer's own, so that results do not depend on which other layers there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{module}".encode()).digest()[:7])

"""Where the parts of a merge are from, as its report says it: folders, checksums, statistics, inner merges."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.adapters import Adapter
from moa.merging.report import Source
from moa.merging.statistics import Given, LayerStatistics, Statistics


def described_sources(
    sources: Sequence[Adapter],
    weights: Sequence[float],
    merged: Iterable[str],
    statistics: Mapping[int, Mapping[str, LayerStatistics]],
    output: str | Path | None,
) -> list[Source]:
    """The adapters as the report names them; `statistics` are those that were used, by the adapter's place."""
    return [
        Source(
            name=adapter.name,
            weight=weight,
            path=_relative(adapter.path, output),
            sha256=adapter.sha256,
            config_sha256=adapter.config_sha256,
            initial=_relative(adapter.initial, output),
            initial_sha256=adapter.initial_sha256,
            statistics=of.about if isinstance(of := statistics.get(index), Statistics) else None,
            merge=_relocated(adapter.merged_from, output) if adapter.merged_from else None,
            base_model=adapter.base_model,
            dtype=str(adapter.dtype).removeprefix("torch."),
            modules=len(adapter.shapes),
            ranks=(min(s.r for s in adapter.shapes.values()), max(s.r for s in adapter.shapes.values())),
            missing=[module for module in merged if module not in adapter.shapes],
        )
        for index, (adapter, weight) in enumerate(zip(sources, weights, strict=True))
    ]


def _relative(path: str | Path | None, output: str | Path | None) -> str | None:
    """A path as seen from the folder that is written, so that both can be moved together."""
    if path is None or output is None:
        return None if path is None else str(path)
    return os.path.relpath(Path(path).resolve(), Path(output).resolve())


def base_from(base: str | None, output: str | Path | None) -> str | None:
    """The base model as its name on the Hub, or its folder as seen from the one that is written."""
    return _relative(base, output) if base is not None and Path(base).is_dir() else base


def seen_from(given: Sequence[Given] | None, output: str | Path | None) -> list[str] | None:
    if given is None or not all(isinstance(one, str | Path) for one in given):
        return None
    return [_relative(one, output) for one in given]


def _relocated(report: Mapping[str, Any], output: str | Path | None) -> dict[str, Any]:
    """The report of an inner merge, with its paths as seen from the folder that is written."""
    sources = [dict(source) for source in report["sources"]]
    for source in sources:
        source["path"], source["initial"] = (_relative(source[key], output) for key in ("path", "initial"))
        source["merge"] = _relocated(source["merge"], output) if source["merge"] else None
    base = base_from(report["base_weights"], output)
    return {**report, "sources": sources, "statistics": seen_from(report["statistics"], output), "base_weights": base}

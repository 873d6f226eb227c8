"""One call from adapters to a merged adapter: read, check, merge layer by layer, write, report."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moa.adapters import Adapter, AdapterError, check_name, write_adapter
from moa.low_rank import LowRank, stack
from moa.merging.checks import (
    agreed,
    check_same_base,
    checked_dtype,
    checked_weights,
    common_base,
    common_shapes,
    layer_ranks,
    read_all,
)
from moa.merging.layers import Layers, Progress, no_progress
from moa.merging.ranks import RankRule, chosen_ranks
from moa.merging.registry import Merged, MergeMethod, find_method
from moa.merging.report import REPORT_FILE, Layer, MergeReport, Source
from moa.peft_checks import widest


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
    rank: int | str | RankRule | None = None,
    output: str | Path | None = None,
    name: str | None = None,
    scale: float = 1.0,
    restore_norm: bool = False,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    check_base: bool = True,
    statistics: Sequence[Any] | None = None,
    objective: Any = None,
    progress: Progress = no_progress,
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
        rank: rank of the result, at most the sum of the ranks, or all that a layer can have for methods that
            leave the span of the adapters; "full" is that most; "auto" or a `RankRule` chooses one for each
            layer; the default depends on the method.
        output: folder to create, with the adapter and merge_report.json.
        name: what the report calls the result, by default the method's name.
        scale: factor on the result, lambda in the papers.
        restore_norm: also bring each layer to the mean norm of the adapters' updates there.
        seed: for methods that draw random numbers.
        dtype: dtype to store, or its name: float32, bfloat16, float16, float64; the widest of the inputs by default.
        check_base: refuse adapters of different base models.
        statistics: for methods that need them, what `moa statistics` wrote for each adapter; by default the
            file beside each.
        objective: for methods that search or learn their weights, what judges them by examples.
        progress: shows passes over the layers, as `tqdm.tqdm` and `rich.progress.track` do.
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
    wanted = None if dtype is None else checked_dtype(dtype)
    sources = read_all(adapters)
    weights = checked_weights(weights, len(sources))
    if check_base:
        check_same_base(sources)
    weighted = [index for index, w in enumerate(weights) if w != 0]
    merging = [sources[index] for index in weighted]
    shapes = common_shapes(merging)
    rule = RankRule() if rank == "auto" else rank
    ranks = layer_ranks("full" if isinstance(rule, RankRule) else rule, chosen, merging, shapes)
    stored_dtype = wanted or widest(a.dtype for a in merging)
    layers = Layers(merging, torch.tensor([weights[i] for i in weighted], dtype=torch.float64), shapes, progress)
    given = _for_layers(chosen, layers, seed, statistics, objective, weighted)
    if isinstance(rule, RankRule):
        ranks = chosen_ranks(layers, rule, ranks)

    modules: dict[str, LowRank] = {}
    reports: dict[str, Layer] = {}
    for module, updates in layers.streamed(f"merging by {chosen.name}"):
        merged = chosen.function(updates, layers.weights, **given(module, ranks[module]), **options)
        gain = scale * (_norm_restoring(updates, merged) if restore_norm else 1.0)
        modules[module], reports[module] = _stored(merged, gain, stored_dtype, sum(u.rank for u in updates))
    report = MergeReport(
        name=name or chosen.name,
        method=chosen.name,
        paper=chosen.paper,
        base_model=common_base(sources),
        scale=scale,
        restore_norm=restore_norm,
        rank=asdict(rule) if isinstance(rule, RankRule) else rule,
        seed=seed,
        dtype=str(stored_dtype).removeprefix("torch."),
        options=options,
        sources=_described(sources, weights, shapes),
        layers=reports,
        versions={"moa-peft": version("moa-peft"), "torch": torch.__version__},
    )
    return MergeResult(modules, report, _write(output, modules, sources, stored_dtype, report) if output else None)


def _for_layers(
    method: MergeMethod, layers: Layers, seed: int, statistics: Sequence[Any] | None, objective: Any, kept: list[int]
):
    """What a method is given beside updates, weights and options: a function of the layer and its rank."""
    if "objective" in method.needs and objective is None:
        raise ValueError(
            f"{method.name} looks for weights by examples and was given none: pass objective=..., "
            "or on the command line --model and --tasks"
        )
    if "statistics" in method.needs:
        from moa.merging.statistics import statistics_of

        known = statistics_of(layers.adapters, None if statistics is None else [statistics[i] for i in kept])

    def given(module: str, rank: int | None) -> dict[str, Any]:
        return method.given(
            rank=rank,
            seed=_seed_of(module, seed),
            seeds=[_seed_of(f"{module}:{name}", seed) for name in layers.names],
            module=module,
            layers=layers,
            objective=objective,
            **({"statistics": [of.get(module) for of in known]} if "statistics" in method.needs else {}),
        )

    return given


def _norm_restoring(updates: Sequence[LowRank], merged: Merged) -> float:
    """mean_i ||delta_i|| / ||M||, over the adapters that have the layer; 1 for a merge that is zero."""
    norms = [norm for norm in (update.norm() for update in updates) if norm > 0]
    size = merged.update.norm()
    return sum(norms) / len(norms) / size if norms and size > 0 else 1.0


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
        base_revision=agreed(a.config.get("revision") for a in sources),
        task_type=agreed(a.config.get("task_type") for a in sources),
        dtype=dtype,
        extra_files={REPORT_FILE: report.to_json()},
    )


def _seed_of(module: str, seed: int) -> int:
    """A seed of the layer's own, so that results do not depend on which other layers there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{module}".encode()).digest()[:7])

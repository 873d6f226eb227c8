"""One call from adapters to a merged adapter: read, check, merge layer by layer, write, report."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moa.adapters import Adapter, Extras, Kind, check_name, write_adapter
from moa.low_rank import LowRank, inner
from moa.merging.carried import beside_updates, check_carried
from moa.merging.checks import (
    agreed,
    check_output,
    check_same_base,
    checked_dtype,
    checked_weights,
    common_base,
    common_kinds,
    common_shapes,
    layer_ranks,
    read_all,
)
from moa.merging.layers import Layers, Progress, no_progress
from moa.merging.provenance import described_sources, seen_from
from moa.merging.ranks import RankRule, chosen_ranks, padded
from moa.merging.registry import Merged, MergeMethod, find_method
from moa.merging.report import CANCELLED, REPORT_FILE, Layer, MergeReport
from moa.merging.statistics import Given, LayerStatistics, statistics_of
from moa.peft_checks import widest


@dataclass(frozen=True)
class MergeResult:
    """What `merge` gives back.

    Attributes:
        modules: layer name to merged update, in the dtype that is or would be stored. In a merge of DoRA adapters,
            what its magnitudes multiply together with the base model's weight.
        report: what was done and what it cost.
        path: the folder that was written, None when none was asked for.
        extras: what the merged adapter holds beside the updates; empty for a merge of plain LoRA.
        kinds: of the layers that are not linear.
        task_type, revision: of all adapters, where they agree.
    """

    modules: dict[str, LowRank]
    report: MergeReport
    path: Path | None
    extras: Extras = field(default_factory=Extras)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    task_type: str | None = None
    revision: str | None = None

    def adapter(self, name: str) -> Adapter:
        """The merged adapter in memory, to merge it further."""
        return Adapter(
            name=name,
            base_model=self.report.base_model,
            modules=self.modules,
            dtype=getattr(torch, self.report.dtype),
            path=self.path,
            config={"task_type": self.task_type, "revision": self.revision},
            kinds=self.kinds,
            extras=self.extras,
            merged_from=self.report.to_dict(),
        )


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
    base: Any = None,
    initial: Mapping[str, str | Path] | None = None,
    statistics: Sequence[Given] | None = None,
    objective: Any = None,
    progress: Progress = no_progress,
    **options: Any,
) -> MergeResult:
    """Merge LoRA adapters into one, without building their base model.

    Layers are streamed: the factors of one layer are read, merged in float64, rounded once and kept; nothing
    but the result grows with the model. A layer that an adapter lacks counts as unchanged by it. What adapters
    hold beside their updates is merged as `moa.merging.carried` and `moa.merging.dora` say.

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
        base: the base model, as a folder, Hub name or live model; needed where adapters hold DoRA magnitudes,
            modules_to_save, trained biases or trained tokens, whose merge depends on its weights.
        initial: name or folder of an adapter that was initialised by PiSSA, OLoRA, CorDA or LoRA-GA, to the folder
            of the same adapter before training; see `moa.adapters.read_adapter`.
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
    if output is not None:
        check_output(output)
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be a finite number other than 0, got {scale}")
    wanted = None if dtype is None else checked_dtype(dtype)
    sources = read_all(adapters, initial, plain=False)
    weights = checked_weights(weights, len(sources))
    if check_base:
        check_same_base(sources, base)
    weighted = [index for index, w in enumerate(weights) if w != 0]
    merging = [sources[index] for index in weighted]
    shapes, kinds = common_shapes(merging), common_kinds(merging)
    check_carried(merging, chosen, kinds, base)
    rule = RankRule() if rank == "auto" else rank
    reads_statistics = "statistics" in chosen.needs or (isinstance(rule, RankRule) and rule.by == "loss")
    _check_used("statistics", statistics, reads_statistics, chosen)
    _check_used("objective", objective, "objective" in chosen.needs, chosen)
    ranks = layer_ranks("full" if isinstance(rule, RankRule) else rule, chosen, merging, shapes)
    stored_dtype = wanted or widest(a.dtype for a in merging)
    used = torch.tensor([weights[i] for i in weighted], dtype=torch.float64)
    extras, dora, base_name = beside_updates(
        merging, used, chosen, scale=scale, base=base, kinds=kinds, dtype=stored_dtype
    )
    if restore_norm and extras:
        raise ValueError(
            f"restore_norm changes the updates alone, and these adapters hold {', '.join(extras.names)} too: use scale"
        )
    layers = Layers(dora.adapters if dora else merging, used, shapes, progress)
    known = None
    if reads_statistics:
        known = _known_statistics(layers, statistics, len(sources), weighted)
    given = _for_layers(chosen, layers, seed, known, objective)
    stored_ranks = {}
    if isinstance(rule, RankRule):
        stored_ranks = chosen_ranks(layers, rule, ranks, known)
        ranks = {module: min(rank, stored_ranks[module]) for module, rank in ranks.items()}

    modules: dict[str, LowRank] = {}
    reports: dict[str, Layer] = {}
    magnitudes: dict[str, torch.Tensor] = {}
    for module, updates in layers.streamed(f"merging by {chosen.name}"):
        merged = chosen.function(updates, layers.weights, **given(module, ranks[module]), **options)
        if stored_ranks and rule.pads:
            merged = replace(merged, update=padded(merged.update, stored_ranks[module]))
        gain = scale * (_norm_restoring(updates, merged) if restore_norm else 1.0)
        rows = dora.gain(module, gain) if dora else None
        modules[module], reports[module] = _stored(merged, gain, rows, stored_dtype, updates, layers.weights)
        if dora:
            magnitudes[module] = dora.magnitude(module, modules[module], rows)
    extras = replace(extras, magnitude=magnitudes)
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
        check_base=check_base,
        objective=objective.describe() if "objective" in chosen.needs else None,
        sources=described_sources(sources, weights, shapes, dict(zip(weighted, known or (), strict=False)), output),
        statistics=seen_from(statistics, output),
        layers=reports,
        carried=extras.names,
        base_weights=base_name,
        versions={"moa-peft": version("moa-peft"), "torch": torch.__version__},
    )
    task_type, revision = (agreed(a.config.get(key) for a in sources) for key in ("task_type", "revision"))
    result = MergeResult(modules, report, None, extras, kinds, task_type, revision)
    return replace(result, path=_write(output, result, stored_dtype)) if output else result


def _check_used(what: str, given: Any, used: bool, method: MergeMethod) -> None:
    if given is not None and not used:
        raise ValueError(f"{method.name} looks at no {what}: leave {what} out, or choose another method")


def _for_layers(
    method: MergeMethod, layers: Layers, seed: int, statistics: Sequence[Mapping[str, Any]] | None, objective: Any
) -> Callable[[str, int | None], dict[str, Any]]:
    """What a method is given beside updates, weights and options: a function of the layer and its rank."""
    if "objective" in method.needs and objective is None:
        raise ValueError(
            f"{method.name} looks for weights by examples and was given none: pass objective=..., "
            "or on the command line --model and --tasks"
        )

    def given(module: str, rank: int | None) -> dict[str, Any]:
        return method.given(
            rank=rank,
            run_seed=seed,
            seed=_seed_of(module, seed),
            seeds=[_seed_of(f"{module}:{name}", seed) for name in layers.names],
            module=module,
            layers=layers,
            statistics=[of.get(module) for of in statistics or ()],
            objective=objective,
        )

    return given


def _known_statistics(
    layers: Layers, given: Sequence[Given] | None, sources: int, weighted: Sequence[int]
) -> list[Mapping[str, LayerStatistics]]:
    """The statistics of the adapters that have a weight."""
    if given is not None and len(given) != sources:
        raise ValueError(f"statistics must be one for each adapter: got {len(given)} for {sources} adapters")
    return statistics_of(layers.adapters, None if given is None else [given[index] for index in weighted])


def _norm_restoring(updates: Sequence[LowRank], merged: Merged) -> float:
    """mean_i ||delta_i|| / ||M||, over the adapters that have the layer; 1 for a merge in which they cancel."""
    norms = [norm for norm in (update.norm() for update in updates) if norm > 0]
    size = merged.update.norm()
    mean = sum(norms) / len(norms) if norms else 0.0
    return mean / size if size > CANCELLED * mean else 1.0


def _stored(
    merged: Merged,
    scale: float,
    rows: torch.Tensor | None,
    dtype: torch.dtype,
    updates: Sequence[LowRank],
    weights: torch.Tensor,
) -> tuple[LowRank, Layer]:
    """Scale and round one merged layer, and say what that and its rank have cost.

    `rows` is what a DoRA magnitude will multiply each row by, which its update is therefore divided by.
    """
    update = merged.update.scaled(scale)
    if rows is not None:
        update = LowRank(update.B / rows[:, None], update.A)
    stored = update.to(dtype)
    kept = merged.update.norm() ** 2
    exact = kept + merged.dropped
    return stored, Layer(
        stacked_rank=sum(update.rank for update in updates),
        rank=stored.rank,
        energy=exact * scale * scale,
        inputs=sum((float(w) * update.norm()) ** 2 for w, update in zip(weights, updates, strict=True)),
        dropped=merged.dropped / exact if exact else 0.0,
        rounding=_rounding(update, stored.to(torch.float64)) if kept else 0.0,
        facts=dict(merged.facts),
    )


def _rounding(exact: LowRank, stored: LowRank) -> float:
    """||stored - exact|| / ||exact||, from the differences of the factors: B A - B' A' = (B - B') A + B' (A - A')."""
    first, second = LowRank(exact.B - stored.B, exact.A), LowRank(stored.B, exact.A - stored.A)
    error = inner(first, first) + 2 * inner(first, second) + inner(second, second)
    return math.sqrt(max(error, 0.0)) / exact.norm()


def _write(output: str | Path, result: MergeResult, dtype: torch.dtype) -> Path:
    return write_adapter(
        output,
        result.modules,
        base_model=result.report.base_model,
        base_revision=result.revision,
        task_type=result.task_type,
        dtype=dtype,
        extra_files={REPORT_FILE: result.report.to_json()},
        kinds=result.kinds,
        extras=result.extras,
    )


def _seed_of(module: str, seed: int) -> int:
    """A seed of the layer's own, so that results do not depend on which other layers there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{module}".encode()).digest()[:7])

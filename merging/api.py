"""One call from adapters to a merged adapter: read, check, merge layer by layer, report, write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moa.adapters import Adapter, Extras, Kind, read_adapter, write_adapter
from moa.errors import one_line
from moa.low_rank import LowRank
from moa.merging.asked import Asked
from moa.merging.carried import Beside, beside_updates, check_carried, check_nothing_beside
from moa.merging.checks import (
    agreed,
    check_same_base,
    checked_weights,
    common_base,
    common_shapes,
    layer_ranks,
    read_all,
)
from moa.merging.finishing import Finish, Finished
from moa.merging.given import for_layers, known_statistics
from moa.merging.layers import Layers, Progress, no_progress
from moa.merging.members import Members
from moa.merging.provenance import base_from, described_sources
from moa.merging.ranks import RankRule, chosen_ranks
from moa.merging.registry import find_method
from moa.merging.report import REPORT_FILE, MergeReport
from moa.merging.statistics import Given, LayerStatistics
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
        agreed_on = {"task_type": self.task_type, "revision": self.revision}
        return Adapter(
            name=name,
            base_model=self.report.base_model,
            modules=self.modules,
            dtype=getattr(torch, self.report.dtype),
            path=self.path,
            config=read_adapter(self.path).config if self.path else agreed_on,
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

    Layers are streamed, as many at a time as torch has threads, but no more than four: the factors of a layer are
    read, merged in float64, rounded once and kept; nothing but the result grows with the model. A layer that an
    adapter lacks counts as unchanged by it. What adapters hold beside their updates is merged as
    `moa.merging.carried` and `moa.merging.dora` say.

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
        seed: for methods that draw random numbers, for each layer and adapter by its name: adapters from folders and
            from memory draw the same where they are called the same.
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
    asked = Asked(
        method=chosen,
        options=chosen.check_options(options),
        rank=rank,
        output=output,
        name=name,
        scale=scale,
        restore_norm=restore_norm,
        seed=seed,
        dtype=dtype,
        check_base=check_base,
        base=base,
        statistics=statistics,
        objective=objective,
    )
    sources = read_all(adapters, initial, plain=False)
    members = Members(sources, checked_weights(weights, len(sources)))
    if check_base:
        check_same_base(sources, base)
    check_together(asked, members)
    ranks = layer_ranks("full" if asked.rule else asked.rank, chosen, members.merging, members.shapes)
    stored = asked.dtype or widest(adapter.dtype for adapter in members.merging)

    beside = beside_updates(
        members.merging, members.used, chosen, scale=scale, base=base, kinds=members.kinds, dtype=stored
    )
    updates_of = beside.dora.adapters if beside.dora else members.merging
    layers = Layers(updates_of, members.used, members.shapes, progress)
    known = None
    if asked.reads_statistics:
        known = known_statistics(layers, statistics, len(sources), members.places)
    finished = _finished(asked, layers, ranks, known, Finish(scale, restore_norm, stored, beside.dora))
    result = _result(asked, members, beside, known, finished, stored)
    return replace(result, path=_write(output, result)) if output else result


def check_together(asked: Asked, members: Members) -> None:
    """Refuse adapters that cannot be merged together in this way: sizes, and what they hold beside their updates."""
    common_shapes(members.merging)
    check_carried(members.merging, asked.method, members.kinds, asked.base)
    if asked.restore_norm:
        check_nothing_beside(members.merging)


def _finished(
    asked: Asked,
    layers: Layers,
    ranks: Mapping[str, int | None],
    known: Sequence[Mapping[str, LayerStatistics]] | None,
    finish: Finish,
) -> dict[str, Finished]:
    """Merge all layers; nothing but the result grows with the model."""
    if asked.rule:
        allowed = chosen_ranks(layers, asked.rule, ranks, known)
        ranks = {module: min(rank, allowed[module]) for module, rank in ranks.items()}
        finish = replace(finish, filled=allowed if asked.rule.pads else {})
    given = for_layers(asked.method, layers, ranks, asked.seed, known, asked.objective)

    def work(module: str, updates: list[LowRank]) -> Finished:
        try:
            merged = asked.method.function(updates, layers.weights, **given(module), **asked.options)
            return finish(module, merged, updates, layers.weights)
        except (OverflowError, torch.linalg.LinAlgError) as error:
            raise ValueError(
                f"{asked.method.name} cannot merge {module} ({one_line(error)}): its factors or the weights are so "
                "large that products of them leave the range of numbers, give smaller ones"
            ) from error

    return dict(layers.mapped(f"merging by {asked.method.name}", work))


def _result(
    asked: Asked,
    members: Members,
    beside: Beside,
    known: Sequence[Mapping[str, LayerStatistics]] | None,
    finished: Mapping[str, Finished],
    stored: torch.dtype,
) -> MergeResult:
    """What was merged, and the report of it."""
    magnitudes = {module: of.magnitude for module, of in finished.items() if of.magnitude is not None}
    extras = replace(beside.extras, magnitude=magnitudes)
    used = dict(zip(members.places, known or (), strict=False))
    report = MergeReport(
        **asked.told(),
        base_model=common_base(members.sources),
        dtype=str(stored).removeprefix("torch."),
        sources=described_sources(members.sources, members.weights, members.shapes, used, asked.output),
        layers={module: of.report for module, of in finished.items()},
        carried=extras.names,
        base_weights=base_from(beside.base, asked.output),
        versions={"moa-peft": version("moa-peft"), "torch": torch.__version__},
    )
    task_type, revision = (agreed(a.config.get(key) for a in members.sources) for key in ("task_type", "revision"))
    modules = {module: of.update for module, of in finished.items()}
    return MergeResult(modules, report, None, extras, members.kinds, task_type, revision)


def _write(output: str | Path, result: MergeResult) -> Path:
    return write_adapter(
        output,
        result.modules,
        base_model=result.report.base_model,
        base_revision=result.revision,
        task_type=result.task_type,
        dtype=getattr(torch, result.report.dtype),
        extra_files={REPORT_FILE: result.report.to_json()},
        kinds=result.kinds,
        extras=result.extras,
    )

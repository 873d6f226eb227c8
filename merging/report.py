"""What a merge did: printed, returned, and stored beside the adapter as merge_report.json."""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

REPORT_FILE = "merge_report.json"
CANCELLED = 1e-12
"""A merge smaller than this share of its adapters is what rounding leaves of updates that cancel."""


@dataclass(frozen=True)
class Source:
    """One of the merged adapters.

    Attributes:
        weight: the weight it was given; 0 leaves it out.
        ranks: smallest and largest rank of its layers.
        missing: layers that others adapt and it does not: it counts as leaving them unchanged.
        path: its folder, relative to that of the result where there is one.
        sha256: hash of its weights file, None for an adapter of a live model.
        config_sha256: hash of what its config says about ranks and scalings.
        initial: folder of the adapter before training, where its product was taken out.
        initial_sha256: hash of the weights there.
        statistics: what the statistics that were used were collected from.
        merge: the report of the merge that made it, for one without a folder.
    """

    name: str
    weight: float
    path: str | None
    sha256: str | None
    base_model: str | None
    dtype: str
    modules: int
    ranks: tuple[int, int]
    missing: list[str]
    config_sha256: str | None = None
    initial: str | None = None
    initial_sha256: str | None = None
    statistics: Mapping[str, Any] | None = None
    merge: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Layer:
    """One merged layer.

    Attributes:
        stacked_rank: sum of the adapters' ranks.
        rank: rank of the result.
        energy: ||M||^2 of the result before it was fitted into its rank.
        inputs: sum_i ||w_i delta_i||^2, what the adapters had to give.
        dropped: share of that energy lost to the rank.
        rounding: relative error of the stored factors against the computed ones.
        facts: what the method reports of itself.
    """

    stacked_rank: int
    rank: int
    energy: float
    inputs: float
    dropped: float
    rounding: float
    facts: Mapping[str, float]


@dataclass(frozen=True)
class MergeReport:
    """Everything needed to know, and to repeat, a merge. Holds no time: equal merges give equal reports.

    Attributes:
        rank: the rank asked for, or the rule that chose it; None for the method's own.
        carried: what the result holds beside its updates, to the layers or parameters that have it.
        base_weights: the base model that was read for that.
        check_base: whether adapters of other base models were refused.
        statistics: the files of statistics that were named, one for each adapter.
        objective: the examples that judged the weights, where a method looked for them.
        energy_dropped: share of the energy of all layers lost to the rank.
        rounding: relative error from storing the factors in `dtype`, over all layers.
    """

    name: str
    method: str
    paper: str | None
    base_model: str | None
    scale: float
    restore_norm: bool
    rank: int | str | dict[str, Any] | None
    seed: int
    dtype: str
    options: dict[str, Any]
    sources: list[Source]
    layers: dict[str, Layer]
    versions: dict[str, str]
    carried: dict[str, list[str]] = field(default_factory=dict)
    base_weights: str | None = None
    check_base: bool = True
    objective: dict[str, Any] | None = None
    statistics: list[str] | None = None
    energy_dropped: float = field(init=False)
    rounding: float = field(init=False)

    def __post_init__(self):
        energy = sum(layer.energy for layer in self.layers.values())
        dropped = sum(layer.energy * layer.dropped for layer in self.layers.values())
        kept = sum(layer.energy * (1 - layer.dropped) for layer in self.layers.values())
        error = sum(layer.energy * (1 - layer.dropped) * layer.rounding**2 for layer in self.layers.values())
        object.__setattr__(self, "energy_dropped", dropped / energy if energy else 0.0)
        object.__setattr__(self, "rounding", (error / kept) ** 0.5 if kept else 0.0)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each adapter by name."""
        return {source.name: source.weight for source in self.sources}

    @property
    def facts(self) -> dict[str, float]:
        """What the method reports of itself, as the median over layers."""
        return {fact: statistics.median(found) for fact, found in self._facts().items()}

    @property
    def emptied(self) -> list[str]:
        """Layers that adapters change and the result does not, but for rounding: the updates cancel, or are cut."""
        kept = {module: layer.energy * (1 - layer.dropped) for module, layer in self.layers.items()}
        return [module for module, layer in self.layers.items() if kept[module] <= CANCELLED**2 * layer.inputs]

    def _facts(self) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        for layer in self.layers.values():
            for fact, value in layer.facts.items():
                values.setdefault(fact, []).append(value)
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as stored."""
        return asdict(self)

    def to_json(self) -> str:
        """The content of merge_report.json."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def __rich__(self):
        """A table of the sources over one line each of what came out and what it cost."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.method} merge of {len(self.sources)} adapters", title_justify="left")
        for column in ("adapter", "weight", "rank", "layers", "missing", "sha256"):
            table.add_column(column, justify="left" if column in ("adapter", "sha256") else "right")
        for source in self.sources:
            table.add_row(
                Text(source.name),  # brackets in it are no markup
                f"{source.weight:.4g}",
                _span(*source.ranks),
                str(source.modules),
                str(len(source.missing)),
                _origin(source),
            )
        return Group(table, *(Text(line) for line in self._lines()))

    def _lines(self) -> list[str]:
        ranks = [layer.rank for layer in self.layers.values()]
        options = ", ".join(f"{k}={v}" for k, v in self.options.items())
        lines = [
            f"{len(ranks)} layers of rank {_span(min(ranks), max(ranks))}, {self.dtype}"
            f"{f', {options}' if options else ''}{f', scale {self.scale:g}' if self.scale != 1 else ''}",
            f"energy dropped by the rank {self.energy_dropped:.2%}, rounding at saving {self.rounding:.1e}",
        ]
        lines += [_told(fact, found) for fact, found in self._facts().items()]
        if self.emptied:
            lines.append(f"{len(self.emptied)} of {len(ranks)} layers come out as zero, such as {self.emptied[0]}")
        if self.carried:
            what = ", ".join(f"{what} ({len(names)})" for what, names in self.carried.items())
            against = f" against {self.base_weights}" if self.base_weights else ""
            lines.append(f"carried along as weighted sums{against}: {what}")
        lacking = {s.name: len(s.missing) for s in self.sources if s.missing}
        if lacking:
            names = ", ".join(f"{name} {count}" for name, count in lacking.items())
            lines.append(f"layers that an adapter lacks: {names}")
        return lines


def _told(fact: str, values: list[float]) -> str:
    """A fact as its median over layers, with the range where they differ."""
    middle, least, most = statistics.median(values), min(values), max(values)
    where = "all layers" if least == most else f"median over layers, {least:.3g} to {most:.3g}"
    return f"{fact.replace('_', ' ')}: {middle:.3g} ({where})"


def _span(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _origin(source: Source) -> str:
    """Where an adapter's weights are from, in one column."""
    if source.sha256:
        return source.sha256[:12]
    return f"merged: {source.merge['method']}" if source.merge else "live model"

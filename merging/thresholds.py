"""Exact thresholds over more entries than are ever held: the k-th largest entry of a layer, or of a whole adapter.

A sample of the entries gives a bracket around the k-th largest. One pass over all entries then counts those
above the bracket and keeps the few inside, among which the k-th largest is found exactly. Should the bracket
have missed it, the pass is repeated with a wider one.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from moa.merging.layers import Layers
from moa.merging.streaming import DenseRows, Thinning

LAYER_SAMPLE, MODEL_SAMPLE = 2**16, 2**20
"""Entries of each adapter that are drawn at most to set a bracket, over one layer or over all."""
DEVIATIONS = 5.0
"""Half the width of the first bracket, in standard deviations of the sample's quantile."""
LEAST_MARGIN = 0.4
"""Entries of the sample for each of them, so that the bracket grows also where all or nearly all entries are kept."""

T = TypeVar("T")
Pass = Callable[[Callable[[str, DenseRows], T]], Iterable[tuple[str, T]]]
"""Gives each layer that shares a threshold to a function, perhaps several at a time; names and what it says."""


class Cut(NamedTuple):
    """How many entries to keep: floor(density * total) of them, after the floor(outliers * total) largest."""

    density: float
    outliers: float = 0.0

    def counts(self, total: int) -> list[int]:
        """How many largest entries to keep, and, where there are outliers, how many largest of those to remove."""
        kept = int(self.density * total)
        top = min(int(self.outliers * total), total - kept)
        return [kept + top, top] if self.outliers > 0 else [kept]


class Trim(NamedTuple):
    """The largest entries of a matrix: those above a size, and the first `ties` of the `equal` that have it."""

    size: float
    ties: int
    equal: int

    def thinning(self) -> Thinning:
        """A fresh function for one pass over the rows."""
        size = np.float32(self.size)
        if self.ties == 0 or self.ties == self.equal:
            floor = float(np.nextafter(size, np.float32(0)) if self.ties else size)
            return lambda rows: hardshrink(rows, floor)
        left = self.ties

        def thin(rows: Tensor) -> Tensor:
            nonlocal left
            tied = rows.abs() == self.size
            first = tied & (tied.flatten().cumsum(0).view_as(tied) <= left)
            left -= int(first.sum())
            return hardshrink(rows, self.size) + rows * first

        return thin


def thinnings(dense: DenseRows, cut: Cut, layers: Layers | None = None, module: str = "") -> dict[int, Thinning]:
    """For each adapter of a layer what cuts it, by its entries in this layer, or in all `layers`."""
    if layers is not None:
        found = layers.once(model_trims, cut)
    else:
        found = trims(lambda work: [(module, work(module, dense))], cut, math.prod(dense.shape), LAYER_SAMPLE)
    return {i: _between(*found[module, i]) for i in dense}


def model_trims(layers: Layers, cut: Cut) -> dict[tuple[str, int], list[Trim]]:
    """The trims of all layers, each adapter's entries compared over all layers that it changes."""

    def over_all(work: Callable[[str, DenseRows], T]) -> Iterator[tuple[str, T]]:
        return layers.mapped(
            "finding thresholds", lambda module, updates: work(module, DenseRows(updates, layers.weights))
        )

    return trims(over_all, cut, sum(o * n for o, n in layers.shapes.values()), MODEL_SAMPLE)


def trims(over: Pass, cut: Cut, entries: int, sample: int) -> dict[tuple[str, int], list[Trim]]:
    """By layer and adapter the trims at each of the cut's counts.

    Args:
        over: a pass over the layers.
        entries: how many entries the layers have together.
        sample: about how many of them to draw at most.
    """

    def drawn(module: str, dense: DenseRows) -> dict[int, tuple[int, np.ndarray]]:
        places = sampled_places(dense.shape, entries, sample)
        return {i: (math.prod(dense.shape), dense.entries(i, *places).abs().numpy()) for i in dense}

    present = dict(over(drawn))
    searches = {}
    for i in sorted({i for of in present.values() for i in of}):
        sizes, samples = zip(*(of[i] for of in present.values() if i in of), strict=True)
        known = np.concatenate(samples)
        searches[i] = [Search(i, count, sum(sizes), known, floor=0.0) for count in cut.counts(sum(sizes))]

    def show(see: See) -> None:
        for _ in over(lambda module, dense: _show_sizes(module, dense, see)):
            pass

    settle([search for of in searches.values() for search in of], show)
    return {(module, i): [s.trim(module) for s in searches[i]] for module, of in present.items() for i in of}


def sampled_places(shape: tuple[int, int], entries: int, sample: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of a layer's share of the sample, the same each time.

    Of E entries (2 E)^(2/3) are drawn, where `sample` allows it: more cost more than the narrower bracket saves,
    in which E / sqrt(drawn) of them, times a constant, are to be partitioned.
    """
    count = math.ceil(min(sample, (2 * entries) ** (2 / 3)) * math.prod(shape) / entries)
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randint(size, (count,), generator=generator) for size in shape)
    return rows, columns


See = Callable[[str, int, np.ndarray], None]
"""Takes a layer, an adapter, and some of that adapter's values there."""


class Search:
    """Looks for the count-th largest of one adapter's values.

    Args:
        sample: some of the values, in any order.
        floor: values not above it are of no interest; where that leaves fewer than `count`, it is the result.
    """

    def __init__(self, adapter: int, count: int, total: int, sample: np.ndarray, floor: float = -math.inf):
        self.adapter, self.count, self.floor = adapter, count, floor
        self.share, self.sample = count / total, sample
        self.size = math.inf
        self._bracket(DEVIATIONS)

    def _bracket(self, deviations: float) -> None:
        m = len(self.sample)
        margin = deviations * (math.sqrt(self.share * (1 - self.share) / m) + LEAST_MARGIN / m)
        high, low = math.ceil((1 - self.share + margin) * m), math.floor((1 - self.share - margin) * m)
        within = [at for at in (low, high) if 0 < at < m]
        ordered = np.partition(self.sample, within) if within else self.sample
        self.deviations = deviations
        self.high = float(ordered[high]) if high < m else math.inf
        self.low = max(float(np.nextafter(ordered[low], -np.inf)) if low > 0 else -math.inf, self.floor)
        self.above: Counter[str] = Counter()
        self.inside: dict[str, list[np.ndarray]] = {}

    def see(self, module: str, values: np.ndarray) -> None:
        """Count what is above the bracket, keep what is inside; of several layers at the same time, too."""
        over = values > self.high
        self.above[module] += int(np.count_nonzero(over))
        self.inside.setdefault(module, []).append(values[(values > self.low) & ~over])

    def settled(self) -> bool:
        """Whether the bracket held the count-th largest, now `size`; otherwise it is wider for the next pass."""
        if self.count == 0:
            return True
        found = np.concatenate([values for parts in self.inside.values() for values in parts])
        needed = self.count - self.above.total()
        if needed <= 0 or (needed > len(found) and self.low > self.floor):
            self._bracket(4 * self.deviations)
            return False
        if needed > len(found):
            self.size = self.floor
        else:
            at = len(found) - needed
            found.partition(at)
            self.size = float(found[at])
            self.ties = needed - int(np.count_nonzero(found > self.size))
        return True

    def trim(self, module: str) -> Trim:
        """The cut of one layer; to be asked for in the order of the pass, whose first ties are kept."""
        if self.size in (math.inf, self.floor):
            return Trim(self.size, 0, 0)
        equal = sum(int(np.count_nonzero(values == np.float32(self.size))) for values in self.inside[module])
        ties = min(equal, self.ties)
        self.ties -= ties
        return Trim(self.size, ties, equal)


def settle(searches: Sequence[Search], show: Callable[[See], None]) -> None:
    """Show all values to the searches until each has found its size: once, but for a chance of one in a million."""
    while searches:
        show(partial(_see_each, searches))
        searches = [search for search in searches if not search.settled()]


def _see_each(searches: Sequence[Search], module: str, adapter: int, values: np.ndarray) -> None:
    for search in searches:
        if search.adapter == adapter:
            search.see(module, values)


def _show_sizes(module: str, dense: DenseRows, see: See) -> None:
    for block in dense.blocks():
        for i in dense:
            see(module, i, dense.rows(i, block).abs_().numpy().ravel())


def _between(most: Trim, outliers: Trim | None = None) -> Thinning:
    keep = most.thinning()
    if outliers is None:
        return keep
    remove = outliers.thinning()
    return lambda rows: keep(rows) - remove(rows)

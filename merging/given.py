"""What a method is given beside updates, weights and its own options: ranks, seeds, statistics, an objective."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moa.merging.layers import Layers
from moa.merging.registry import MergeMethod
from moa.merging.statistics import Given, LayerStatistics, statistics_of


def known_statistics(
    layers: Layers, given: Sequence[Given] | None, sources: int, weighted: Sequence[int]
) -> list[Mapping[str, LayerStatistics]]:
    """The statistics of the adapters that have a weight.

    Args:
        given: one for each adapter, or None for the file beside each.
        sources: how many adapters there are.
        weighted: the places of those that have a weight, which are those in `layers`.

    Raises:
        ValueError: as many given as there are no adapters, or statistics that do not belong to their adapter.
    """
    if given is not None and len(given) != sources:
        raise ValueError(f"statistics must be one for each adapter: got {len(given)} for {sources} adapters")
    return statistics_of(layers.adapters, None if given is None else [given[index] for index in weighted])


def for_layers(
    method: MergeMethod,
    layers: Layers,
    ranks: Mapping[str, int | None],
    seed: int,
    statistics: Sequence[Mapping[str, Any]] | None,
    objective: Any,
) -> Callable[[str], dict[str, Any]]:
    """A layer's name to what the method is given there: of all in `GIVEN` what it has a parameter for."""

    def given(module: str) -> dict[str, Any]:
        return method.given(
            rank=ranks[module],
            run_seed=seed,
            seed=_seed_of(module, seed),
            seeds=[_seed_of(f"{module}:{name}", seed) for name in layers.names],
            module=module,
            layers=layers,
            statistics=[of.get(module) for of in statistics or ()],
            objective=objective,
        )

    return given


def _seed_of(module: str, seed: int) -> int:
    """A seed of the layer's own, so that results do not depend on which other layers there are.

    An adapter's own is by its name: not by its place, as order must not matter, nor by its factors, which may be
    written in other ways.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{module}".encode()).digest()[:7])

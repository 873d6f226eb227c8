"""How far merges are from dense float64 versions of their papers' formulas, on the narrowest layers of a model.

A method whose result is of low rank is compared as it was written, cut to the rank that it was asked for. The others
fill the layer and are then fitted into a rank: they are compared before that, the layer merged once more alone, at
its full rank (which also makes the scope of a trim no matter). These compute in float32: where its rounding decides an
election or what is trimmed, an entry is another one, which a layer shows as an error of 1e-3 or less.
"""

import math
from pathlib import Path

import torch
from dense_entries import REFERENCES as ENTRIES
from dense_entries import WITH_DATA
from dense_spectral import REFERENCES as SPECTRAL
from dense_spectral import cut
from merge_inputs import Shape
from merge_run import MERGED, inputs
from torch import Tensor

from moa.adapters import Adapter, read_adapter
from moa.low_rank import LowRank
from moa.merging import merge
from moa.merging.registry import MergeMethod, find_method
from moa.merging.statistics import read_statistics

REFERENCES = {**SPECTRAL, **ENTRIES}


def compare(folder: Path, name: str, shape: Shape, count: int) -> float | None:
    """Largest relative error over `count` layers; None for a method that no formula determines.

    These are methods that draw at random or cluster, those that follow examples, and trees of other methods.
    """
    if name not in REFERENCES and name not in WITH_DATA:
        return None
    method = find_method(name)
    errors = [_error(folder, method, layer) for layer in shape.narrowest(count)]
    return max(errors, default=math.nan)


def _error(folder: Path, method: MergeMethod, layer: str) -> float:
    paths, given = inputs(folder, method, "module")
    adapters = [read_adapter(path, dtype=torch.float64) for path in paths]
    deltas = torch.stack([adapter.modules[layer].delta() / len(adapters) for adapter in adapters])
    if method.fills_the_layer:
        alone = [Adapter(a.name, a.base_model, {layer: a.modules[layer]}, torch.float64) for a in adapters]
        got = merge(alone, method.name, rank="full", dtype=torch.float64, **given).modules[layer]
    else:
        got = read_adapter(folder / MERGED, dtype=torch.float64).modules[layer]
    expected = _expected(method.name, deltas, got, [read_statistics(f)[layer] for f in given.get("statistics", ())])
    return float((got.delta() - expected).norm() / expected.norm().clamp(min=torch.finfo().tiny))  # 0 of 0 is right


def _expected(name: str, deltas: Tensor, got: LowRank, statistics: list) -> Tensor:
    if name in WITH_DATA:
        return WITH_DATA[name](deltas, statistics)
    return cut(REFERENCES[name](deltas, got.rank), got.rank)

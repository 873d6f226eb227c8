"""Merge LoRA adapters: several in, one vanilla adapter out, from disk to disk, without a base model.

    from moa.merging import merge
    result = merge(["adapters/sst2", "adapters/mnli"], "ties", density=0.3, output="merged")
    print(result.report)

A method is one registered function (`methods()` lists them); `merge` reads, checks, streams, writes, reports.
"""

if __name__ != "moa.merging":
    raise ImportError("import moa.merging, not merging: run 'pip install -e .' in the repository first")

from moa.merging import (  # noqa: F401 (registers the methods)
    activations,
    clustering,
    compress,
    consensus,
    dropout,
    elementwise,
    gates,
    hierarchy,
    interference,
    linear,
    spectral,
    spherical,
    subspace,
)
from moa.merging.api import MergeResult, merge
from moa.merging.geometry import Geometry, geometry
from moa.merging.incremental import MergeState
from moa.merging.ranks import RankRule
from moa.merging.recipe import merge_recipe, read_recipe
from moa.merging.registry import Merged, MergeMethod, find_method, merge_method, methods
from moa.merging.report import MergeReport

__all__ = [
    "Geometry",
    "MergeMethod",
    "MergeReport",
    "MergeResult",
    "MergeState",
    "Merged",
    "RankRule",
    "find_method",
    "geometry",
    "merge",
    "merge_method",
    "merge_recipe",
    "methods",
    "read_recipe",
]

"""What the merge benchmarks merge: random adapters with a model's shapes, and what some methods ask for beside them.

Random adapters are the hardest case: no direction is stronger than another. `statistics` are of two made-up data sets,
which the adapters have in turn; `RandomObjective` judges weights by how far they are from ones it drew, so that a
search costs what the search itself costs, and examples cost nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa.adapters import write_adapter
from moa.low_rank import LowRank
from moa.merging.statistics import Statistics, fisher_key, gram_key, write_statistics


class Shape(NamedTuple):
    """The sizes of a model's layers, and of the adapters for it."""

    hidden: int
    intermediate: int
    kv: int
    layers: int
    adapters: int
    rank: int

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one decoder layer, [o, n] each."""
        h, m, kv = self.hidden, self.intermediate, self.kv
        attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
        mlp = {"gate_proj": (m, h), "up_proj": (m, h), "down_proj": (h, m)}
        return {
            **{f"self_attn.{name}": size for name, size in attention.items()},
            **{f"mlp.{name}": size for name, size in mlp.items()},
        }

    def modules(self) -> dict[str, tuple[int, int]]:
        """All linear layers by name."""
        layers, matrices = range(self.layers), self.matrices().items()
        return {f"model.layers.{layer}.{name}": size for layer in layers for name, size in matrices}

    def narrowest(self, count: int) -> dict[str, tuple[int, int]]:
        """The `count` smallest of them."""
        return dict(sorted(self.modules().items(), key=lambda item: math.prod(item[1]))[:count])


SHAPES = {
    "qwen2-1.5b": Shape(1536, 8960, 256, layers=28, adapters=7, rank=8),
    "llama3-8b": Shape(4096, 14336, 1024, layers=32, adapters=8, rank=16),
}
DATA_SETS = 2


def adapter_folders(folder: Path) -> list[Path]:
    """The adapters that `write_adapters` wrote."""
    return sorted(folder.glob("adapter*"))


def write_adapters(folder: Path, shape: Shape, progress: Callable[[Sequence[int], str], Iterable[int]]) -> None:
    """adapter0, adapter1, ..: entries normally distributed, updates of about equal norm in layers of equal size."""
    generator = torch.Generator().manual_seed(0)
    for i in progress(range(shape.adapters), "writing adapters"):
        modules = {
            name: LowRank(
                torch.randn(o, shape.rank, generator=generator) / math.sqrt(o),
                torch.randn(shape.rank, n, generator=generator) / math.sqrt(n),
            )
            for name, (o, n) in shape.modules().items()
        }
        write_adapter(folder / f"adapter{i:02d}", modules, base_model="random", dtype=torch.float32)


def statistics_files(folder: Path, adapters: int) -> list[Path]:
    """The statistics of each adapter: the data sets in turn."""
    return [folder / f"statistics{i % DATA_SETS}.safetensors" for i in range(adapters)]


def write_data_sets(folder: Path, shape: Shape) -> None:
    """A Gram matrix for each width that layers read, shared by all of them, and a Fisher vector for each layer."""
    layers: dict[str, dict[str, Any]] = {}
    first: dict[int, str] = {}
    for name, (_, n) in shape.modules().items():
        first.setdefault(n, name)
        layers[name] = {"gram": gram_key(first[n]), "tokens": 1000, "fisher": True}
    for i, file in enumerate(statistics_files(folder, DATA_SETS)):
        generator = torch.Generator().manual_seed(i)
        tensors = {gram_key(name): _gram(n, generator) for n, name in first.items()}
        tensors |= {
            fisher_key(name): torch.rand(o, generator=generator) + 0.1 for name, (o, _) in shape.modules().items()
        }
        write_statistics(file, Statistics(tensors.__getitem__, layers), {})


def _gram(n: int, generator: torch.Generator) -> Tensor:
    """[n, n] of inputs that vary along every feature, and along 64 common directions more."""
    directions = torch.randn(n, 64, generator=generator) / 8
    return directions @ directions.T + torch.diag(torch.rand(n, generator=generator) + 0.1)


class RandomObjective:
    """An `Objective` whose loss is the mean squared distance of the gates from some that were drawn."""

    def __init__(self, names: Sequence[str], layers: Sequence[str]):
        self.names, self.layers, self.tasks = list(names), list(layers), list(names)
        self.best = torch.rand(len(names), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def losses(self, gates: Tensor, shares: Tensor, *, crossed: bool) -> Tensor:
        """[candidates] the distance of each."""
        return (gates - self.best).square().mean(dim=-1)

    def step_loss(self, gates: Tensor, shares: Tensor, **how: Any) -> Tensor:
        """The mean distance over layers, whatever kind of loss is asked for."""
        return (gates - self.best).square().mean()

    def describe(self) -> Mapping[str, Any]:
        """Nothing but its name."""
        return {"kind": "random"}

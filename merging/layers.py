"""All layers of a merge, streamed: what a method asks that decides over the whole model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from threading import RLock
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from moa.adapters import Adapter
from moa.low_rank import LowRank, gram
from moa.merging.parallel import in_turn, using_threads

T = TypeVar("T")


@runtime_checkable
class Progress(Protocol):
    """Wraps a list of layer names to show how far a pass over them is, as `tqdm.tqdm` and `rich.progress.track` do."""

    def __call__(self, names: Sequence[str], description: str, /) -> Iterable[str]: ...


def no_progress(names: Sequence[str], description: str, /) -> Iterable[str]:
    """Shows nothing."""
    return names


class Layers(Mapping[str, list[LowRank]]):
    """Layer name to the updates of all adapters there, float64, read anew each time so that nothing piles up.

    Attributes:
        names: the adapters' names; those of weight 0 are not there.
        weights: [n], one for each adapter.
        shapes: layer name to the size [o, i] of its matrix.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        weights: Tensor,
        shapes: Mapping[str, tuple[int, int]],
        progress: Progress = no_progress,
    ):
        self.adapters = [adapter.to(torch.float64) for adapter in adapters]
        self.names = [adapter.name for adapter in adapters]
        self.weights, self.shapes, self.progress = weights, shapes, progress
        self._known: dict[tuple, Any] = {}
        self._deciding, self._threads = RLock(), torch.get_num_threads()

    def __getitem__(self, module: str) -> list[LowRank]:
        nothing = LowRank.zero(self.shapes[module], torch.float64)
        return [adapter.modules.get(module, nothing) for adapter in self.adapters]

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def streamed(self, description: str) -> Iterator[tuple[str, list[LowRank]]]:
        """One pass over all layers, with a progress bar under this description."""
        for module in self.progress(list(self.shapes), description):
            yield module, self[module]

    def mapped(self, description: str, work: Callable[[str, list[LowRank]], T]) -> Iterator[tuple[str, T]]:
        """Layer name to `work(name, updates)`, in one pass like `streamed`, several layers at the same time."""
        with closing(in_turn(lambda module: work(module, self[module]), list(self.shapes))) as done:
            for module in self.progress(list(self.shapes), description):
                yield module, next(done)

    def once(self, compute: Callable[..., T], *args: Any) -> T:
        """`compute(layers, *args)`, computed with all threads when the first layer asks, and kept for the others."""
        key = (compute, *args)
        with self._deciding:
            if key not in self._known:
                with using_threads(self._threads):
                    self._known[key] = compute(self, *args)
            return self._known[key]


def whole_gram(layers: Layers) -> Tensor:
    """[n, n] inner products <delta_i, delta_j> of the whole adapters: the Grams of all layers added up."""
    grams = layers.mapped("comparing adapters", lambda _, updates: gram(updates))
    return torch.stack([G for _, G in grams]).sum(dim=0)

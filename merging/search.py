"""Weights found without gradients: nevergrad proposes them, an objective judges several at once."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging.journal import Journal
from moa.merging.layers import Layers
from moa.merging.objective import FAILED, Found, Judged, Objective

logger = logging.getLogger(__name__)


class Tried:
    """Candidates and their losses so far; those that the journal has are not judged again.

    Attributes:
        gates, losses: of every candidate, in the order of the search.
        failed: how many had no finite loss.
    """

    def __init__(self, judged: Judged, journal: Journal, *, crossed: bool, l1: float):
        self.judged, self.journal, self.crossed, self.l1 = judged, journal, crossed, l1
        self.gates: list[list[float]] = []
        self.losses: list[float] = []
        self.failed = 0
        self._written = journal.content or {"gates": [], "losses": []}

    def judge(self, gates: Float[Tensor, "candidates n"]) -> list[float]:
        """loss + l1 * mean|g| of each candidate."""
        asked, seen = gates.tolist(), len(self.gates)
        known = slice(seen, seen + len(asked))
        if len(self._written["gates"]) < known.stop:
            losses = self.judged.losses(gates, crossed=self.crossed) + self.l1 * gates.abs().mean(dim=1)
            # a search turns a last digit, which the order of a sum decides, into other weights
            losses = losses.round(decimals=9).tolist()
        elif self._written["gates"][known] == asked:
            losses = self._written["losses"][known]
        else:
            raise ValueError(
                f"journal {str(self.journal.path)!r} is of another version of nevergrad: name another file"
            )
        self.gates += asked
        self.losses += losses
        self.failed += sum(loss >= FAILED for loss in losses)
        if len(self._written["gates"]) < known.stop:
            self.journal.write({"gates": self.gates, "losses": self.losses, "least_loss": min(self.losses)})
        return losses

    @property
    def best(self) -> tuple[list[float], float]:
        """The gates of the least loss, the first of equals, and that loss."""
        least = min(self.losses)
        return self.gates[self.losses.index(least)], least


def search(
    layers: Layers,
    objective: Objective,
    crossed: bool,
    budget: int,
    parallel: int,
    l1: float,
    bound: float,
    seed: int,
    journal: str | None,
) -> Found:
    """Gates of the least loss + l1 * mean|g|, one for each adapter; see `moa.merging.gates.lorahub` for the options.

    The base model alone and the plain average are judged first, beside the budget: what is found is no worse.
    """
    judged = Judged.of(layers, objective)
    n = len(judged.searched)
    if n == 0:
        return judged.found(torch.zeros(1, 0, dtype=torch.float64))
    if crossed:
        _check_equal_ranks(judged)
    settings = {"crossed": crossed, "budget": budget, "parallel": parallel, "l1": l1, "bound": bound, "seed": seed}
    tried = Tried(judged, Journal(journal, {**judged.recipe, **settings}), crossed=crossed, l1=l1)
    of_base, of_average = tried.judge(torch.tensor([[0.0] * n, [1 / n] * n], dtype=torch.float64))
    sizes = [min(parallel, budget - start) for start in range(0, budget, parallel)]
    with _optimizer(n, budget, parallel, bound, seed) as optimizer:
        for step, _ in enumerate(layers.progress([f"batch {size}" for size in sizes], "searching weights")):
            asked = [optimizer.ask() for _ in range(sizes[step])]
            losses = tried.judge(torch.tensor([candidate.value.tolist() for candidate in asked], dtype=torch.float64))
            for candidate, loss in zip(asked, losses, strict=True):
                optimizer.tell(candidate, loss)
            logger.info("%d of %d candidates, least loss so far %.4f", sum(sizes[: step + 1]), budget, tried.best[1])
    gates, loss = tried.best
    return judged.found(
        torch.tensor([gates], dtype=torch.float64),
        loss=loss,
        loss_of_base=of_base,
        loss_of_average=of_average,
        failed_candidates=float(tried.failed),
    )


@contextmanager
def _optimizer(size: int, budget: int, parallel: int, bound: float, seed: int) -> Iterator[Any]:
    """NGOpt, LoRAHub's own, where one candidate is judged at a time; CMA for several.

    For several, NGOpt chooses a method that fails on few dimensions (nevergrad 1.0.12 with numpy 2).
    """
    try:
        import nevergrad
    except ImportError as error:
        raise ValueError("a search for weights needs nevergrad: run pip install 'moa-peft[search]'") from error
    import numpy

    box = nevergrad.p.Array(init=numpy.zeros(size), lower=-bound, upper=bound)
    box.random_state = numpy.random.RandomState(seed % 2**32)
    kind = nevergrad.optimizers.NGOpt if parallel == 1 else nevergrad.optimizers.CMA
    optimizer = kind(box, budget=budget, num_workers=parallel)
    with warnings.catch_warnings():
        for about in ("COBYLA: Invalid", "orphanated injected solution"):  # settings that nevergrad makes
            warnings.filterwarnings("ignore", message=about)
        try:
            yield optimizer
        finally:
            # a sequential optimiser waits in a thread of its own, for which an interrupted process would wait for ever
            waiting = getattr(getattr(optimizer, "optim", optimizer), "_messaging_thread", None)
            if waiting is not None:
                waiting.stop()
                waiting._thread.join()


def _check_equal_ranks(judged: Judged) -> None:
    adapters = [adapter for adapter in judged.layers.adapters if adapter.name in judged.searched]
    for module in judged.layers:
        ranks = sorted({adapter.shapes[module].r for adapter in adapters if module in adapter.shapes})
        if len(ranks) > 1:
            raise ValueError(
                f"lorahub adds factors, so all adapters need the same rank, got ranks "
                f"{' and '.join(map(str, ranks))} in {module!r}: use lorahub_linear, which takes any ranks"
            )

"""From what a method made of a layer to what is stored: norm, scale, DoRA, rounding, and what they cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from moa.low_rank import LowRank, stack
from moa.merging.dora import DoraMerge
from moa.merging.ranks import padded
from moa.merging.registry import Merged
from moa.merging.report import CANCELLED, Layer


class Finished(NamedTuple):
    """One layer as it is or would be stored.

    Attributes:
        update: in the dtype to store.
        magnitude: [o] of DoRA, None in a merge of plain LoRA.
        report: what came out and what it cost.
    """

    update: LowRank
    magnitude: Tensor | None
    report: Layer


@dataclass(frozen=True)
class Finish:
    """What every layer of a merge goes through after its method.

    Attributes:
        scale: factor on the result.
        restore_norm: also bring it to the mean norm of the adapters' updates.
        dtype: to store.
        dora: the way to magnitudes, None where no adapter has one.
        filled: the rank that each layer is filled up to by zeros; empty where layers keep what they have.
    """

    scale: float
    restore_norm: bool
    dtype: torch.dtype
    dora: DoraMerge | None
    filled: Mapping[str, int] = field(default_factory=dict)

    def __call__(self, module: str, merged: Merged, updates: Sequence[LowRank], weights: Tensor) -> Finished:
        """Fill up, scale and round one merged layer."""
        if self.filled:
            merged = replace(merged, update=padded(merged.update, self.filled[module]))
        gain = self.scale * (_norm_restoring(updates, merged) if self.restore_norm else 1.0)
        exact = merged.update.scaled(gain)
        if self.dora is None:
            stored, magnitude = exact.to(self.dtype), None
        else:
            rows = self.dora.gain(module, gain)  # what the magnitude will multiply, the update is divided by
            exact = LowRank(exact.B / rows[:, None], exact.A)
            stored = exact.to(self.dtype)
            magnitude = self.dora.magnitude(module, stored, rows)
        return Finished(stored, magnitude, _reported(merged, gain, exact, stored, updates, weights))


def _norm_restoring(updates: Sequence[LowRank], merged: Merged) -> float:
    """mean_i ||delta_i|| / ||M||, over the adapters that have the layer; 1 for a merge in which they cancel."""
    norms = [norm for norm in (update.norm() for update in updates) if norm > 0]
    size = merged.update.norm()
    mean = sum(norms) / len(norms) if norms else 0.0
    return mean / size if size > CANCELLED * mean else 1.0


def _reported(
    merged: Merged, gain: float, exact: LowRank, stored: LowRank, updates: Sequence[LowRank], weights: Tensor
) -> Layer:
    """What the rank and the rounding have cost."""
    kept = merged.update.norm() ** 2
    energy = kept + merged.dropped
    return Layer(
        stacked_rank=sum(update.rank for update in updates),
        rank=stored.rank,
        energy=energy * gain * gain,
        inputs=sum((float(w) * update.norm()) ** 2 for w, update in zip(weights, updates, strict=True)),
        dropped=merged.dropped / energy if energy else 0.0,
        rounding=_rounding(exact, stored.to(torch.float64)) if kept else 0.0,
        facts=dict(merged.facts),
    )


def _rounding(exact: LowRank, stored: LowRank) -> float:
    """||stored - exact|| / ||exact||, from the differences of the factors: B A - B' A' = (B - B') A + B' (A - A')."""
    error = stack([LowRank(exact.B - stored.B, exact.A), LowRank(stored.B, exact.A - stored.A)])
    size = exact.norm()
    return error.norm() / size if size else 0.0  # what cancels may leave factors whose product is 0

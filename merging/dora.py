"""DoRA adapters among those to merge: their weighted sum is one DoRA adapter, exactly.

Adapter i makes a layer's weight W_i = diag(g_i) (W0 + B_i A_i), with g_i = m_i / ||W0 + B_i A_i||_row (g = 1 for plain
LoRA). So

    W0 + sum_i w_i (W_i - W0) = diag(h) W0 + sum_i w_i diag(g_i) B_i A_i,    h = 1 + sum_i w_i (g_i - 1),

which is a DoRA adapter again: B = B_M / h, A = A_M and m = h ||W0 + B A||_row, where B_M A_M is the merge of the
updates diag(g_i) B_i A_i. A linear method merges these exactly; any other method does with them what it does, and the
gains g are still averaged linearly, which is our generalisation.

Paper: https://arxiv.org/abs/2402.09353 (the method; the merge is not in it).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from moa.adapters import LINEAR, Adapter, AdapterError, Kind, LazyUpdates
from moa.base_weights import BaseWeights
from moa.low_rank import LowRank
from moa.merging.parallel import layers_at_once

SMALLEST_GAIN = 1e-6
ROWS_AT_ONCE = 4096


def row_norms(W0: Float[Tensor, "o n"], update: LowRank, *, rows_at_once: int = ROWS_AT_ONCE) -> Float[Tensor, " o"]:
    """Norms of the rows of W0 + B A, in float64, without forming it.

    ||W0_j||^2 + 2 <(W0 A^T)_j, B_j> + B_j (A A^T) B_j^T, for some rows of W0 at a time.
    """
    update = update.to(torch.float64)
    squares = []
    for weight, B in zip(W0.split(rows_at_once), update.B.split(rows_at_once), strict=True):
        weight = weight.to(torch.float64)
        crossed = 2 * (weight @ update.A.T) + B @ (update.A @ update.A.T)
        squares.append(weight.square().sum(dim=1) + (crossed * B).sum(dim=1))
    return torch.cat(squares).clamp(min=0).sqrt()


class DoraMerge:
    """The row gains of adapters of which some are DoRA, and the way back to one DoRA adapter.

    Attributes:
        adapters: the same ones, with updates diag(g_i) B_i A_i.
    """

    def __init__(
        self, adapters: Sequence[Adapter], weights: Float[Tensor, " n"], kinds: Mapping[str, Kind], base: BaseWeights
    ):
        self._plain = [adapter.to(torch.float64) for adapter in adapters]
        self._weights, self._kinds, self._base = weights, kinds, base
        self._gain = cache(self._computed_gain)  # [o] for each layer and adapter, at the cost of a look at W0
        self._weight = lru_cache(layers_at_once())(self._read_weight)  # all adapters ask for a layer, then the next
        self.adapters = [self._prepared(index) for index in range(len(adapters))]

    def gain(self, module: str, scale: float = 1.0) -> Float[Tensor, " o"]:
        """h = 1 + scale * sum_i w_i (g_i - 1), what the merged layer's rows of W0 are multiplied by.

        Raises:
            AdapterError: a row that is multiplied by nothing, which no DoRA adapter can express.
        """
        having = [i for i, adapter in enumerate(self._plain) if module in adapter.extras.magnitude]
        h = 1 + scale * sum(float(self._weights[i]) * (self._gain(i, module) - 1) for i in having)
        h = torch.as_tensor(h, dtype=torch.float64).expand(self._shape(module)[0])
        if gone := int((h.abs() < SMALLEST_GAIN).sum()):
            raise AdapterError(
                f"with these weights {gone} rows of {module!r} lose the base model's part altogether, which no DoRA "
                f"adapter can express: choose other weights or another scale"
            )
        return h

    def magnitude(self, module: str, stored: LowRank, h: Float[Tensor, " o"]) -> Float[Tensor, " o"]:
        """m = h ||W0 + B A||_row, for the factors as they are stored, so that PEFT divides by the same norms.

        In float32 at least: what a magnitude loses, every weight of its row loses.
        """
        fine = torch.promote_types(stored.B.dtype, torch.float32)
        return (h * row_norms(self._weight(module), stored)).to(fine)

    def _prepared(self, index: int) -> Adapter:
        adapter = self._plain[index]
        if not adapter.extras.magnitude:
            return adapter

        def gained(module: str, dtype: torch.dtype) -> LowRank:
            update = adapter.modules[module]
            return LowRank(self._gain(index, module)[:, None] * update.B, update.A).to(dtype)

        return replace(adapter, modules=LazyUpdates(gained, adapter.shapes, torch.float64))

    def _computed_gain(self, index: int, module: str) -> Float[Tensor, " o"]:
        adapter = self._plain[index]
        norms = row_norms(self._weight(module), adapter.modules[module])
        if not norms.all():
            raise AdapterError(
                f"{module!r} has a row of zeros in the base model with adapter {adapter.name!r}, and DoRA divides by "
                f"its norm: check that this is the base model it was trained on"
            )
        return adapter.extras.magnitude[module].to(torch.float64) / norms

    def _read_weight(self, module: str) -> Float[Tensor, "o n"]:
        return self._base.weight(module, self._shape(module), self._kinds.get(module, LINEAR))

    def _shape(self, module: str) -> tuple[int, int]:
        return next((a.shapes[module].o, a.shapes[module].n) for a in self._plain if module in a.shapes)

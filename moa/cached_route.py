"""A KV cache remembers the route that wrote it: another adapter's keys and values answer another adapter's questions.

A conversation that shares a cache goes on with the route of its first turn; `MoaModel.reroute` empties the cache, so
that the whole conversation is routed and read anew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from moa.route_state import RouteState

ROUTE = "moa_route"  # an attribute of the cache, so that it goes where the cache goes


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens already."""
    return cache is not None and cache.get_seq_length() > 0


def remember(cache: Any, state: RouteState) -> None:
    """Write the route that runs now into a cache; a base model's is a row of zeros."""
    if cache is None:
        return
    if state.off:
        setattr(cache, ROUTE, torch.zeros(1, len(state.experts)))
    elif state.weights is not None:
        setattr(cache, ROUTE, state.weights.detach() if state.weights.requires_grad else state.weights)
    else:  # one adapter of PEFT's, or weights that layers compute
        forget(cache)


def recall(cache: Any) -> Tensor | None:
    """The weights that a cache was written with; None where no mixture wrote it, or not through weights."""
    return getattr(cache, ROUTE, None)


def forget(cache: Any) -> None:
    """Let a cache be used with any route; it should be empty."""
    if hasattr(cache, ROUTE):
        delattr(cache, ROUTE)


def check_route(cache: Any, weights: Tensor) -> None:
    """Refuse to go on from a cache with other weights than those that wrote it.

    Raises:
        ValueError: the cache remembers another route.
    """
    written = recall(cache) if is_filled(cache) else None
    if written is not None and written is not weights and not _same(written, weights):
        raise ValueError(
            "the cache was written with another route than the one that is pinned, so its keys and values are other "
            "adapters': pin the same route, or call model.reroute(past_key_values) and pass the whole conversation"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two routes weigh alike; a missing last column is a fallback without weight, one row is for all."""
    if one.dim() != other.dim():
        return False
    columns = max(one.shape[-1], other.shape[-1])
    one, other = (F.pad(weights, (0, columns - weights.shape[-1])) for weights in (one, other))
    fits = all(a == b or 1 in (a, b) for a, b in zip(one.shape, other.shape, strict=True))
    return fits and bool((one == other.to(one)).all())

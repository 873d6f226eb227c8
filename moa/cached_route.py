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
EXPERTS = "moa_experts"  # another one: whose the columns of the route's weights are


def is_filled(cache: Any) -> bool:
    """Whether a cache holds tokens already."""
    return cache is not None and cache.get_seq_length() > 0


def running(state: RouteState) -> Tensor | str:
    """What runs now, as a cache remembers it: weights, those of a base model zeros, or words."""
    if state.off:
        return torch.zeros(1, len(state.experts))
    if state.weights is not None:
        return state.weights.detach() if state.weights.requires_grad else state.weights
    return "experts that each token chooses" if state.alone is None else f"the adapter {state.alone}"


def remember(cache: Any, state: RouteState) -> None:
    """Write what runs now into a cache."""
    if cache is not None:
        setattr(cache, ROUTE, running(state))
        setattr(cache, EXPERTS, state.experts)


def recall(cache: Any, state: RouteState) -> Tensor | None:
    """The weights that a cache was written with; None where no mixture wrote it, or not through weights.

    Raises:
        ValueError: they are of other experts than there are now.
    """
    written = getattr(cache, ROUTE, None)
    if not isinstance(written, Tensor):
        return None
    _check_experts(cache, state)
    return written


def _check_experts(cache: Any, state: RouteState) -> None:
    then = getattr(cache, EXPERTS, state.experts)
    if then != state.experts and is_filled(cache):
        raise ValueError(
            f"the cache was written when the experts were {', '.join(then)}, and now they are "
            f"{', '.join(state.experts)}: call model.reroute(past_key_values) and pass the whole conversation"
        )


def forget(cache: Any) -> None:
    """Let a cache be used with any route; it should be empty."""
    if hasattr(cache, ROUTE):
        delattr(cache, ROUTE)


def check_route(cache: Any, state: RouteState) -> None:
    """Refuse to go on from a cache with another route than that which wrote it; of one that no mixture wrote, nothing
    is known.

    Raises:
        ValueError: the cache remembers another route, or weights of other experts.
    """
    written = getattr(cache, ROUTE, None)
    if isinstance(written, Tensor):
        _check_experts(cache, state)
    if written is None or _same(written, running(state)):
        return  # before the length is asked for, which a static cache on a GPU would wait for at every token
    if is_filled(cache):
        raise ValueError(
            "the cache was written with another route than the one that runs now, so its keys and values are other "
            "adapters': run the same, or call model.reroute(past_key_values) and pass the whole conversation"
        )


def _same(one: Tensor | str, other: Tensor | str) -> bool:
    """Whether two routes weigh alike; a missing last column is a fallback without weight, one row is for all."""
    if one is other or isinstance(one, str) or isinstance(other, str):
        return one is other or (isinstance(one, str) and one == other)
    if one.dim() != other.dim():
        return False
    columns = max(one.shape[-1], other.shape[-1])
    one, other = (F.pad(weights, (0, columns - weights.shape[-1])) for weights in (one, other))
    fits = all(a == b or 1 in (a, b) for a, b in zip(one.shape, other.shape, strict=True))
    return fits and bool((one == other.to(one)).all())

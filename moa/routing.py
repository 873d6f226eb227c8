"""What a router decided: a weight per sequence and expert, how to get one from logits, and when to trust none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

RoutingMode = Literal["hard", "top_k", "soft", "conformal"]
Granularity = Literal["sequence", "layer", "token"]
TokenRouter = Literal["arrow", "gates"]

EXPERT, MERGED, BASE = range(3)
"""What runs a sequence: experts; the merged adapter, where it is too strange for them; or the base model."""


@dataclass(frozen=True)
class Routing:
    """The experts' weights for each sequence of a batch.

    Attributes:
        weights: `[batch, experts]`, or `[batch, layers, experts]` where layers differ; each row sums to one. A column
            more is the merged adapter's, and a row of zeros runs the base model.
        logits: `[batch, experts]`, the router's calibrated scores; None where nobody was asked (the caller named
            the experts).
        strangeness: `[batch]`, how unlike the experts' own prompts each is; None where nobody looked.
        fallback: `[batch]`, `EXPERT`, `MERGED` or `BASE`; None where nobody looked.
    """

    weights: Float[Tensor, "batch *layers columns"]
    logits: Float[Tensor, "batch experts"] | None = None
    strangeness: Float[Tensor, " batch"] | None = None
    fallback: Int[Tensor, " batch"] | None = None

    @property
    def experts(self) -> list[int]:
        """Index of the likeliest expert of each sequence, which is not the one that ran it where it fell back."""
        return (self.weights if self.logits is None else self.logits).argmax(dim=-1).tolist()


def route_logits(
    logits: Float[Tensor, "batch experts"], mode: RoutingMode = "hard", top_k: int = 2, floor: float | None = None
) -> Routing:
    """Turn a router's logits into expert weights.

    `hard`: one expert, weight 1. `top_k`: softmax over the `top_k` best, zero elsewhere. `soft`: softmax over all.
    `conformal`: softmax over the experts of at least `floor` probability, or the best one where none has it.

    Raises:
        ValueError: unknown mode, `top_k` outside 1..experts, or `conformal` without a floor.
    """
    check_mode(mode, top_k, logits.shape[-1])
    if mode == "soft":
        return Routing(logits.softmax(dim=-1), logits)
    if mode == "conformal":
        return Routing(_conformal(logits, floor), logits)
    kept = logits.topk(1 if mode == "hard" else top_k, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, kept.indices, kept.values.softmax(dim=-1))
    return Routing(weights, logits)


def _conformal(logits: Float[Tensor, "batch experts"], floor: float | None) -> Float[Tensor, "batch experts"]:
    check_floor(floor)
    best = logits == logits.max(dim=-1, keepdim=True).values
    return logits.masked_fill(~best & (logits.softmax(dim=-1) < floor), -torch.inf).softmax(dim=-1)


def fall_back(
    routing: Routing,
    strangeness: Float[Tensor, " batch"],
    merged_above: float,
    base_above: float,
    *,
    merged: bool,
) -> Routing:
    """Take strange sequences from the experts: to the merged adapter, the strangest to the base model.

    Args:
        merged_above, base_above: the strangeness above which a sequence runs one or the other.
        merged: whether there is a merged adapter; if not, the base model takes its sequences too.
    """
    strange, strangest = strangeness > merged_above, strangeness > (base_above if merged else merged_above)
    fallback = strange.long() + strangest.long()  # the base's threshold is the higher one, so 0, 1 or 2
    weights = routing.weights * (fallback == EXPERT).to(routing.weights)[:, None]
    if merged and (fallback == MERGED).any():  # asking waits for a GPU
        weights = torch.cat([weights, (fallback == MERGED).to(weights)[:, None]], dim=-1)
    return replace(routing, weights=weights, strangeness=strangeness, fallback=fallback)


def route_names(names: Sequence[str], experts: Sequence[str]) -> Routing:
    """One-hot weights for experts named by the caller, one name a sequence (the oracle).

    Raises:
        ValueError: no names, one text instead of a list, or a name that is no expert of this mixture.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"experts are pinned by a list with one name a sequence: got {names!r}")
    unknown = sorted(set(names) - set(experts))
    if unknown:
        raise ValueError(f"no expert is called {unknown[0]!r}: this mixture has {', '.join(experts)}")
    chosen = torch.tensor([list(experts).index(name) for name in names])
    return Routing(torch.nn.functional.one_hot(chosen, len(experts)).float())


def check_granularity(granularity: str, token_router: str = "arrow") -> None:
    """Refuse a granularity that does not exist, or a way to route tokens that does not."""
    if granularity not in get_args(Granularity):
        raise ValueError(
            f"granularity {granularity!r} does not exist: choose one of {', '.join(get_args(Granularity))}"
        )
    if token_router not in get_args(TokenRouter):
        raise ValueError(
            f"tokens are not routed by {token_router!r}: choose one of {', '.join(get_args(TokenRouter))}"
        )


def check_floor(floor: float | None) -> None:
    """Refuse `conformal` for a router that was fitted without the probability from which experts are in its set."""
    if floor is None:
        raise ValueError(
            "routing 'conformal' mixes a set of experts of a known coverage, and this router was fitted without one: "
            "fit it again with 'moa fit-router', or route otherwise"
        )


def check_mode(mode: str, top_k: int, experts: int) -> None:
    """Refuse a routing mode that does not exist, or a `top_k` that the number of experts does not allow."""
    if mode not in get_args(RoutingMode):
        raise ValueError(f"routing {mode!r} does not exist: choose one of {', '.join(get_args(RoutingMode))}")
    if mode == "top_k" and not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} is out of range: this mixture has {experts} experts, give 1 to {experts}")

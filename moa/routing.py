"""What a router decided: a weight per sequence and expert, and how to get one from logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

RoutingMode = Literal["hard", "top_k", "soft"]


@dataclass(frozen=True)
class Routing:
    """The experts' weights for each sequence of a batch.

    Attributes:
        weights: `[batch, experts]`, each row sums to one.
        logits: `[batch, experts]`, the router's calibrated scores; None where nobody was asked (the caller named
            the experts).
    """

    weights: Float[Tensor, "batch experts"]
    logits: Float[Tensor, "batch experts"] | None = None

    @property
    def experts(self) -> list[int]:
        """Index of the heaviest expert of each sequence."""
        return self.weights.argmax(dim=-1).tolist()


def route_logits(logits: Float[Tensor, "batch experts"], mode: RoutingMode = "hard", top_k: int = 2) -> Routing:
    """Turn a router's logits into expert weights.

    `hard`: one expert, weight 1. `top_k`: softmax over the `top_k` best, zero elsewhere. `soft`: softmax over all.

    Raises:
        ValueError: unknown mode, or `top_k` outside 1..experts.
    """
    check_mode(mode, top_k, logits.shape[-1])
    if mode == "soft":
        return Routing(logits.softmax(dim=-1), logits)
    kept = logits.topk(1 if mode == "hard" else top_k, dim=-1)
    weights = torch.zeros_like(logits).scatter(-1, kept.indices, kept.values.softmax(dim=-1))
    return Routing(weights, logits)


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


def check_mode(mode: str, top_k: int, experts: int) -> None:
    """Refuse a routing mode that does not exist, or a `top_k` that the number of experts does not allow."""
    if mode not in get_args(RoutingMode):
        raise ValueError(f"routing {mode!r} does not exist: choose one of {', '.join(get_args(RoutingMode))}")
    if mode == "top_k" and not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k} is out of range: this mixture has {experts} experts, give 1 to {experts}")

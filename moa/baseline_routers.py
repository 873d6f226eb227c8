"""Routers without training, to compare a trained one with: every prompt to all, to any, or to the nearest mean."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from moa.router import SequenceRouter
from moa.routing import Routing, route_names


def uniform(experts: Sequence[str]) -> Routing:
    """All experts in equal parts: one row for a batch of any size. A merge can do as much, in one adapter."""
    return Routing(torch.full((1, len(experts)), 1 / len(experts)))


def at_random(
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"],
    experts: Sequence[str],
    seed: int = 0,
) -> Routing:
    """Any expert, each as likely: what a router must beat.

    A prompt's expert depends on its tokens and the seed alone, whatever batch it comes in.
    """
    rows = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    digests = [hashlib.sha256(f"{seed} {row}".encode()).digest() for row in rows]
    return route_names([experts[int.from_bytes(digest) % len(experts)] for digest in digests], experts)


def nearest_centroid(router: SequenceRouter) -> SequenceRouter:
    """The `centroid` head that reads what a fitted router reads: the expert whose mean of prompts is nearest.

    Raises:
        ValueError: the router was fitted without the means.
    """
    if router.detector is None:
        raise ValueError(
            "the router was fitted without the means of its prompts: fit it again with 'moa fit-router', to compare "
            "it with the nearest of them"
        )
    means = router.detector.means
    other = SequenceRouter(
        router.hidden_size, router.num_experts, pooling=router.pooling, head="centroid", clusters=router.clusters
    ).to(means.device)
    state = {
        "mean": router.mean,
        "std": router.std,
        "head.weight": means,
        "head.bias": -means.square().sum(dim=1) / 2,
    }
    if router.query is not None:
        state["query"] = router.query
    other.load_state_dict(state | {"temperature": other.temperature})
    return other.requires_grad_(False).eval()

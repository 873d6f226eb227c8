"""Granularity `layer`: routers at several depths, each of which decides for the adapted layers from its own on.

    depths 4, 15 of 30:   layers 0 ... 14 follow the router that reads what enters layer 4, layers 15 ... the other

All read the base model's hidden states in one pass to the deepest of them. One is the mixture's router, to which
calibration, strangeness and reports belong; the others live inside it (`SequenceRouter.others`). With soft weights
this is how SMEAR routes (Muqeeth et al. 2023, arXiv:2306.03745), but on states that no expert has changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moa.prefix import layer_numbers
from moa.router import SequenceRouter
from moa.routing import EXPERT, Granularity, Routing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moa.routing_model import RoutingModel


def routers_of(model: RoutingModel, granularity: Granularity | None = None) -> dict[int, SequenceRouter]:
    """The router of each depth, the shallowest first; only the mixture's own where it does not route by layer.

    Args:
        granularity: instead of the mixture's own.
    """
    router, layer = model.moa_router, model.moa_config.router.layer
    if (granularity or model.moa_config.granularity) != "layer":
        return {layer: router}
    return dict(sorted({layer: router, **{int(depth): other for depth, other in router.others.items()}}.items()))


def deepest(model: RoutingModel, granularity: Granularity | None = None) -> int:
    """Up to which layer of the base model a route must be read."""
    return max(routers_of(model, granularity)) if model.moa_router is not None else model.moa_config.router.layer


def check_depths(router: SequenceRouter | None) -> None:
    """Refuse to route by layer with a router of one depth."""
    if router is None or not router.others:
        what = "no router" if router is None else "a router at one depth only"
        raise ValueError(
            f"granularity 'layer' needs routers at several depths, and this mixture has {what}: "
            "fit them with 'moa fit-router --granularity layer'"
        )


def check_others(router: SequenceRouter, layer: int | None) -> None:
    """Refuse routers of other depths that are not like the mixture's own, which describes them all when it is saved.

    Args:
        layer: what the mixture's own reads.
    """
    for depth, other in router.others.items():
        if not depth.isdigit() or int(depth) == layer:
            raise ValueError(f"a router of another depth is called by the layer that it reads: got {depth!r}")
        for what in ("num_experts", "hidden_size", "pooling", "head_kind", "hidden_units", "clusters"):
            ours, theirs = getattr(router, what), getattr(other, what)
            if ours != theirs:
                raise ValueError(
                    f"the router of layer {depth} has {what} {theirs!r}, that of layer {layer} {ours!r}: "
                    "fit them together with 'moa fit-router --granularity layer'"
                )
        if (router.detector is None) != (other.detector is None):
            raise ValueError(f"one of the routers of layers {layer} and {depth} has no detector: fit them together")


def router_of_layers(base: PreTrainedModel, layers: Sequence[str], depths: Sequence[int]) -> list[int]:
    """For each gated layer, the place in `depths`, sorted, of the router that it follows."""
    blocks = layer_numbers(base, layers)
    return [max((place for place, depth in enumerate(depths) if depth <= (block or 0)), default=0) for block in blocks]


def spread(routed: Routing, at_depths: Mapping[int, Tensor], followed: Sequence[int]) -> Routing:
    """The weights of every layer `[batch, layers, columns]`, from those of depths; one that fell back keeps its own.

    Args:
        routed: by the mixture's router, with fallback.
        at_depths: `[batch, experts]` of each depth, the shallowest first.
        followed: place of the depth that each layer follows.
    """
    layers = torch.stack(list(at_depths.values()), dim=1)[:, followed]
    layers = nn.functional.pad(layers, (0, routed.weights.shape[-1] - layers.shape[-1]))
    if routed.fallback is not None:
        layers = layers.where((routed.fallback == EXPERT)[:, None, None], routed.weights[:, None])
    return replace(routed, weights=layers)

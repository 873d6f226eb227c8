"""Routing inside the forward that answers, at no extra cost: the layers before the router's are the base model's own.

    layer:   0 ... k-1    nothing is adapted, in the prefix pass as in the answer
             k            what enters here is read and pooled, and the experts are chosen
             k ...        gated layers read the choice

It takes experts that leave everything before layer k as it is (`--lora_first_layer`); else a prefix pass is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from moa.depths import deepest
from moa.prefix import depth, layer_list, layer_numbers
from moa.routing import Granularity

if TYPE_CHECKING:
    from moa.routed_model import RoutedModel


def reads_in_flight(model: RoutedModel, granularity: Granularity | None = None) -> bool:
    """Whether one router decides for all layers, and no adapter changes what it reads.

    Args:
        granularity: instead of the mixture's own.
    """
    base, layer = model.get_base_model(), model.moa_config.router.layer
    if (granularity or model.moa_config.granularity) == "layer":
        return False
    names = model.route_state.layers
    before = (n for n, k in zip(names, layer_numbers(base, names), strict=True) if k is None or k < layer)
    return not any(base.get_submodule(name).lora_A for name in before)


def prefill_overhead(model: RoutedModel, granularity: Granularity | None = None) -> float:
    """The share of a prefill that routing adds: k / L for a prefix pass over k of L layers, nothing in flight."""
    if reads_in_flight(model, granularity):
        return 0.0
    return deepest(model, granularity) / depth(model.get_base_model())


def can_route(model: RoutedModel) -> bool:
    """Whether this forward may route inside; a router that learns needs gradients, which a recompute would lose."""
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in model.moa_router.parameters())
    return not learns and not torch.compiler.is_compiling() and reads_in_flight(model)


@contextmanager
def routing_in_flight(model: RoutedModel, mask: Bool[Tensor, "batch tokens"]) -> Iterator[None]:
    """Choose the experts when the first forward inside this block reaches the router's layer.

    Args:
        mask: the prompts' tokens.
    """

    @torch.no_grad()
    def choose(_block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = inputs[0] if inputs else named["hidden_states"]
        model.last_routing = model.decide(model.moa_router.pool(states, mask.to(states.device)))
        model.route_state.weights = model.last_routing.weights
        hook.remove()

    decoder = model.get_base_model().get_decoder()
    _, blocks = layer_list(decoder)
    # gone before gradient checkpointing recomputes the block, which finds the choice where it was put
    hook = blocks[model.moa_config.router.layer].register_forward_pre_hook(choose, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()

"""The prefix pass: only the first k layers of the base model, for what the router reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from moa.router import mean_pool


def default_layer(base_model: PreTrainedModel) -> int:
    """A quarter of the depth: deep enough to tell tasks apart, cheap enough to run before every prompt."""
    return max(1, base_model.config.get_text_config().num_hidden_layers // 4)


@torch.no_grad()
def prompt_features(
    base_model: PreTrainedModel,
    layer: int,
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"],
    prompt_mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "batch hidden"]:
    """Hidden state entering `layer`, averaged over the prompt's tokens; costs `layer / depth` of a prefill.

    Args:
        prompt_mask: which tokens are the prompt; None means all that are not padding. The answer must stay out.

    Raises:
        ValueError: `layer` is not a layer of this model, or a sequence has no prompt token.
    """
    decoder = base_model.get_decoder()
    attention_mask = attention_mask.to(input_ids.device)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
    with _first_layers(decoder, layer) as entering:
        decoder(**inputs)
    mask = attention_mask.bool() if prompt_mask is None else prompt_mask & attention_mask.bool()
    return mean_pool(entering[0], mask)


@contextmanager
def _first_layers(decoder: nn.Module, layer: int) -> Iterator[list[Tensor]]:
    """Cut the decoder down to its first `layer` layers; the list receives their output."""
    name, layers = _layer_list(decoder)
    if not 0 < layer <= len(layers):
        raise ValueError(f"the router cannot read layer {layer}: this model has layers 1 to {len(layers)}")
    entering: list[Tensor] = []
    hook = layers[layer - 1].register_forward_hook(
        lambda _module, _inputs, output: entering.append(output[0] if isinstance(output, tuple) else output)
    )
    setattr(decoder, name, layers[:layer])
    try:
        yield entering
    finally:
        setattr(decoder, name, layers)
        hook.remove()


def _layer_list(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    depth = decoder.config.get_text_config().num_hidden_layers
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            return name, child
    raise ValueError(
        f"{type(decoder).__name__} keeps its layers in no list that the router can cut: it cannot be routed"
    )

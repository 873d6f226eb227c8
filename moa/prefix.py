"""The prefix pass: only the first k layers of the base model, for what the router reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel


def default_layer(base_model: PreTrainedModel) -> int:
    """A quarter of the depth: deep enough to tell tasks apart, cheap enough to run before every prompt."""
    return max(1, depth(base_model) // 4)


def candidate_layers(base_model: PreTrainedModel) -> list[int]:
    """What is worth comparing where a router is fitted: an eighth, a quarter and half of the depth."""
    return sorted({max(1, depth(base_model) // share) for share in (8, 4, 2)})


def depth(base_model: PreTrainedModel) -> int:
    """How many layers the model has; the router reads what enters one of them, or leaves the last."""
    return base_model.config.get_text_config().num_hidden_layers


def tokens_held(input_ids: Tensor, attention_mask: Tensor | None) -> Bool[Tensor, "batch tokens"]:
    """Which tokens are no padding; all of them where there is no mask.

    Raises:
        ValueError: no prompts, prompts of no tokens, or one that is no row of a batch; a mask of another shape.
    """
    if input_ids.numel() == 0:
        raise ValueError(f"there is no prompt to route on in input_ids of shape {list(input_ids.shape)}: give some")
    if input_ids.dim() != 2:
        raise ValueError(
            f"prompts are rows of input_ids [batch, tokens], got the shape {list(input_ids.shape)}: ask the tokenizer "
            "for a batch, tokenizer([prompt], return_tensors='pt')"
        )
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"prompts of shape {list(input_ids.shape)} are routed by an attention_mask of that shape, got "
            f"{list(attention_mask.shape)}: pass both as the tokenizer returns them"
        )
    return attention_mask.to(input_ids.device).bool()


def prompt_tokens(
    held: Bool[Tensor, "batch tokens"], prompt_mask: Tensor | None = None
) -> Bool[Tensor, "batch tokens"]:
    """Which tokens a router reads: those that are no padding, and of them the prompt's where a mask says which.

    Asked for before a pass, not after it: looking at a mask on a GPU waits for all that runs there.

    Raises:
        ValueError: a sequence without a single prompt token, of which nothing could be pooled; a mask, or labels, of
            another shape than the tokens.
    """
    if prompt_mask is not None and prompt_mask.shape != held.shape:
        raise ValueError(
            f"a prompt mask, or labels, of shape {list(prompt_mask.shape)} does not say which of the tokens "
            f"{list(held.shape)} are the prompt: give one entry for each token"
        )
    mask = held if prompt_mask is None else held & prompt_mask.to(held.device).bool()
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"sequence {empty[0]} of the batch has no prompt token to route on: give it a prompt")
    return mask


def prompt_features(
    base_model: PreTrainedModel,
    pools: Mapping[int, Callable[[Tensor, Tensor], Tensor]],
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"],
    prompt_mask: Tensor | None = None,
) -> dict[int, Float[Tensor, "batch hidden"]]:
    """Hidden states entering some layers, pooled over the prompt's tokens; costs `layer / depth` of a prefill.

    Args:
        pools: for each layer, what makes one feature of a prompt from the states of its tokens and their mask.
        prompt_mask: which tokens are the prompt; None means all that are not padding. The answer must stay out.

    Raises:
        ValueError: no such layer in this model, or a sequence without a prompt token.
    """
    attention_mask = attention_mask.to(input_ids.device)
    mask = prompt_tokens(attention_mask.bool(), prompt_mask)
    states = prompt_states(base_model, list(pools), input_ids, attention_mask)
    return {layer: pool(one, mask) for one, (layer, pool) in zip(states, pools.items(), strict=True)}


def check_layer(base_model: PreTrainedModel, layer: int) -> None:
    """Refuse a layer that the model does not have."""
    if not 0 < layer <= depth(base_model):
        raise ValueError(f"the router cannot read layer {layer}: this model has layers 1 to {depth(base_model)}")


@torch.no_grad()
def prompt_states(
    base_model: PreTrainedModel,
    layers: Sequence[int],
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"],
) -> list[Float[Tensor, "batch tokens hidden"]]:
    """Hidden states entering each of `layers`, in one pass to the deepest of them.

    Raises:
        ValueError: one of `layers` is not a layer of this model.
    """
    for layer in layers:
        check_layer(base_model, layer)
    decoder = base_model.get_decoder()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(dim=1) - 1).clamp_min(0)
    with _first_layers(decoder, layers) as entering:
        decoder(**inputs)
    return [entering[layer] for layer in layers]


@contextmanager
def _first_layers(decoder: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Cut the decoder down to what the deepest of `layers` needs; the dictionary receives what enters each."""
    name, blocks = layer_list(decoder)
    entering: dict[int, Tensor] = {}

    def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        entering[layer] = output[0] if isinstance(output, tuple) else output

    hooks = [
        blocks[layer - 1].register_forward_hook(lambda _module, _inputs, output, layer=layer: keep(layer, output))
        for layer in layers
    ]
    setattr(decoder, name, blocks[: max(layers)])
    try:
        yield entering
    finally:
        setattr(decoder, name, blocks)
        for hook in hooks:
            hook.remove()


def layer_list(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers, and the name under which it keeps it.

    Raises:
        ValueError: it keeps them in no list.
    """
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth(decoder):
            return name, child
    raise ValueError(
        f"{type(decoder).__name__} keeps its layers in no list that the router can cut: it cannot be routed"
    )


def layer_numbers(base_model: PreTrainedModel, modules: Iterable[str]) -> list[int | None]:
    """The decoder's layer that each module lies in; None for one outside, such as the embeddings."""
    decoder = base_model.get_decoder()
    path = next(name for name, found in base_model.named_modules() if found is decoder)
    inside = f"{path}.{layer_list(decoder)[0]}.".removeprefix(".")
    return [int(name[len(inside) :].split(".")[0]) if name.startswith(inside) else None for name in modules]

"""Which route a forward or a generation takes: the one that is pinned, its cache's, or that of its prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache, GenerationConfig

from moa.cached_route import check_route, is_filled, recall
from moa.packing import check_sequences, padded, sequence_of_tokens

if TYPE_CHECKING:
    from moa.routed_model import RoutedModel


def take_route(
    model: RoutedModel, input_ids: Tensor | None, attention_mask: Tensor | None, given: dict[str, Any]
) -> None:
    """Set what the layers read in this forward; it stays set, for gradient checkpointing runs them once more.

    Args:
        given: the forward's other arguments; `use_cache` is switched off for packed rows.

    Raises:
        ValueError: see `RoutedModel.forward`.
    """
    state, cache = model.route_state, given.get("past_key_values")
    state.token_rows = sequence_of_tokens(input_ids, attention_mask, given, needed=state.by_row)
    if state.pinned:
        if state.token_rows is not None:
            check_sequences(state.token_rows, len(state.weights))
        if state.weights is not None and not state.off:
            check_route(cache, state.weights)
        return
    state.broadcast, state.crossed = True, False
    if state.layer_router is not None:
        state.weights = None
    elif is_filled(cache) or input_ids is None:
        state.weights = _route_of(cache)
    else:
        state.weights = _route_prompts(model, input_ids, attention_mask, given.get("labels"))


def _route_prompts(
    model: RoutedModel, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> Tensor:
    """On what `labels` marks -100, and each part of a packed row apart."""
    prompt_mask = None if labels is None else labels.eq(-100)
    if (sequences := model.route_state.token_rows) is not None:
        input_ids, attention_mask, prompt_mask = padded(input_ids, sequences, labels)
    model.last_routing = model.route(input_ids, attention_mask, prompt_mask=prompt_mask)
    return model.last_routing.weights


def _route_of(cache: Cache | None) -> Tensor:
    """The route that a conversation began with."""
    weights = recall(cache)
    if weights is None:
        raise ValueError(
            "a forward routes on the whole prompt as input_ids: got embeddings, or a cache that this mixture did "
            "not fill; call generate(), or pin the prompt's route: with model.pinned(model.route(prompt)): ..."
        )
    return weights


def route_to_generate(model: RoutedModel, input_ids: Tensor | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the route state for a generation: a row of weights for each row that `generate` makes of the prompts.

    Raises:
        ValueError: see `RoutedModel.generate`.
    """
    state, cache = model.route_state, given.get("past_key_values")
    if state.off or (state.pinned and state.weights is None):
        return {}
    if state.pinned:
        weights = state.weights
        check_route(cache, weights)
        if state.broadcast and len(weights) == 1:
            return {}
    elif state.layer_router is not None:
        return {"weights": None}
    elif is_filled(cache):
        weights = _route_of(cache)
    elif input_ids is None:
        raise ValueError("generate routes on input_ids: got none, pass the tokenised prompts")
    else:
        weights = model.route(input_ids, given.get("attention_mask")).weights
    rows = _rows_of_a_prompt(given.get("generation_config") or model.generation_config, given)
    return {"weights": weights.repeat_interleave(rows, dim=0), "pinned": True}


def _rows_of_a_prompt(config: GenerationConfig, asked: Mapping[str, Any]) -> int:
    """How many rows of a batch `generate` makes of one prompt: its beams, or the sequences to return."""
    return max(asked.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences"))

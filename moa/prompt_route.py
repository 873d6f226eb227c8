"""Which route a forward or a generation takes: the one that is pinned, its cache's, or that of its prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import Cache

from moa.cached_route import check_route, is_filled, recall
from moa.in_flight import can_route, routing_in_flight
from moa.packing import check_sequences, padded, sequence_of_tokens
from moa.prefix import prompt_tokens, tokens_held

if TYPE_CHECKING:
    from moa.route_state import RouteState
    from moa.routed_model import RoutedModel

ROWS_OF_A_PROMPT = ("num_beams", "num_return_sequences")
"""Options of a generation that make more rows than one of a prompt, in a batch."""
NOT_THE_PROMPT_ALONE = (
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "assistant_model",
    "custom_generate",
)
"""Options of a generation whose first forward may hold less than the prompt, or guesses beside it."""


def take_route(
    model: RoutedModel, input_ids: Tensor | None, attention_mask: Tensor | None, given: dict[str, Any]
) -> AbstractContextManager[None]:
    """Set what the layers read in this forward; it stays set, for gradient checkpointing runs them once more.

    The forward must run inside the context that is returned, which may choose the experts on the way.

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
        check_route(cache, state)
        return nullcontext()
    state.broadcast, state.crossed = True, False
    if state.layer_router is not None:
        state.weights = None
        check_route(cache, state)
    elif is_filled(cache) or input_ids is None:
        state.weights = _route_of(cache, state)
    else:
        return _route_prompts(model, input_ids, attention_mask, given.get("labels"))
    return nullcontext()


def _route_prompts(
    model: RoutedModel, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None
) -> AbstractContextManager[None]:
    """On what `labels` marks -100, and each part of a packed row apart; in flight if that can be."""
    prompt_mask = None if labels is None else labels.eq(-100)
    if (sequences := model.route_state.token_rows) is not None:
        input_ids, attention_mask, prompt_mask = padded(input_ids, sequences, labels)
    elif model.moa_router is not None and can_route(model):
        mask = prompt_tokens(tokens_held(input_ids, attention_mask), prompt_mask)
        model.route_state.weights = None
        return routing_in_flight(model, mask)
    model.last_routing = model.route(input_ids, attention_mask, prompt_mask=prompt_mask)
    model.route_state.weights = model.last_routing.weights
    return nullcontext()


def _route_of(cache: Cache | None, state: RouteState) -> Tensor:
    """The route that a conversation began with."""
    weights = recall(cache, state) if is_filled(cache) else None
    if weights is None:
        raise ValueError(
            "a forward routes on the whole prompt as input_ids: got embeddings, or a cache that this mixture did "
            "not fill; call generate(), or pin the prompt's route: with model.pinned(model.route(prompt)): ..."
        )
    return weights


@contextmanager
def one_route(model: RoutedModel, input_ids: Tensor | None, given: Mapping[str, Any]) -> Iterator[None]:
    """Keep one route for a generation inside the block: a row of weights for each row that it makes of the prompts.

    Raises:
        ValueError: see `RoutedModel.generate`.
    """
    fields = {"token_rows": None, "steady": object()}
    asked = {name: _asked(model, given, name) for name in (*ROWS_OF_A_PROMPT, *NOT_THE_PROMPT_ALONE)}
    rows = max(asked[name] or 1 for name in ROWS_OF_A_PROMPT)
    alone = not any(asked[name] for name in NOT_THE_PROMPT_ALONE)
    if alone and _routes_on_the_way(model, input_ids, given):
        mask = prompt_tokens(tokens_held(input_ids, given.get("attention_mask"))).repeat_interleave(rows, dim=0)
        with model.route_state.set(weights=None, pinned=True, **fields), routing_in_flight(model, mask):
            yield
        return
    weights = _weights_to_generate(model, input_ids, given)
    if weights is not None:
        fields |= {"weights": weights.repeat_interleave(rows, dim=0), "pinned": True}
    with model.route_state.set(**fields):
        yield


def mask_of_prompts(model: RoutedModel, input_ids: Tensor | None, given: Mapping[str, Any]) -> Tensor | None:
    """The mask that a generation is given, else the one that transformers infers from padding; None where all counts.

    The router must not read the padding that the answer does not see.
    """
    mask = given.get("attention_mask")
    padding, ends = (_asked(model, given, name) for name in ("pad_token_id", "eos_token_id"))
    if mask is not None or input_ids is None or padding is None:
        return mask
    return None if padding in (ends if isinstance(ends, list) else [ends]) else input_ids.ne(padding).long()


def _asked(model: RoutedModel, given: Mapping[str, Any], name: str) -> Any:
    """An option of a generation: of the call, else of its config, else of the model's, as transformers looks it up."""
    config = given.get("generation_config")
    values = (given.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
    return next((value for value in values if value is not None), None)


def _routes_on_the_way(model: RoutedModel, input_ids: Tensor | None, given: Mapping[str, Any]) -> bool:
    """Whether a generation has prompts to route, and its first forward can do it."""
    state = model.route_state
    if state.off or state.pinned or state.layer_router is not None or model.moa_router is None or input_ids is None:
        return False
    return not is_filled(given.get("past_key_values")) and can_route(model)


def _weights_to_generate(model: RoutedModel, input_ids: Tensor | None, given: Mapping[str, Any]) -> Tensor | None:
    """A row of weights for each prompt; None leaves what runs as it is."""
    state, cache = model.route_state, given.get("past_key_values")
    if state.off or state.pinned:
        check_route(cache, state)
        for_all = state.off or state.weights is None or (state.broadcast and len(state.weights) == 1)
        return None if for_all else state.weights
    if state.layer_router is not None:
        state.weights = None
        check_route(cache, state)
        return None
    if is_filled(cache):
        return _route_of(cache, state)
    if input_ids is None:
        raise ValueError("generate routes on input_ids: got none, pass the tokenised prompts")
    return model.route(input_ids, given.get("attention_mask")).weights

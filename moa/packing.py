"""Padding-free rows, several sequences behind one another in one row: which token is whose.

TRL's collator says so by `seq_idx` and `cu_seq_lens_q`; position_ids that restart only hint at it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class Padded(NamedTuple):
    """The sequences of a packed row, one a row again, padded on the right."""

    input_ids: Int[Tensor, "sequences tokens"]
    attention_mask: Int[Tensor, "sequences tokens"]
    prompt_mask: Bool[Tensor, "sequences tokens"]


def sequence_of_tokens(
    input_ids: Tensor | None, attention_mask: Tensor | None, given: dict[str, Any], *, needed: bool
) -> Int[Tensor, "1 tokens"] | None:
    """The index of each token's sequence, from 0; None for a batch that is not packed.

    A packed row is read without a cache, `given["use_cache"]` becomes False: transformers takes a packed row with a
    cache for one long sequence, whose parts then see each other.

    Args:
        given: the other arguments of the forward.
        needed: whether what runs differs between the sequences.

    Raises:
        ValueError: a packed row that does not say which token is whose, with a sequence of no token, or that comes
            with a cache.
    """
    bounds = given.get("cu_seq_lens_q")
    indices = given.get("seq_idx")
    if indices is None and bounds is not None:
        indices = _between(bounds)
    restart = indices is None and _restart(given.get("position_ids"), attention_mask)
    if restart and needed:
        raise ValueError(
            "position_ids restart within a row, so it packs several sequences, and nothing says which token is whose: "
            "pass seq_idx or cu_seq_lens_q, as TRL's padding-free collator does"
        )
    if indices is None and not restart:
        return None
    if given.get("use_cache") or given.get("past_key_values") is not None:
        raise ValueError(
            "packed rows were given with a cache, in which their sequences would see each other: leave use_cache and "
            "past_key_values out, or pass a padded batch"
        )
    given["use_cache"] = False
    if indices is None:
        return None
    indices = _checked(indices, input_ids)
    if given.get("position_ids") is None:  # else nothing tells the attention that these are several sequences
        given["position_ids"] = _positions(indices)
    return indices if needed else None


def _between(bounds: Int[Tensor, " sequences_and_1"]) -> Int[Tensor, "1 tokens"]:
    """The index of each token's sequence, of which each ends where the next one starts."""
    lengths = bounds.diff()
    if (lengths < 1).any():  # the sequences after it would take the routes of those before them
        raise ValueError(
            f"each sequence of a packed row has a token or more: got cu_seq_lens_q {bounds.tolist()}, leave empty "
            "sequences out"
        )
    return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)[None]


def _positions(indices: Int[Tensor, "1 tokens"]) -> Int[Tensor, "1 tokens"]:
    """The place of each token in its own sequence."""
    lengths = indices[0].bincount()
    starts = (lengths.cumsum(dim=0) - lengths)[indices[0]]
    return (torch.arange(indices.shape[1], device=indices.device) - starts)[None]


def _restart(position_ids: Tensor | None, attention_mask: Tensor | None) -> bool:
    if position_ids is None or attention_mask is not None or position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return False
    return bool((position_ids.diff(dim=1) < 1).any())


def _checked(indices: Tensor, input_ids: Tensor | None) -> Int[Tensor, "1 tokens"]:
    if input_ids is None or input_ids.shape[0] != 1 or indices.shape != input_ids.shape:
        got = "no input_ids" if input_ids is None else f"input_ids {list(input_ids.shape)}"
        raise ValueError(
            f"packed sequences stand in one row [1, tokens] with an index for each token: got {got} and indices "
            f"{list(indices.shape)}"
        )
    return indices.unique_consecutive(return_inverse=True)[1]


def check_sequences(sequences: Int[Tensor, "1 tokens"], rows: int) -> None:
    """Refuse weights that were made for another number of sequences than a packed row holds."""
    held = int(sequences.max()) + 1
    if rows != held:
        raise ValueError(
            f"the routing is for {rows} sequence{'s' if rows > 1 else ''}, this packed row holds {held}: "
            "route this row, or pin one expert's name (one row of weights) a sequence"
        )


def padded(
    row: Int[Tensor, "1 tokens"], sequences: Int[Tensor, "1 tokens"], labels: Int[Tensor, "1 tokens"] | None
) -> Padded:
    """One row a sequence again, as a router reads prompts; tokens with a label other than -100 are no prompt."""
    lengths = sequences[0].bincount().tolist()
    prompt = torch.ones_like(row, dtype=torch.bool) if labels is None else labels.eq(-100)

    def rows(column: Tensor) -> Tensor:
        return pad_sequence(list(column[0].split(lengths)), batch_first=True, padding_value=0)

    return Padded(rows(row), rows(torch.ones_like(row)), rows(prompt))

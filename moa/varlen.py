"""FlashAttention from inside torch for rows of unequal length, under the name `torch_varlen` in transformers.

`torch.nn.attention.varlen.varlen_attn` comes with every CUDA build of torch, so packed training does without the
package flash-attn. It takes the tokens of all sequences one after the other, `[total, heads, head_dim]`, and where
each sequence begins; the four ways in which a model can say that are those of transformers' own FlashAttention.
Importing this module registers the name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import (
    _is_packed_sequence,
    _pad_input,
    _unpad_input,
    _upad_input,
    prepare_fa_kwargs_from_position_ids,
)

from moa.attention import TORCH_VARLEN

CANNOT = {
    "attn_logit_softcapping": "caps its attention scores",
    "attention_chunk_size": "attends in chunks",
    "attention_dropout": "drops attention weights in training",
    "attn_pdrop": "drops attention weights in training",
    "attention_probs_dropout_prob": "drops attention weights in training",
}
"""Settings of a model that torch's kernel does not compute, and what a model does that has one."""
MAX_HEAD_DIM = 256


class Lengths(NamedTuple):
    """Where the sequences are: `starts [sequences + 1]`, the last of which is the end, and the longest's length."""

    starts: Int[Tensor, " ends"]
    longest: int


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose attention is more than torch's kernel computes.

    Raises:
        ValueError: it does not support FlashAttention at all, or has a setting in `CANNOT` or too wide heads.
    """
    config = model.config.get_text_config()
    name = type(model).__name__
    if not model._supports_flash_attn:
        raise ValueError(f"{name} does not support FlashAttention")
    for setting, what in CANNOT.items():
        if getattr(config, setting, None):
            raise ValueError(f"{name} {what} ({setting}={getattr(config, setting)}), which torch's kernel does not")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        raise ValueError(f"{name} has heads of width {head_dim}: torch's kernel takes multiples of 8 up to 256")


def varlen_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch kv_heads room head_dim"],
    value: Float[Tensor, "batch kv_heads room value_dim"],
    attention_mask: Bool[Tensor, "batch seen"] | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch tokens heads value_dim"], None]:
    """An attention function of transformers; causal attention is aligned to the last token, as in FlashAttention.

    Args:
        attention_mask: which tokens are not padding; None where all are. A static cache has room for more of them.
        kwargs: of a packed row its `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`, or its
            `position_ids`.

    Raises:
        ValueError: dropout, capped scores or attention sinks.
    """
    if dropout or kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise ValueError(f"{TORCH_VARLEN} has no dropout, capped scores or sinks: choose another attn_implementation")
    target = get_target_dtype(query, module)  # norms kept in float32 hand on float32, which no kernel takes
    query, key, value = (x.transpose(1, 2).to(target or x.dtype) for x in (query, key, value))
    causal = module.is_causal if is_causal is None else is_causal
    batch, tokens, width = query.shape[0], query.shape[1], value.shape[-1]
    value = F.pad(value, [0, query.shape[-1] - width])  # heads that read and write different widths

    def attend(q: Tensor, k: Tensor, v: Tensor, of_q: Lengths, of_k: Lengths) -> Tensor:
        windowed = sliding_window is not None and of_k.longest > sliding_window
        left = sliding_window - 1 if windowed else -1
        window = (left, 0 if causal else left)
        return varlen_attn(
            *(q, k, v, of_q.starts, of_k.starts, of_q.longest, of_k.longest),
            scale=scaling,
            window_size=window,
            enable_gqa=q.shape[1] != k.shape[1],
        )[..., :width]

    if attention_mask is not None:
        q, k, v, kept, starts, longest = _upad_input(query, key, value, attention_mask, tokens, _unpad_input)
        out = attend(q, k, v, *map(Lengths, starts, longest))
        return _pad_input(out, kept, batch, tokens), None
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
    return attend(*flat, *_lengths(query, key, **kwargs)).view(batch, tokens, -1, width), None


def _lengths(
    query: Tensor,
    key: Tensor,
    *,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> tuple[Lengths, Lengths]:
    """Where the sequences of a batch without padding are: told, or seen in restarting positions, or one a row."""
    if None not in (max_length_q, max_length_k) and cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        return Lengths(cu_seq_lens_q, int(max_length_q)), Lengths(cu_seq_lens_k, int(max_length_k))
    if _is_packed_sequence(position_ids, len(query)):
        starts, longest = prepare_fa_kwargs_from_position_ids(position_ids)
        return Lengths(starts[0], int(longest[0])), Lengths(starts[1], int(longest[1]))
    return _one_a_row(query), _one_a_row(key)


def _one_a_row(states: Float[Tensor, "batch tokens heads head_dim"]) -> Lengths:
    batch, tokens = states.shape[:2]
    ends = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=states.device)
    return Lengths(ends, tokens)


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    attention_mask: Bool[Tensor, "batch given"] | None = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Bool[Tensor, "batch seen"] | None:
    """transformers' mask of FlashAttention, and one of all that was seen where a static cache has room for more."""
    seen = int(q_offset) + q_length
    if attention_mask is None and kv_length > seen:
        return torch.ones(batch_size, seen, dtype=torch.bool, device=device)
    return flash_attention_mask(batch_size, q_length, kv_length, q_offset, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(TORCH_VARLEN, varlen_attention)
AttentionMaskInterface.register(TORCH_VARLEN, varlen_mask)

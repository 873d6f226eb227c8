"""Examples as a model reads them: prompt and answer in tokens, and what it predicts where the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from moa.answer_losses import Predicted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moa.model import MoaModel
    from moa.tasks import Example


@dataclass(frozen=True)
class Row:
    """One example: the tokens of prompt and answer, how many are the answer's, and the place of its task."""

    ids: list[int]
    answer: int
    task: int


def tokenised(tokenizer: PreTrainedTokenizerBase, example: Example, task: int) -> Row:
    """The row of an example.

    Raises:
        ValueError: the prompt or the answer has no token of its own.
    """
    prompt = len(tokenizer(example.prompt)["input_ids"])
    ids = tokenizer(example.prompt + example.answer)["input_ids"]
    if not 0 < prompt < len(ids):
        raise ValueError(
            f"the answer {example.answer!r} of an example of {example.task!r} has no token of its own after its "
            f"prompt {example.prompt!r:.60}: give every example a prompt and an answer"
        )
    return Row(ids, len(ids) - prompt, task)


def predict(model: MoaModel, rows: Sequence[Row], padding: int) -> Predicted:
    """One forward pass, padded on the left so that the answers end together; logits only where they are.

    Args:
        model: runs the adapters that its `route_state` says at the moment.
        padding: id of the padding token.
    """
    length, answer = max(len(row.ids) for row in rows), max(row.answer for row in rows)
    device = model.device
    ids = torch.tensor([[padding] * (length - len(row.ids)) + row.ids for row in rows], device=device)
    position = torch.arange(length, device=device)
    mask = (position >= torch.tensor([[length - len(row.ids)] for row in rows], device=device)).long()
    real = position >= torch.tensor([[length - row.answer] for row in rows], device=device)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp_min(0),
        use_cache=False,
        logits_to_keep=position[-answer - 1 : -1],
    )
    precise = torch.promote_types(out.logits.dtype, torch.float32)
    return Predicted(out.logits.to(precise).log_softmax(dim=-1), ids[:, -answer:], real[:, -answer:])

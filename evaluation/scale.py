"""How strong a merge should be: its scale, chosen on validation rows.

The plain sum of N adapters overshoots and the mean falls short; which factor between them is best depends on the
adapters more than on the method, so every merge gets its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from moa.evaluation.scoring import answer_examples
from moa.model import MoaModel
from moa.tasks import Example


def choose_scale(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str,
    validation: Sequence[Sequence[Example]],
    scales: Sequence[float],
) -> tuple[float, dict[float, float]]:
    """The scale of a loaded adapter with the lowest negative log-likelihood of validation answers.

    The search starts at the scale nearest to 1 and goes up while the likelihood improves; if it never did, it goes
    down likewise. So the far ones are often not tried at all.

    Args:
        validation: examples of each task; the tasks count alike, whatever the lengths of their answers.

    Returns:
        The scale, and the mean over tasks of the likelihood per answer token for each scale that was tried.
    """

    def loss(scale: float) -> float:
        return fmean(_nll(model, tokenizer, adapter, examples, scale) for examples in validation)

    ordered = sorted(set(scales))
    start = min(range(len(ordered)), key=lambda index: abs(ordered[index] - 1))
    tried = {ordered[start]: loss(ordered[start])}
    _walk(ordered[start + 1 :], loss, tried)
    if min(tried, key=tried.__getitem__) == ordered[start]:
        _walk(ordered[:start][::-1], loss, tried)
    return min(tried, key=tried.__getitem__), dict(sorted(tried.items()))


def _walk(scales: Sequence[float], loss: Callable[[float], float], tried: dict[float, float]) -> None:
    """Try scales in this order until one is worse than the best so far."""
    for scale in scales:
        best = min(tried.values())
        tried[scale] = loss(scale)
        if tried[scale] > best:
            return


def _nll(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str,
    examples: Sequence[Example],
    scale: float,
) -> float:
    answered = answer_examples(
        model,
        tokenizer,
        examples,
        lambda input_ids, attention_mask: model.using(adapter, scale),
        max_new_tokens=None,
    )
    return sum(answer.nll for answer in answered) / sum(answer.answer_tokens for answer in answered)

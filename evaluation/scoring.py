"""Score examples under one system: the likelihood of their answers, and what the model writes itself.

Each batch of prompts is prefilled once; the candidate answers and the generation both go on from its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import BatchEncoding, DynamicCache, PreTrainedTokenizerBase

from moa.model import MoaModel
from moa.tasks import Example


class Activate(Protocol):
    """Makes a system answer one batch of prompts, for the length of a `with` block."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> AbstractContextManager: ...


@dataclass(frozen=True)
class Answered:
    """What a system made of one example.

    Attributes:
        choice_logprobs: summed log-probability of each choice; empty for a generative task.
        nll: summed negative log-likelihood of the right answer, in nats.
        answer_tokens: how many tokens the right answer has.
        generated: what the model wrote, greedily; None where generation was not asked for.
    """

    choice_logprobs: tuple[float, ...]
    nll: float
    answer_tokens: int
    generated: str | None


@torch.no_grad()
def answer_examples(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    activate: Activate,
    *,
    max_new_tokens: int | None,
    batch_size: int = 32,
) -> list[Answered]:
    """Answer examples of one task, in their order.

    Args:
        activate: which adapters answer.
        max_new_tokens: length of a generated answer; None scores likelihoods only.
    """
    answered: dict[int, Answered] = {}
    for chosen in batches_by_length(examples, batch_size):
        batch = [examples[index] for index in chosen]
        prompts = tokenizer(
            [example.prompt for example in batch], return_tensors="pt", padding=True, padding_side="left"
        )
        prompts = prompts.to(model.device)
        with activate(prompts["input_ids"], prompts["attention_mask"]):
            answered.update(zip(chosen, _answer_batch(model, tokenizer, batch, prompts, max_new_tokens), strict=True))
    return [answered[index] for index in range(len(examples))]


def batches_by_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[int]]:
    """The places of the examples, in batches of prompts of like lengths."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].prompt))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _answer_batch(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Example],
    prompts: BatchEncoding,
    max_new_tokens: int | None,
) -> list[Answered]:
    prefill = _Prefill(model, prompts)
    columns = list(zip(*(example.choices for example in batch), strict=True)) or [[e.answer for e in batch]]
    scored = [prefill.logprobs(answer_ids(tokenizer, batch, answers)) for answers in columns]
    written: Sequence[str | None] = [None] * len(batch)
    if max_new_tokens is not None:
        written = tokenizer.batch_decode(prefill.generate(max_new_tokens), skip_special_tokens=True)
    results = []
    for row, example in enumerate(batch):
        logprob, tokens = scored[example.label or 0][row]
        choices = tuple(column[row][0] for column in scored) if example.choices else ()
        results.append(Answered(choices, -logprob, tokens, written[row]))
    return results


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example], answers: Sequence[str]
) -> list[list[int]]:
    """Tokens of each answer as they follow its prompt: the text as a whole, less the prompt's own tokens."""
    prompts = tokenizer([example.prompt for example in batch])["input_ids"]
    wholes = tokenizer([example.prompt + answer for example, answer in zip(batch, answers, strict=True)])["input_ids"]
    return [whole[len(prompt) :] for prompt, whole in zip(prompts, wholes, strict=True)]


class _Prefill:
    """The keys and values of a batch of left-padded prompts, to go on from more than once."""

    def __init__(self, model: MoaModel, prompts: BatchEncoding):
        self.model, self.prompts = model, prompts
        self.length = prompts["input_ids"].shape[1]
        self.cache = DynamicCache(config=model.config)
        self.positions = (prompts["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
        # as an index, not the number 1: that would slice, and a CPU then copies the LM head for every row
        last = torch.tensor([self.length - 1], device=model.device)
        out = model(**prompts, position_ids=self.positions, past_key_values=self.cache, logits_to_keep=last)
        self.next_logprobs = out.logits[:, -1].float().log_softmax(dim=-1)

    def logprobs(self, answers: list[list[int]]) -> list[tuple[float, int]]:
        """Summed log-probability of one answer a row, and its number of tokens."""
        rows = torch.arange(len(answers), device=self.next_logprobs.device)
        first = torch.tensor([answer[0] for answer in answers], device=rows.device)
        total = self.next_logprobs[rows, first]
        longest = max(map(len, answers))
        if longest > 1:
            ids = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers], device=rows.device)
            real = torch.arange(longest, device=rows.device) < torch.tensor(
                [[len(answer)] for answer in answers], device=rows.device
            )
            following = self._continue(ids[:, :-1], real[:, :-1]).gather(-1, ids[:, 1:, None]).squeeze(-1)
            total = total + (following * real[:, 1:]).sum(dim=1)
        return [(float(value), len(answer)) for value, answer in zip(total, answers, strict=True)]

    def _continue(self, ids: Tensor, real: Tensor) -> Tensor:
        mask = torch.cat([self.prompts["attention_mask"], real.long()], dim=1)
        positions = self.positions[:, -1:] + 1 + torch.arange(ids.shape[1], device=ids.device)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache)
        self.cache.crop(-ids.shape[1])
        return out.logits.float().log_softmax(dim=-1)

    def generate(self, max_new_tokens: int) -> Tensor:
        """Greedy continuation; the last prompt token is read again, because generate needs one to start from."""
        self.cache.crop(-1)
        out = self.model.generate(
            **self.prompts, past_key_values=self.cache, max_new_tokens=max_new_tokens, do_sample=False
        )
        return out[:, self.length :]

"""How long a system takes for a mixed batch, beside the base model in the same minutes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from transformers import BatchEncoding

from moa.evaluation.scoring import Activate
from moa.model import MoaModel

NEW_TOKENS, REPEATS = 16, 3


@torch.no_grad()
def measure_latency(model: MoaModel, prompts: BatchEncoding, activate: Activate) -> dict[str, float]:
    """Routing, prefill and greedy decoding of `NEW_TOKENS`; the shortest of `REPEATS` runs that alternate with the
    base model's, after one of each to warm up.

    Returns:
        `seconds`, those of the `base`, their `ratio`, and the batch: `prompts`, their longest in `prompt_tokens`,
        `new_tokens`.
    """

    def seconds(context: Callable[[], AbstractContextManager]) -> float:
        started = time.perf_counter()
        with context():
            model.generate(
                **prompts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
            ).cpu()  # waits for a GPU
        return time.perf_counter() - started

    def asked() -> AbstractContextManager:
        return activate(prompts["input_ids"], prompts["attention_mask"])

    runs = [(seconds(asked), seconds(model.using_base)) for _ in range(REPEATS + 1)]
    taken, base = map(min, zip(*runs[1:], strict=True))
    rows, tokens = prompts["input_ids"].shape
    return {
        "seconds": taken,
        "base": base,
        "ratio": taken / base,
        "prompts": rows,
        "prompt_tokens": tokens,
        "new_tokens": NEW_TOKENS,
    }

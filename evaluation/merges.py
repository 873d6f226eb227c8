"""The merges of a comparison: each made when its turn comes, at the strength that validation rows chose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from moa.evaluation.kept import Kept
from moa.evaluation.scale import choose_scale
from moa.evaluation.systems import System, experts_fingerprint, merge_system
from moa.merging import find_method
from moa.model import MoaModel
from moa.tasks import Example

UNSCALED = ("average",)  # an average of another strength would be a weighted sum


def check_methods(methods: Sequence[str]) -> None:
    """Refuse an unknown merge method before an hour of evaluation, not after."""
    for method in methods:
        find_method(method)


def merge_systems(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    methods: Sequence[str],
    scales: Sequence[float],
    validation: Sequence[Sequence[Example]],
    kept: Kept,
) -> Iterator[System]:
    """Merge the experts by each method, and drop the merge again when the next one is asked for.

    Args:
        scales: candidates for the strength; 1 is the mean of the experts.
        kept: holds what the choice of a scale found, so that a resumed run need not look again.
    """
    for method in methods:
        adapter = f"merge_{method}"
        model.merge_adapters(method, into=adapter)
        scale, tried = 1.0, {}
        if method not in UNSCALED:
            scale, tried = _kept_choice(model, tokenizer, method, adapter, validation, scales, kept)
        if scale != 1.0:
            model.delete_adapter(adapter)
            model.merge_adapters(method, scale=scale, into=adapter)
        yield merge_system(model, adapter, method, scale, tried)
        model.delete_adapter(adapter)


def _kept_choice(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    method: str,
    adapter: str,
    validation: Sequence[Sequence[Example]],
    scales: Sequence[float],
    kept: Kept,
) -> tuple[float, dict[float, float]]:
    def choose() -> dict[str, Any]:
        scale, tried = choose_scale(model, tokenizer, adapter, validation, scales)
        return {"scale": scale, "nll": tried}

    texts = [[example.prompt + example.answer for example in examples] for examples in validation]
    choice = kept.get(f"scale-{method}", [experts_fingerprint(model), method, sorted(scales), texts], choose)
    return choice["scale"], {float(scale): nll for scale, nll in choice["nll"].items()}

"""The merges of a comparison: each made when its turn comes, at the strength that validation rows chose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from moa.evaluation.scale import choose_scale
from moa.evaluation.systems import System, merge_system
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
    directory: Path,
) -> Iterator[System]:
    """Merge the experts by each method, and drop the merge again when the next one is asked for.

    Args:
        scales: candidates for the strength; 1 is the mean of the experts.
        directory: keeps what the choice of a scale found, so that a resumed run need not look again.
    """
    for method in methods:
        adapter = f"merge_{method}"
        model.merge_adapters(method, into=adapter)
        scale, tried = 1.0, {}
        if method not in UNSCALED:
            file = directory / f"scale-{method}.json"
            scale, tried = _kept_choice(model, tokenizer, adapter, validation, scales, file)
        if scale != 1.0:
            model.delete_adapter(adapter)
            model.merge_adapters(method, scale=scale, into=adapter)
        yield merge_system(model, adapter, method, scale, tried)
        model.delete_adapter(adapter)


def _kept_choice(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str,
    validation: Sequence[Sequence[Example]],
    scales: Sequence[float],
    file: Path,
) -> tuple[float, dict[float, float]]:
    asked = [[example.prompt + example.answer for example in examples] for examples in validation]
    key = hashlib.sha256(json.dumps([model.moa_config.sha256, sorted(scales), asked]).encode()).hexdigest()
    if file.is_file() and (kept := json.loads(file.read_text()))["key"] == key:
        return kept["scale"], {float(scale): nll for scale, nll in kept["nll"].items()}
    scale, tried = choose_scale(model, tokenizer, adapter, validation, scales)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"key": key, "scale": scale, "nll": tried}))
    return scale, tried

"""Model cards of a mixture and of what was fused from it: adapters, method, weights, scores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from moa.base_model import BUNDLED_MODEL
from moa.config import MoaConfig
from moa.peft_checks import WEIGHTS_FILE

TEMPLATES = {
    None: "card_mixture.md.j2",
    "adapter": "card_fused.md.j2",
    "model": "card_fused.md.j2",
}


def mixture_card(config: MoaConfig, ranks: Mapping[str, int]) -> str:
    """The card of the mixture: its experts with their ranks, router and scores, and how to load each piece."""
    return _card(config, ranks, None)


def fused_card(config: MoaConfig, ranks: Mapping[str, int], form: str) -> str:
    """The card of the fused adapter (`form="adapter"`) or of the base model with it folded in (`"model"`)."""
    return _card(config, ranks, form)


def _card(config: MoaConfig, ranks: Mapping[str, int], form: str | None) -> str:
    on_hub = _is_repository(config.base_model)
    tags = ["lora", "merge" if form else "mixture-of-loras", "moa-peft"]
    if form != "model" and on_hub:
        tags.append(f"base_model:adapter:{config.base_model}")
    data = ModelCardData(
        library_name="transformers" if form == "model" else "peft",
        base_model=config.base_model if on_hub else None,
        pipeline_tag="text-generation",
        tags=tags,
    )
    experts = [
        {"name": name, "rank": ranks[name], "sha256": config.sha256[f"{name}/{WEIGHTS_FILE}"][:12]}
        for name in config.experts
    ]
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / TEMPLATES[form]),
        form=form,
        base=config.base_model if on_hub else Path(config.base_model).name,
        on_hub=on_hub,
        bundled=config.base_model == BUNDLED_MODEL,
        config=config,
        experts=experts,
    )
    return str(card)


def _is_repository(name: str) -> bool:
    """Whether others find this base model on the Hub; a folder's path is of no use to them and not shown."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()

"""Model cards of a mixture and of what was fused from it: adapters, method, weights, scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from moa.config import MoaConfig

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
    on_hub = not Path(config.base_model).is_absolute()
    tags = ["lora", "merge" if form else "mixture-of-loras", "moa-peft"]
    if form != "model" and on_hub:
        tags.append(f"base_model:adapter:{config.base_model}")
    data = ModelCardData(
        library_name="transformers" if form == "model" else "peft",
        base_model=config.base_model if on_hub else None,
        pipeline_tag="text-generation",
        tags=tags,
    )
    experts = [{"name": name, "rank": ranks[name], "sha256": config.sha256[name][:12]} for name in config.experts]
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / TEMPLATES[form]),
        form=form,
        base=config.base_model if on_hub else Path(config.base_model).name,
        config=config,
        experts=experts,
    )
    return str(card)

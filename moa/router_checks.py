"""What a router was fitted for, and whether this model and this tokenizer are that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moa.config import Objective, RouterConfig
from moa.depths import check_depths
from moa.fingerprint import chat_template_sha256, tokenizer_sha256, weights_sha256
from moa.router import SequenceRouter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moa.routing_model import RoutingModel


def describe_router(
    model: RoutingModel,
    router: SequenceRouter,
    layer: int,
    *,
    objective: Objective = "task",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RouterConfig:
    """The description of a router that is for this model, and for this tokenizer if it is given."""
    return RouterConfig(
        layer=layer,
        depths=sorted(int(depth) for depth in router.others),
        pooling=router.pooling,
        head=router.head_kind,
        hidden_units=router.hidden_units,
        hidden_size=router.hidden_size,
        objective=objective,
        experts=list(model.experts),
        clusters=router.clusters,
        base_sha256=weights_sha256(model.get_base_model()),
        tokenizer_sha256=None if tokenizer is None else tokenizer_sha256(tokenizer),
        chat_template_sha256=None if tokenizer is None else chat_template_sha256(tokenizer),
    )


def check_router(model: RoutingModel, router: SequenceRouter, fitted: RouterConfig, *, check_base: bool) -> None:
    """See `RoutingModel.set_router`."""
    if fitted.experts is not None and fitted.experts != list(model.experts):
        raise ValueError(
            f"the router was fitted for the experts {', '.join(fitted.experts)}, this mixture has "
            f"{', '.join(model.experts)}: fit a router for these with 'moa fit-router'"
        )
    if router.num_experts != len(model.experts):
        raise ValueError(
            f"the router has {router.num_experts} outputs, the mixture {len(model.experts)} experts "
            f"({', '.join(model.experts)}): fit a router for these experts"
        )
    if model.moa_config.granularity == "layer":
        check_depths(router)
    width = model.get_base_model().config.get_text_config().hidden_size
    if router.hidden_size != width:
        raise ValueError(
            f"the router reads {router.hidden_size} features, this base model has {width}: "
            "fit a router on this base model"
        )
    if fitted.abstention is not None and fitted.abstention.score != "energy" and router.detector is None:
        raise ValueError(
            "the router should tell strange prompts by their distance to its own, and was fitted without: "
            "fit it again with 'moa fit-router'"
        )
    ours = weights_sha256(model.get_base_model()) if check_base and fitted.base_sha256 else None
    if ours is not None and ours != fitted.base_sha256:
        raise ValueError(
            f"the router was fitted on other base weights than those of {model.get_base_model().name_or_path!r}: "
            "load the base model that it was fitted on, or fit it again with 'moa fit-router'"
        )


def check_tokenizer(fitted: RouterConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """See `RoutingModel.check_tokenizer`."""
    for what, expected, digest in (
        ("tokenizer", fitted.tokenizer_sha256, tokenizer_sha256),
        ("chat template", fitted.chat_template_sha256, chat_template_sha256),
    ):
        if expected is not None and digest(tokenizer) != expected:
            raise ValueError(
                f"the router was fitted with another {what} than that of {tokenizer.name_or_path!r}: "
                "load the one it was fitted with, or fit it again with 'moa fit-router'"
            )


def check_prompts_have_tokens(prompts: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    """Refuse a prompt that the tokenizer makes nothing of, for a router would read nothing of it."""
    for place, (prompt, tokens) in enumerate(zip(prompts, ids, strict=True)):
        if not len(tokens):
            raise ValueError(
                f"a router reads the tokens of prompts, and prompt {place} of {len(prompts)}, {prompt!r:.60}, has "
                "none: leave it out, or give it a text"
            )

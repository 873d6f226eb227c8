"""A mixture gains or loses one expert: adapter, router, thresholds and merged adapter change together."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moa.assembly import read_experts
from moa.base_model import load_tokenizer
from moa.calibration import conformal_quantile, fit_conformal, promised
from moa.config import FALLBACK, Fallback, RouterConfig
from moa.peft_export import adapter_dtype
from moa.router import SequenceRouter
from moa.router_checks import check_prompts_have_tokens
from moa.router_rows import check_growable, folds, with_expert, without_expert
from moa.routing import check_mode
from moa.strangeness import strangeness

if TYPE_CHECKING:
    from moa.model import MoaModel
    from moa.tasks import Example

BATCH = 16

Prompts = Sequence["str | Example"]


@dataclass(frozen=True)
class Growth:
    """What an expert more, or less, did to a mixture.

    Attributes:
        before, after: the router's accuracy on the prompts of each expert; empty where there is no router.
        fallback: how the merged adapter was merged anew, with equal weights; None where there was none.
    """

    before: dict[str, float]
    after: dict[str, float]
    fallback: Fallback | None


def add_expert(
    model: MoaModel,
    name: str,
    path: str | Path,
    examples: Prompts,
    held_out: Mapping[str, Prompts],
    tokenizer: PreTrainedTokenizerBase | None,
) -> Growth:
    """See `MoaModel.add_expert`."""
    _check_change(model, held_out, (*model.experts, name))
    if name in model.peft_config:
        raise ValueError(f"an adapter called {name!r} is already loaded: choose another name for the expert")
    (adapter,) = read_experts(model.get_base_model(), {name: path}, check_base=model.moa_config.check_base).values()
    router, fitted, before, after = model.moa_router, model.moa_config.router, {}, {}
    if router is not None:
        if len(examples) < 2:
            raise ValueError(
                f"the router finds the prompts of {name!r} by their mean: got {len(examples)} examples, give at least "
                "2, better about a hundred"
            )
        check_growable(router)
        pooled, *judged = pooled_prompts(model, tokenizer, examples, *held_out.values())
        before = _accuracies(router, held_out, judged, model.experts)
        at_depths = {d: pooled_prompts(model, tokenizer, examples, layer=int(d))[0] for d in router.others}
        grown, fitted = with_expert(router, pooled, at_depths), _widened(router, fitted, pooled)
        own = torch.cat([one(rest).argmax(dim=-1) for one, rest in folds(router, pooled)]) == len(model.experts)
        after = {name: float(own.float().mean())} | _accuracies(grown, held_out, judged, (*model.experts, name))
    _load(model, name, adapter.path)
    model.expert_folders[name] = adapter.path
    if router is not None:
        router = grown
    return Growth(before, after, _finish(model, (*model.experts, name), router, fitted))


def _load(model: MoaModel, name: str, path: Path) -> None:
    """Load the adapter as those that are there; one that fails, for lack of memory or by Ctrl-C, leaves nothing."""
    widened = adapter_dtype(model.get_base_model()) == torch.float32
    try:
        model.load_adapter(path, name, autocast_adapter_dtype=widened)
    except BaseException:
        model.gate_layers()  # those that only this adapter has stay, and do nothing
        if name in model.peft_config:
            model.delete_adapter(name)
        raise


def remove_expert(
    model: MoaModel, name: str, held_out: Mapping[str, Prompts], tokenizer: PreTrainedTokenizerBase | None
) -> Growth:
    """See `MoaModel.remove_expert`."""
    if name not in model.experts:
        raise ValueError(f"no expert is called {name!r}: this mixture has {', '.join(model.experts)}")
    left = tuple(expert for expert in model.experts if expert != name)
    if not left:
        raise ValueError(f"{name!r} is the only expert of this mixture, which needs one: add another first")
    _check_change(model, held_out, left)
    check_mode(model.moa_config.routing, model.moa_config.top_k, len(left))
    router, before, after = model.moa_router, {}, {}
    if router is not None:
        judged = pooled_prompts(model, tokenizer, *held_out.values())
        before = _accuracies(router, held_out, judged, model.experts)
        router = without_expert(router, model.experts.index(name))
        after = _accuracies(router, held_out, judged, left)
    if name in model.active_adapters:
        model.set_adapter(left[0], inference_mode=True)
    if name in model.peft_config:  # else its caller has deleted it
        model.delete_adapter(name)
    model.expert_folders.pop(name, None)
    fitted = replace(model.moa_config.router, calibration=None)
    return Growth(before, after, _finish(model, left, router, fitted))


def _check_change(model: MoaModel, held_out: Iterable[str], experts: Sequence[str]) -> None:
    if model.route_state.pinned:
        raise ValueError("experts come and go outside of model.pinned, using and using_base: leave the block first")
    if model.route_state.layer_router is not None and model.moa_config.granularity != "token":
        raise ValueError(
            "a layer router knows the experts that there are: set model.route_state.layer_router = None, change the "
            "experts, and make a new one"
        )
    if model.routes_by_gates:
        raise ValueError(
            "token gates are trained for the experts that there are: route otherwise first, by "
            "model.set_granularity('sequence') or 'moa fit-router', change the experts, and train new ones"
        )
    for unknown in set(held_out) - set(experts):
        raise ValueError(
            f"there are held-out prompts of {unknown!r}, which is no expert: they must be for {', '.join(experts)}"
        )


def _finish(
    model: MoaModel, experts: tuple[str, ...], router: SequenceRouter | None, fitted: RouterConfig
) -> Fallback | None:
    """Make all that knows the list of experts know the new one."""
    config, state = model.moa_config, model.route_state
    merged = None if config.fallback is None else _still_merged(config.fallback, config.experts, experts)
    state.experts, config.experts, state.weights = experts, list(experts), None
    config.sha256, config.scores = {}, {}  # of files that are to be written, and of another mixture
    model.gate_layers()
    model.moa_gates = None  # of other experts
    if config.granularity == "token":
        model.set_granularity("token", by=config.token_router)
    if router is not None:
        fitted = replace(fitted, experts=list(experts), clusters=router.clusters)
        model.set_router(router, fitted, check_base=False)
    if FALLBACK in model.peft_config and config.fallback is not None:
        _merge_again(model, config.fallback, merged)
    return config.fallback


def _still_merged(fallback: Fallback, before: Sequence[str], now: Sequence[str]) -> list[str]:
    """Those of the chosen experts that there are still; all where all were merged, or adapters that are no experts."""
    chosen = [name for name in now if name in fallback.weights]
    return chosen if chosen and set(fallback.weights) < set(before) else list(now)


def _merge_again(model: MoaModel, fallback: Fallback, adapters: Sequence[str]) -> None:
    """Merge the experts there are now as before; drop a merge of others that cannot be made again."""
    try:
        model.merge_fallback_again(adapters)
    except ValueError as error:
        model.delete_adapter(FALLBACK)
        model.moa_config.fallback = None
        warnings.warn(
            f"the mixture has no merged adapter now, for {fallback.method!r} cannot merge its experts as they are "
            f"({error}): call model.set_fallback() with what it needs",
            stacklevel=5,
        )


def _widened(router: SequenceRouter, fitted: RouterConfig, pooled: Float[Tensor, "prompts hidden"]) -> RouterConfig:
    """Thresholds that the new expert's own prompts keep to as well; they never become stricter.

    Of the other experts' prompts fewer are strange than before, for there is one expert more that they may be like.
    """
    limits, conformal = fitted.abstention, fitted.conformal
    parts = list(folds(router, pooled)) if limits or conformal else []
    if limits is not None:
        found = torch.cat([strangeness(one, limits, rest, one(rest)) for one, rest in parts])
        rate = promised(limits.rate, len(found))
        merged = max(limits.merged_above, conformal_quantile(found, rate))
        limits = replace(limits, rate=rate, merged_above=merged, base_above=max(merged, limits.base_above))
    if conformal is not None:
        likely = torch.cat([one(rest).softmax(dim=-1) for one, rest in parts])
        own = torch.full((len(likely),), router.num_experts, device=likely.device)
        conformal = replace(
            conformal, floor=min(conformal.floor, fit_conformal(likely, own, conformal.coverage).floor)
        )
    return replace(fitted, abstention=limits, conformal=conformal, calibration=None)


def pooled_prompts(
    model: MoaModel, tokenizer: PreTrainedTokenizerBase | None, *of_experts: Prompts, layer: int | None = None
) -> list[Float[Tensor, "prompts hidden"]]:
    """What the router, or the one at another depth, reads of some prompts of each expert: one prefix pass.

    Raises:
        ValueError: another tokenizer than the router's own, or a prompt without a token.
    """
    if not any(of_experts):
        return [torch.empty(0) for _ in of_experts]
    tokenizer = tokenizer or load_tokenizer(model.moa_config.base_model)
    model.check_tokenizer(tokenizer)
    texts = [one if isinstance(one, str) else one.prompt for prompts in of_experts for one in prompts]
    check_prompts_have_tokens(texts, tokenizer(texts)["input_ids"])
    pooled = []
    starts = range(0, len(texts), BATCH)
    for start in track(starts, description=f"reading {len(texts)} prompts", transient=True):
        batch = tokenizer(texts[start : start + BATCH], return_tensors="pt", padding=True).to(model.device)
        with torch.no_grad():
            pooled.append(model.features(batch["input_ids"], batch["attention_mask"], layer=layer))
    return list(torch.cat(pooled).split([len(prompts) for prompts in of_experts]))


def _accuracies(
    router: SequenceRouter, held_out: Iterable[str], pooled: Iterable[Tensor], experts: Sequence[str]
) -> dict[str, float]:
    """Share of each expert's prompts that go to it; experts that the router does not know are left out."""
    return {
        name: float((router(features).argmax(dim=-1) == experts.index(name)).float().mean())
        for name, features in zip(held_out, pooled, strict=True)
        if name in experts and len(features)
    }

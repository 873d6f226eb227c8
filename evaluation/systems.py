"""What is compared: the base model, each expert alone, the mixture, and every merge, on one model object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moa.config import GATES_NAME, ROUTER_NAME
from moa.evaluation.scoring import Activate
from moa.in_flight import prefill_overhead
from moa.model import MoaModel
from moa.peft_checks import WEIGHTS_FILE
from moa.routing import Routing


@dataclass
class System:
    """One row of the table.

    Attributes:
        name: such as "base", "lora:sst2", "moa", "merge:ties".
        kind: base, lora, moa, router (another one than the mixture's) or merge.
        fingerprint: changes whenever its answers could: checksums of what it runs.
        activate: makes the model answer a batch as this system.
        cost: what it adds to the base model: `extra_parameters`, `rank`, and `prefill_overhead` as a share.
        note: what the reader of the table should know, such as a scale that was chosen on validation.
        scales: for a merge, the strengths that were tried, and the validation likelihood of each.
        routings: for the mixture, how it routed each batch since they were last emptied.
    """

    name: str
    kind: str
    fingerprint: str
    activate: Activate
    cost: dict[str, float]
    note: str = ""
    scales: dict[float, float] = field(default_factory=dict)
    routings: list[Routing] = field(default_factory=list)


def base_system(model: MoaModel) -> System:
    return System("base", "base", "", _ignoring_batch(model.using_base), cost={})


def expert_system(model: MoaModel, expert: str) -> System:
    """One expert for all prompts, whatever their task."""
    fingerprint = model.moa_config.expert_sha256(expert)
    activate = _ignoring_batch(lambda: model.using(expert))
    return System(f"lora:{expert}", "lora", fingerprint, activate, adapter_cost(model, [expert]))


def merge_system(
    model: MoaModel, adapter: str, make: Callable[[], None], spec: str, choice: Mapping[str, Any], data: str = ""
) -> System:
    """A merge of the experts, which `make` loads into the model as `adapter` when it is first used.

    Args:
        choice: the `scale`, the validation likelihood of each that was tried (`nll`), and the merge's `cost`.
        data: what the merge depends on beside the experts, such as the statistics that it reads.
    """
    scale, tried = choice["scale"], {float(scale): nll for scale, nll in choice["nll"].items()}

    @contextmanager
    def activate(input_ids: Tensor, attention_mask: Tensor) -> Iterator[None]:
        make()
        with model.using(adapter, scale):
            yield

    return System(
        f"merge:{spec}",
        "merge",
        f"{experts_fingerprint(model)} {spec} {scale}{data}",
        activate,
        choice["cost"],
        note=f"scale {scale:g}" + (" chosen on validation" if tried else ""),
        scales=tried,
    )


def mixture_system(model: MoaModel) -> System:
    """The mixture as it routes: prompts by its router, which it must have, or tokens at each layer."""
    if model.moa_config.granularity == "token":
        config, by_arrow = model.moa_config, model.moa_config.token_router == "arrow"
        fingerprint = f"{experts_fingerprint(model)} token {config.top_k if by_arrow else config.sha256[GATES_NAME]}"
        note = f"each token mixes {config.top_k}, by Arrow" if by_arrow else "each token mixes all, by gates"
        activate = _ignoring_batch(nullcontext)
        return System("moa", "moa", fingerprint, activate, adapter_cost(model, model.experts), note)
    routings: list[Routing] = []

    @contextmanager
    def activate(input_ids: Tensor, attention_mask: Tensor) -> Iterator[None]:
        routing = model.route(input_ids, attention_mask)
        routings.append(routing)
        with model.pinned(routing):
            yield

    config = model.moa_config
    cost = {**adapter_cost(model, model.experts), "prefill_overhead": prefill_overhead(model)}
    note = {
        "hard": "best expert",
        "top_k": f"best {config.top_k} mixed",
        "soft": "all mixed",
        "conformal": "likely ones mixed",
    }[config.routing]
    router = f"{config.sha256[ROUTER_NAME]} {config.router.layer} {config.router.pooling} {config.granularity}"
    rule = f"{config.routing} {config.top_k} {config.router.conformal}"
    doubt = f"{config.router.abstention} {config.sha256[WEIGHTS_FILE]}"
    fingerprint = f"{experts_fingerprint(model)} {router} {rule} {doubt}"
    return System("moa", "moa", fingerprint, activate, cost, note, routings=routings)


def unmerged_systems(model: MoaModel) -> list[System]:
    """All that is there without a merge; the mixture only if it can route."""
    routes = model.moa_router is not None or model.moa_config.granularity == "token"
    mixture = [mixture_system(model)] if routes else []
    return [base_system(model), *(expert_system(model, name) for name in model.experts), *mixture]


def experts_fingerprint(model: MoaModel) -> str:
    """Changes whenever an expert does, or their order."""
    return " ".join(model.moa_config.expert_sha256(name) for name in model.experts)


def adapter_cost(model: MoaModel, adapters: Sequence[str]) -> dict[str, float]:
    """The parameters that these adapters add together, and the largest rank among them."""
    factors = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if ".lora_" in name and name.split(".")[-2] in adapters
    ]
    ranks = [parameter.shape[0] for name, parameter in factors if ".lora_A." in name]
    return {"extra_parameters": sum(parameter.numel() for _, parameter in factors), "rank": max(ranks)}


def _ignoring_batch(context: Callable[[], AbstractContextManager]) -> Activate:
    return lambda input_ids, attention_mask: context()

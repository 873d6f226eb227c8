"""Rows of the table for other ways to route than the mixture's own: is a trained router worth it, and at what grain?

The oracle, each task with its own LoRA, is in every table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor

from moa.arrow import ArrowRouter
from moa.baseline_routers import at_random, nearest_centroid, uniform
from moa.config import GATES_NAME, ROUTER_NAME
from moa.depths import check_depths
from moa.errors import nearest
from moa.evaluation.scoring import Activate
from moa.evaluation.systems import System, adapter_cost, experts_fingerprint
from moa.in_flight import prefill_overhead
from moa.model import MoaModel
from moa.route_state import LayerRouter
from moa.routing import Granularity, RoutingMode, check_floor, route_logits


def check_routers(names: Sequence[str]) -> None:
    """Refuse a router that does not exist, or one named twice."""
    for name in names:
        if name == "oracle":
            raise ValueError("--routers oracle: the table has it always, each task with its own LoRA, leave it out")
        if name not in ROUTERS:
            known = ", ".join(ROUTERS)
            raise ValueError(f"--routers {name} does not exist: choose from {known}{nearest(name, ROUTERS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"--routers names one twice: {' '.join(names)}")


def router_systems(model: MoaModel, names: Sequence[str], *, seed: int = 0) -> list[System]:
    """A system for each of these routers, over the experts of the mixture.

    Raises:
        ValueError: a router whose parts the mixture has not: a fitted router, the means of its prompts, routers at
            several depths, or gates; or one that mixes a DoRA expert.
    """
    return [_system(model, name, seed) for name in names]


def _system(model: MoaModel, name: str, seed: int) -> System:
    router, config, cost = ROUTERS[name], model.moa_config, adapter_cost(model, model.experts)
    if router.reads is not None and model.moa_router is None:
        raise ValueError(
            f"--routers {name} needs the mixture's fitted router, and it has none: fit one with 'moa fit-router'"
        )
    fingerprint = [experts_fingerprint(model), str(seed)]
    if router.reads is not None:
        cost["prefill_overhead"] = prefill_overhead(model, router.reads)
        fingerprint += [str(config.sha256.get(ROUTER_NAME)), str(config.router.layer)]
    if name == "conformal":
        fingerprint.append(str(config.router.floor))
    if name == "gates":
        fingerprint.append(str(config.sha256.get(GATES_NAME)))
    return System(f"router:{name}", "router", " ".join(fingerprint), router.build(model, seed), cost, router.note)


def _uniform(model: MoaModel, seed: int) -> Activate:
    routing = uniform(model.experts)
    _check_mixable(model)
    return lambda input_ids, attention_mask: model.pinned(routing)


def _check_mixable(model: MoaModel) -> None:
    """Refuse experts that cannot be mixed now, not after hours of other rows."""
    with model.pinned(uniform(model.experts)):
        pass


def _random(model: MoaModel, seed: int) -> Activate:
    return lambda input_ids, attention_mask: model.pinned(at_random(input_ids, attention_mask, model.experts, seed))


def _centroid(model: MoaModel, seed: int) -> Activate:
    router = nearest_centroid(model.moa_router)

    def activate(input_ids: Tensor, attention_mask: Tensor) -> AbstractContextManager:
        return model.pinned(route_logits(router(model.features(input_ids, attention_mask)), "hard"))

    return activate


def _arrow(model: MoaModel, seed: int) -> Activate:
    return _by_token(model, ArrowRouter(model.get_base_model(), model.experts))


def _gates(model: MoaModel, seed: int) -> Activate:
    if model.moa_gates is None:
        raise ValueError("--routers gates: this mixture has none, train them with 'moa fit-gates'")
    return _by_token(model, model.moa_gates)


def _by_token(model: MoaModel, router: LayerRouter) -> Activate:
    _check_mixable(model)
    return lambda input_ids, attention_mask: model.route_state.set(layer_router=router)


def _fitted_router(granularity: Granularity, mode: RoutingMode) -> Callable[[MoaModel, int], Activate]:
    """The mixture's own router in another way than the mixture's, trusting the experts with every prompt."""

    def build(model: MoaModel, seed: int) -> Activate:
        if granularity == "layer":
            check_depths(model.moa_router)
        if mode != "hard":
            _check_mixable(model)
        if mode == "conformal":
            check_floor(model.moa_config.router.floor)

        def activate(input_ids: Tensor, attention_mask: Tensor) -> AbstractContextManager:
            how = {"routing": mode, "granularity": granularity, "abstain": False}
            return model.pinned(model.route(input_ids, attention_mask, **how))

        return activate

    return build


@dataclass(frozen=True)
class OtherRouter:
    """A way to route, its note in the table, and at which granularity it reads what the mixture's router reads."""

    build: Callable[[MoaModel, int], Activate]
    note: str
    reads: Granularity | None = None


ROUTERS = {
    "uniform": OtherRouter(_uniform, "all experts in equal parts"),
    "random": OtherRouter(_random, "any expert for each prompt"),
    "centroid": OtherRouter(_centroid, "the expert whose prompts' mean is nearest", "sequence"),
    "arrow": OtherRouter(_arrow, "3 experts for each token and layer, by their updates"),
    "sequence": OtherRouter(_fitted_router("sequence", "hard"), "the router's best expert, no fallback", "sequence"),
    "soft": OtherRouter(_fitted_router("sequence", "soft"), "all experts by the router's probabilities", "sequence"),
    "conformal": OtherRouter(
        _fitted_router("sequence", "conformal"), "the likely experts, a set of known coverage", "sequence"
    ),
    "layer": OtherRouter(_fitted_router("layer", "hard"), "the best expert of the router at each depth", "layer"),
    "layer_soft": OtherRouter(
        _fitted_router("layer", "soft"), "all experts by the probabilities of the router at each depth", "layer"
    ),
    "gates": OtherRouter(_gates, "all experts for each token and layer, by trained gates"),
}

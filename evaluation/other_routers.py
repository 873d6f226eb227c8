"""Rows of the table for other routers than the mixture's own: is a trained one worth it?

The oracle, each task with its own LoRA, is in every table.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from moa.arrow import ArrowRouter
from moa.baseline_routers import at_random, nearest_centroid, uniform
from moa.config import ROUTER_NAME
from moa.errors import nearest
from moa.evaluation.scoring import Activate
from moa.evaluation.systems import System, adapter_cost, experts_fingerprint
from moa.in_flight import prefill_overhead
from moa.model import MoaModel
from moa.routing import route_logits

NOTES = {
    "uniform": "all experts in equal parts",
    "random": "any expert for each prompt",
    "centroid": "the expert whose prompts' mean is nearest",
    "arrow": "3 experts for each token and layer, by their updates",
}


def check_routers(names: Sequence[str]) -> None:
    """Refuse a router that does not exist, or one named twice."""
    for name in names:
        if name == "oracle":
            raise ValueError("--routers oracle: the table has it always, each task with its own LoRA, leave it out")
        if name not in NOTES:
            raise ValueError(f"--routers {name} does not exist: choose from {', '.join(NOTES)}{nearest(name, NOTES)}")
    if len(set(names)) < len(names):
        raise ValueError(f"--routers names one twice: {' '.join(names)}")


def router_systems(model: MoaModel, names: Sequence[str], *, seed: int = 0) -> list[System]:
    """A system for each of these routers, over the experts of the mixture.

    Raises:
        ValueError: `centroid` for a mixture without a router, or with one that knows no means of prompts; `uniform`
            or `arrow` for a DoRA expert, which cannot be mixed.
    """
    return [_system(model, name, seed) for name in names]


def _system(model: MoaModel, name: str, seed: int) -> System:
    config, cost = model.moa_config, adapter_cost(model, model.experts)
    fingerprint = f"{experts_fingerprint(model)} {seed}"
    if name == "centroid":
        cost["prefill_overhead"] = prefill_overhead(model)
        fingerprint += f" {config.sha256.get(ROUTER_NAME)} {config.router.layer}"
    return System(f"router:{name}", "router", fingerprint, ROUTERS[name](model, seed), cost, NOTES[name])


def _uniform(model: MoaModel, seed: int) -> Activate:
    routing = uniform(model.experts)
    with model.pinned(routing):  # refuses experts that cannot be mixed now, not after hours of other rows
        pass
    return lambda input_ids, attention_mask: model.pinned(routing)


def _random(model: MoaModel, seed: int) -> Activate:
    return lambda input_ids, attention_mask: model.pinned(at_random(input_ids, attention_mask, model.experts, seed))


def _centroid(model: MoaModel, seed: int) -> Activate:
    if model.moa_router is None:
        raise ValueError("--routers centroid needs the means of the mixture's router, and this mixture has no router")
    router = nearest_centroid(model.moa_router)

    def activate(input_ids: Tensor, attention_mask: Tensor) -> AbstractContextManager:
        return model.pinned(route_logits(router(model.features(input_ids, attention_mask)), "hard"))

    return activate


def _arrow(model: MoaModel, seed: int) -> Activate:
    router = ArrowRouter(model.get_base_model(), model.experts)
    with model.route_state.set(layer_router=router):  # as for uniform
        pass
    return lambda input_ids, attention_mask: model.route_state.set(layer_router=router)


ROUTERS = {"uniform": _uniform, "random": _random, "centroid": _centroid, "arrow": _arrow}

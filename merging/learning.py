"""Weights found by gradient: the loss of a model that adds its adapters by these weights, differentiated by them."""

import logging
import math
from typing import Literal

import torch
from torch import Tensor

from moa.merging.journal import Journal
from moa.merging.layers import Layers
from moa.merging.objective import Found, Judged, Kind, Objective

logger = logging.getLogger(__name__)

Granularity = Literal["adapter", "layer"]


def learn(
    layers: Layers,
    objective: Objective,
    kind: Kind,
    granularity: Granularity,
    start: float | None,
    convex: bool,
    steps: int,
    lr: float,
    l1: float,
    guard: float,
    seed: int,
    journal: str | None,
) -> Found:
    """Gates that Adam finds in `steps` steps on loss + l1 * mean|g|; see `moa.merging.gates` for the options.

    Args:
        start: the gates to start from, 1/N by default.
        convex: gates are a softmax over the adapters.
    """
    judged = Judged.of(layers, objective)
    n, rows = len(judged.searched), len(layers) if granularity == "layer" else 1
    if n == 0:
        return judged.found(torch.zeros(1, 0, dtype=torch.float64))
    settings = {
        **{"kind": kind, "granularity": granularity, "start": start, "convex": convex},
        **{"steps": steps, "lr": lr, "l1": l1, "guard": guard, "seed": seed},
    }
    journal = Journal(journal, {**judged.recipe, "layers": list(layers), **settings})
    first = 0.0 if convex else 1 / n if start is None else start
    scores = torch.full((rows, n), first, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([scores], lr=lr)
    losses = _resumed(journal, scores, adam)
    for step in map(int, layers.progress([str(step) for step in range(len(losses), steps)], "learning weights")):
        gates = scores.softmax(dim=-1) if convex else scores
        judgement = {"kind": kind, "guard": guard, "step": step, "seed": seed}
        loss = objective.step_loss(judged.in_objective(gates), judged.shares, **judgement) + l1 * gates.abs().mean()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the loss of step {step} is {losses[-1]}: pass a smaller lr than {lr:g}, or another start"
            )
        adam.zero_grad()
        loss.backward()
        adam.step()
        journal.write(_snapshot(scores, adam, losses))
        logger.info("step %d of %d, loss %.4f", step + 1, steps, losses[-1])
    tenth = max(1, steps // 10)
    return judged.found(
        scores.softmax(dim=-1) if convex else scores,
        loss_of_first_tenth=sum(losses[:tenth]) / tenth,
        loss_of_last_tenth=sum(losses[-tenth:]) / tenth,
    )


def _snapshot(scores: Tensor, adam: torch.optim.Adam, losses: list[float]) -> dict:
    moments = {name: value.tolist() for name, value in adam.state[scores].items()}
    return {"scores": scores.tolist(), "adam": moments, "losses": losses}


def _resumed(journal: Journal, scores: Tensor, adam: torch.optim.Adam) -> list[float]:
    """Go on from what the journal holds, exactly; the losses of the steps that are done."""
    if journal.content is None:
        return []
    moments = {name: torch.tensor(value, dtype=torch.float64) for name, value in journal.content["adam"].items()}
    adam.state[scores].update(moments | {"step": moments["step"].to(torch.float32)})
    with torch.no_grad():
        scores.copy_(torch.tensor(journal.content["scores"], dtype=torch.float64))
    return journal.content["losses"]

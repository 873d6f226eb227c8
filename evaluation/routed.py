"""What the mixture's router did with the prompts that were scored: how sure it was, and what fell back to what."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from moa.calibration import measure
from moa.routing import BASE, MERGED, Routing


def columns(routings: Sequence[Routing], batches: Iterable[Sequence[int]]) -> dict[str, list[Any]]:
    """For each example, the likeliest expert, its probability, and what ran: 0 experts, 1 merged adapter, 2 base.

    Args:
        routings: of each batch of prompts.
        batches: the places of their examples.
    """
    found = {
        "routed": [expert for routing in routings for expert in routing.experts],
        "confidence": [sure for one in routings for sure in one.logits.softmax(dim=-1).amax(dim=-1).tolist()],
        "fallback": [ran for one in routings if one.fallback is not None for ran in one.fallback.tolist()],
    }
    places = list(itertools.chain.from_iterable(batches))
    return {
        name: [value for _, value in sorted(zip(places, values, strict=True))] if values else []
        for name, values in found.items()
    }


def calibration(names: Sequence[str], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of the mixture's cells on tasks that have an expert; None where there is none."""
    own = [cell for cell in _mixture(cells) if cell["task"] in names]
    right = [chosen == names.index(cell["task"]) for cell in own for chosen in cell["routed"]]
    sure = [confidence for cell in own for confidence in cell["confidence"]]
    return asdict(measure(torch.tensor(sure), torch.tensor(right))) if sure else None


def fallen_back(names: Sequence[str], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How many prompts of each task ran what; None where the mixture trusts its experts with every prompt."""
    counts = {
        cell["task"]: {
            "n": len(cell["fallback"]),
            "merged": cell["fallback"].count(MERGED),
            "base": cell["fallback"].count(BASE),
            "own": cell["task"] in names,
        }
        for cell in _mixture(cells)
        if cell["fallback"]
    }
    return counts or None


def fallback_notes(found: Mapping[str, Mapping[str, Any]] | None) -> Iterator[str]:
    """One sentence for the tasks with an expert together, one for each other task."""
    if found is None:
        return
    own = [counts for counts in found.values() if counts["own"]]
    if own:
        total = {name: sum(counts[name] for counts in own) for name in ("n", "merged", "base")}
        yield f"Of {total['n']} prompts of tasks with a LoRA of their own {_told(total)}."
    for task, counts in found.items():
        if not counts["own"]:
            yield (
                f"{task} has no LoRA of its own: of its {counts['n']} prompts {_told(counts)}; the router's accuracy "
                "does not count them."
            )


def _told(counts: Mapping[str, int]) -> str:
    shares = {name: 100 * counts[name] / counts["n"] for name in ("merged", "base")}
    return (
        f"{sum(shares.values()):.1f} % fell back, {shares['merged']:.1f} % to the merged adapter and "
        f"{shares['base']:.1f} % to the base model"
    )


def _mixture(cells: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (cell for cell in cells if cell["system"] == "moa")

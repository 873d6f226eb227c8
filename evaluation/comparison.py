"""Everything the report needs, from the cells: oracle, router, costs, and where the numbers come from."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from sklearn.metrics import confusion_matrix

from moa.attention import attention_of
from moa.base_model import portable_name
from moa.evaluation import metrics
from moa.evaluation.routed import calibration, fallen_back
from moa.evaluation.runner import Questions
from moa.evaluation.summary import normalised
from moa.evaluation.systems import System
from moa.fingerprint import fingerprint
from moa.intervals import share_of
from moa.model import MoaModel

PACKAGES = ("torch", "transformers", "peft", "sacrebleu", "rouge-score", "scikit-learn", "moa-peft")
COMPARED = ("moa", "merge")  # the kinds of system that the card compares


def results(
    model: MoaModel,
    questions: Sequence[Questions],
    systems: Sequence[System],
    cells: Sequence[dict[str, Any]],
    *,
    seed: int,
    source: str,
) -> dict[str, Any]:
    """The results of a comparison, as `write_json` stores them."""
    base = model.get_base_model()
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "source": source,
        "base_model": portable_name(base),
        "base_weights": {"dtype": str(base.dtype).removeprefix("torch."), "fingerprint": fingerprint(base)},
        "attention": attention_of(base),
        "remarks": remarks(model),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {model.device.type}",
        "versions": {package: version(package) for package in PACKAGES},
        "sha256": model.moa_config.sha256,
        "tasks": {asked.task.name: _task(asked) for asked in questions},
        "systems": [
            *(
                {"name": system.name, "kind": system.kind, "note": system.note, "scales": system.scales}
                for system in systems
            ),
            {"name": "oracle", "kind": "oracle", "note": "each task with its own LoRA"},
        ],
        "cells": [*({k: v for k, v in cell.items() if k != "key"} for cell in cells), *_oracle(cells)],
        "router": _router(model, cells),
        "fallback": fallen_back(model.experts, cells),
        "costs": [{"system": system.name, **system.cost} for system in systems if system.cost],
    }


def remarks(model: MoaModel) -> list[str]:
    """What is not as one would expect of a mixture, each as one sentence."""
    loaded, named = portable_name(model.get_base_model()), model.moa_config.base_model
    found = []
    if model.moa_router is None and model.moa_config.granularity != "token":
        found.append("The mixture has no router, so there is no row moa: fit one with training/train_moa.py.")
    if named and loaded != named:
        found.append(f"The mixture names {named} as its base model, the answers are those of {loaded}.")
    return found


def card_scores(found: dict[str, Any]) -> dict[str, float]:
    """What the model card shows: how much of each task's own LoRA the mixture and the merges keep, 1 is all of it.

    A score's name tells what was measured, such as the scale of a merge, and on how many rows a task.
    """
    counts = sorted({task["examples"]["each"] for task in found["tasks"].values()})
    rows = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    kept = normalised(found)
    return {
        f"{system['name']} ({system['note']}), share of the own LoRA's score, {rows} rows a task": score / 100
        for system in found["systems"]
        if system["kind"] in COMPARED and (score := kept[system["name"]]["score"]) is not None
    }


def other_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """The scores of a card less those of an earlier comparison, whose rows and scales were others."""
    return {name: score for name, score in scores.items() if not name.startswith(COMPARED)}


def _task(asked: Questions) -> dict[str, Any]:
    metric = asked.task.metric
    few = min(asked.others, len(asked.examples))
    examples = {"each": len(asked.examples), "for a LoRA of another task": few}
    return {"metric": metric, "headline": metrics.headline(metric), "examples": examples}


def _oracle(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    own = [cell for cell in cells if cell["system"] == f"lora:{cell['task']}"]
    return [{**{k: v for k, v in cell.items() if k != "key"}, "system": "oracle"} for cell in own]


def _router(model: MoaModel, cells: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Which expert the prompts of each task went to; tasks without an expert of their own are left out."""
    names = list(model.experts)
    pairs = [
        (names.index(cell["task"]), chosen)
        for cell in cells
        if cell["system"] == "moa" and cell["task"] in names
        for chosen in cell["routed"]
    ]
    if not pairs:
        return None
    tasks, chosen = zip(*pairs, strict=True)
    confusion = confusion_matrix(tasks, chosen, labels=range(len(names)))
    sent = zip(names, confusion.diagonal().tolist(), confusion.sum(axis=1).tolist(), strict=True)
    return {
        "names": names,
        **share_of(int(confusion.trace()), len(pairs)),
        "tasks": {name: share_of(right, count) for name, right, count in sent if count},
        "confusion": confusion.tolist(),
        "calibration": calibration(names, cells),
    }

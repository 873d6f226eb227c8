"""How much of each task's own LoRA a system keeps: the headline of the report, and how sure it is.

A system's headline is, averaged over tasks,

    100 * score(system, task) / score(oracle, task)        [percent]

where the oracle answers each task with the LoRA trained on it. The interval is a paired bootstrap over
examples (Efron & Tibshirani, 1993): systems scored on equally many rows of a task are resampled with the
same indices. It knows the luck of the rows, not the luck of the training.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

Results = Mapping[str, Any]
"""The dictionary that `report.write_json` describes."""

Interval = tuple[float, float]

RESAMPLES = 2000


class Normalised(TypedDict):
    """Percent of the oracle: mean over tasks, 95 % interval, each task; what is left out and why."""

    score: float | None
    ci: Interval | None
    per_task: dict[str, float]
    refused: dict[str, str]


def normalised(results: Results) -> dict[str, Normalised]:
    """Each system's score as a percentage of the oracle's.

    A task whose own LoRA is no better than the base model measures nothing: it is left out for every system
    and named under `refused`. A system without a cell for one of the other tasks gets no score, since its
    mean would be over fewer tasks than the others'.
    """
    refused = refused_tasks(results)
    draws = _draws(results)
    summary = {}
    for system in (system["name"] for system in results["systems"]):
        ratios = _ratios(results, system)
        missing = {t: f"{system} was not scored on it" for t in results["tasks"] if t not in {**ratios, **refused}}
        whole = bool(ratios) and not missing
        summary[system] = Normalised(
            score=float(np.mean(list(ratios.values()))) if whole else None,
            ci=_interval(draws[system]) if whole and system in draws else None,
            per_task=ratios,
            refused={**refused, **missing},
        )
    return summary


def difference(results: Results, one: str, other: str) -> tuple[float, Interval | None]:
    """How many points of normalised score one system is ahead of another, with the paired 95 % interval.

    Both must have a score in `normalised(results)`.
    """
    scores, draws = normalised(results), _draws(results)
    points = (scores[one]["score"] or 0.0) - (scores[other]["score"] or 0.0)
    paired = one in draws and other in draws
    return points, _interval(draws[one] - draws[other]) if paired else None


def refused_tasks(results: Results) -> dict[str, str]:
    """The tasks on which nothing can be divided by the oracle's score, with the reason."""
    oracle, base = named(results, "oracle"), named(results, "base")
    reasons = {}
    for task in results["tasks"]:
        own, floor = headline_score(results, oracle, task), headline_score(results, base, task)
        if own is None:
            reasons[task] = "its own LoRA was not scored"
        elif own <= 0:
            reasons[task] = f"its own LoRA scores {own:.1f}"
        elif floor is not None and own <= floor:
            reasons[task] = f"its own LoRA ({own:.1f}) is no better than the base model ({floor:.1f})"
    return reasons


def named(results: Results, kind: str) -> str | None:
    """The name of the one system of a kind: "base", "oracle" or "moa"."""
    return next((system["name"] for system in results["systems"] if system["kind"] == kind), None)


def find_cell(results: Results, system: str | None, task: str) -> Mapping[str, Any] | None:
    """What was measured for a system on a task; None when nothing was."""
    return next((c for c in results["cells"] if c["system"] == system and c["task"] == task), None)


def headline_score(results: Results, system: str | None, task: str) -> float | None:
    """The one score that stands for a cell, 0 to 100."""
    cell = find_cell(results, system, task)
    return None if cell is None else cell["scores"][results["tasks"][task]["headline"]]


def mean_nll(results: Results, system: str) -> float | None:
    """Mean over tasks of the right answer's negative log-likelihood; None when one is missing."""
    cells = [find_cell(results, system, task) for task in results["tasks"]]
    values = [cell["nll"] for cell in cells if cell is not None and cell.get("nll") is not None]
    return float(np.mean(values)) if values and len(values) == len(cells) else None


def nll_interval(results: Results, system: str) -> Interval | None:
    """95 % interval of `mean_nll`, by a bootstrap over the examples of each task; None without two or more of each."""
    cells = [find_cell(results, system, task) for task in results["tasks"]]
    if not cells or not all(cell and len(cell.get("nll_per_example") or ()) > 1 for cell in cells):
        return None
    rng, drawn = np.random.default_rng(results["seed"]), []
    for cell in cells:
        losses = np.array(cell["nll_per_example"])
        # Centred on the mean itself, which is over answer tokens and not over examples.
        means = losses[rng.integers(len(losses), size=(RESAMPLES, len(losses)))].mean(axis=1)
        drawn.append(means - losses.mean() + cell["nll"])
    return _interval(np.mean(drawn, axis=0))


def _ratios(results: Results, system: str) -> dict[str, float]:
    """Percent of the oracle on each task that can be divided by it and was scored."""
    refused, oracle = refused_tasks(results), named(results, "oracle")
    ratios = {}
    for task in results["tasks"]:
        score, own = headline_score(results, system, task), headline_score(results, oracle, task)
        if task not in refused and score is not None and own is not None:
            ratios[task] = 100 * score / own
    return ratios


def _draws(results: Results) -> dict[str, np.ndarray]:
    """Bootstrap distributions of the normalised scores, for systems with per-example scores on every task."""
    refused, oracle = refused_tasks(results), named(results, "oracle") or ""
    tasks = [task for task in results["tasks"] if task not in refused]
    drawn: dict[str, list[np.ndarray]] = defaultdict(list)
    for index, task in enumerate(tasks):
        means = _resampled_means(results, task, [results["seed"], index])
        for system in means.keys() if oracle in means else ():
            own = np.where(means[oracle] > 0, means[oracle], np.nan)
            ratios = 100 * means[system] / own
            # Centred on the score itself, since BLEU is not the mean of its examples' scores.
            drawn[system].append(ratios - np.nanmean(ratios) + _ratios(results, system)[task])
    return {system: np.mean(rows, axis=0) for system, rows in drawn.items() if len(rows) == len(tasks)}


def _resampled_means(results: Results, task: str, seed: list[int]) -> dict[str, np.ndarray]:
    """System -> the means of `RESAMPLES` resamples of its examples.

    Cells of one size hold the same rows in the same order, so they are resampled together.
    """
    by_size: dict[int, dict[str, list[float]]] = defaultdict(dict)
    for cell in results["cells"]:
        if cell["task"] == task and len(cell.get("per_example") or ()) > 1:  # of one row nothing is known but itself
            by_size[len(cell["per_example"])][cell["system"]] = cell["per_example"]
    means: dict[str, np.ndarray] = {}
    for size, rows in by_size.items():
        rng, scores = np.random.default_rng([*seed, size]), np.array(list(rows.values()))
        # How often each example is drawn, 100 resamples at a time: memory stays small for large test sets.
        drawn = [
            rng.multinomial(size, np.full(size, 1 / size), size=100) @ scores.T / size for _ in range(RESAMPLES // 100)
        ]
        means.update(zip(rows, np.concatenate(drawn).T, strict=True))
    return means


def _interval(draws: np.ndarray) -> Interval | None:
    if np.isnan(draws).all():
        return None
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return float(low), float(high)

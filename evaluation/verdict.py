"""The answer in one sentence: route or merge, by how much, and what each costs."""

from collections.abc import Mapping
from typing import Any

from moa.evaluation.summary import Interval, Results, difference, named, normalised


def verdict(results: Results) -> str:
    """Compare the mixture with the best merge, from the numbers alone.

    One is called better only when the 95 % interval of their paired difference excludes zero. The best merge
    is picked on the rows it is compared on, which flatters it a little; the sentence says out of how many.
    """
    scores = normalised(results)
    routed = named(results, "moa")
    merges = [system["name"] for system in results["systems"] if system["kind"] == "merge"]
    points = {name: scores[name]["score"] for name in merges if scores[name]["score"] is not None}
    if routed is None or not merges:
        return f"No verdict: these results hold {'no merge' if routed else 'no mixture'} to compare."
    if scores[routed]["score"] is None or not points:
        return f"No verdict: {_why(scores[routed]['refused'])}."
    best = max(points, key=lambda name: points[name] or 0.0)
    gap, interval = difference(results, routed, best)
    kept = {"routing": scores[routed]["score"] or 0.0, _short(best): points[best] or 0.0}
    return f"{_compared(kept, gap, interval, len(points))}{_costs(results, routed, best)}."


def cost_words(cost: Mapping[str, Any]) -> str:
    """A cost in words, `1.9 M parameters (rank 56) and 4.0 % of a prefill`; what is unknown is left out."""
    words = [f"{_count(cost['extra_parameters'])} parameters"] if cost.get("extra_parameters") is not None else []
    if words and cost.get("rank") is not None:
        words[0] += f" (rank {cost['rank']})"
    if cost.get("prefill_overhead"):
        words.append(f"{100 * cost['prefill_overhead']:.1f} % of a prefill")
    return " and ".join(words)


def _why(refused: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{task}: {reason}" for task, reason in refused.items())
    return f"no score can be compared ({reasons})" if reasons else "the merges were not scored"


def _compared(kept: Mapping[str, float], gap: float, interval: Interval | None, merges: int) -> str:
    """`kept` is {"routing": percent, merge: percent}; gap and interval are routing minus the merge."""
    routing, merge = kept
    share, best = (
        "of what each task's own LoRA scores",
        f"the best of {merges} merges" if merges > 1 else "the only merge",
    )
    if interval is not None and interval[0] > 0:
        ahead = f"{gap:.1f} points more (95 % interval {interval[0]:.1f} to {interval[1]:.1f})"
        return f"Route: it keeps {kept[routing]:.1f} % {share}, {ahead} than {merge}, {best}"
    if interval is not None and interval[1] < 0:
        ahead = f"{-gap:.1f} points more (95 % interval {-interval[1]:.1f} to {-interval[0]:.1f})"
        return f"Merge: {merge}, {best}, keeps {kept[merge]:.1f} % {share}, {ahead} than routing"
    doubt = (
        "of unknown uncertainty"
        if interval is None
        else f"whose 95 % interval ({interval[0]:+.1f} to {interval[1]:+.1f}) includes zero"
    )
    both = f"routing keeps {kept[routing]:.1f} % and {merge}, {best}, {kept[merge]:.1f} % {share}"
    return f"No clear winner: {both}, a difference of {gap:+.1f} points {doubt}"


def _costs(results: Results, routed: str, merged: str) -> str:
    costs = {cost["system"]: cost_words(cost) for cost in results.get("costs") or []}
    if not costs.get(routed) or not costs.get(merged):
        return ""
    return f"; routing adds {costs[routed]} to the base model, {_short(merged)} adds {costs[merged]}"


def _short(system: str) -> str:
    return system.split(":", 1)[-1]


def _count(parameters: int) -> str:
    """1_892_352 -> "1.9 M"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.1f} {unit}"
    return str(parameters)

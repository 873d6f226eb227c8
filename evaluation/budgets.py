"""What each budget of adapters costs and keeps, and how many adapters are enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moa.evaluation.summary import Results, difference, mean_nll, normalised

if TYPE_CHECKING:
    from moa.evaluation.clusters import Composition
    from moa.evaluation.composition import Composer


def described(results: Results, composed: Mapping[int, Composition], composer: Composer) -> list[dict[str, Any]]:
    """For each budget, the smallest first: its clusters, what it keeps, what it costs.

    Each has `budget`; `clusters`, name to `members` and the `scale` of their merge; `score`, in percent of what each
    task's own LoRA scores, and `ci`; mean `nll` over tasks; `routed_right`, the share of prompts that went to the
    cluster of their task's expert; `parameters` of its adapters; `latency`, see `moa.evaluation.latency`.
    """
    scores, costs = normalised(results), {cost["system"]: cost for cost in results["costs"]}
    budgets = []
    for budget, composition in sorted(composed.items()):
        system = f"compose:{budget}"
        budgets.append(
            {
                "budget": budget,
                "clusters": {
                    name: {"members": list(members), "scale": composer.strength(members)["scale"]}
                    for name, members in zip(composition.names, composition.clusters, strict=True)
                },
                "score": scores[system]["score"],
                "ci": scores[system]["ci"],
                "nll": mean_nll(results, system),
                "routed_right": _routed_right(results, composition, system),
                "parameters": costs[system]["extra_parameters"],
                "latency": {name: value for name, value in composer.latencies[budget].items() if name != "key"},
            }
        )
    return budgets


def _routed_right(results: Results, composition: Composition, system: str) -> float | None:
    hits = [
        chosen == composition.cluster_of([cell["task"]])[0]
        for cell in results["cells"]
        if cell["system"] == system and any(cell["task"] in members for members in composition.clusters)
        for chosen in cell["routed"]
    ]
    return sum(hits) / len(hits) if hits else None


def recommendation(results: Results) -> tuple[int, str]:
    """The budget to keep, and why in one sentence.

    It is the smallest that is not worse than the best, as far as the 95 % interval of their paired difference tells.
    Where no score can be compared, it is the one of the lowest mean negative log-likelihood.
    """
    budgets = results["budgets"]
    scored = [of for of in budgets if of["score"] is not None]
    if not scored:
        best = min(budgets, key=lambda of: of["nll"])
        return best["budget"], (
            f"Keep {_adapters(best)}: no task's own LoRA can be compared with, and the mean negative log-likelihood "
            f"is lowest there ({best['nll']:.3f})."
        )
    best = max(scored, key=lambda of: of["score"])
    for of in scored:
        gap, interval = difference(results, _system(of), _system(best))
        if of is best:
            return of["budget"], _sentence(
                of, budgets, ", the most of all" + (", and fewer are worse" * (of is not scored[0]))
            )
        if interval is not None and interval[1] >= 0:
            near = f"{gap:+.1f} points beside the best, {_adapters(best)}"
            bounds = f"(95 % interval {interval[0]:+.1f} to {interval[1]:+.1f})"
            return of["budget"], _sentence(of, budgets, f", {near} {bounds}")
    raise AssertionError("the best is not worse than itself")


def _sentence(of: Mapping[str, Any], budgets: Sequence[Mapping[str, Any]], beside_best: str) -> str:
    said = f"Keep {_adapters(of)}: {of['score']:.1f} % of what each task's own LoRA scores{beside_best}"
    most = budgets[-1]
    if of is not most:
        share = 100 * of["parameters"] / most["parameters"]
        time = of["latency"]["ratio"] / most["latency"]["ratio"]
        said += f"; with {share:.0f} % of the parameters and {time:.2f} x the time of {_adapters(most)}"
    return f"{said}."


def _adapters(of: Mapping[str, Any]) -> str:
    return f"{of['budget']} adapter{'s' * (of['budget'] > 1)}"


def _system(of: Mapping[str, Any]) -> str:
    return f"compose:{of['budget']}"

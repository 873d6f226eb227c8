"""Quality of a mixture at every budget of adapters, against what it costs: four small plots in one figure."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moa.evaluation.plots import COLOURS, FAINT, INK, STYLE, as_svg

SCORE, NLL = "% of each task's own LoRA", "mean NLL (lower is better)"
PARAMETERS, TIME = "adapter parameters, millions", "time of a mixed batch, base = 1"


def budgets_svg(found: Mapping[str, Any]) -> str:
    """The figure as text, to stand inside an HTML page and follow it between light and dark."""
    with matplotlib.rc_context(STYLE):
        figure = draw_budgets(found)
        figure.patch.set_alpha(0)
        return as_svg(figure, "compose")


def budgets_png(found: Mapping[str, Any]) -> bytes:
    """The figure on white; the same results give the same bytes."""
    buffer = io.BytesIO()
    draw_budgets(found).savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def draw_budgets(found: Mapping[str, Any]) -> Figure:
    """Score with its 95 % interval and likelihood, against parameters and time; the ring is the budget kept."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.2), layout="constrained")
        panels = figure.subplots(2, 2, sharex="col", sharey="row")
        for column, (cost, of_cost) in enumerate(((PARAMETERS, _millions), (TIME, _ratio))):
            _panel(panels[0][column], found, of_cost, "score")
            _panel(panels[1][column], found, of_cost, "nll")
            panels[1][column].set_xlabel(cost)
        panels[0][0].set_ylabel(SCORE)
        panels[1][0].set_ylabel(NLL)
        for axes in panels[0]:
            axes.axhline(100, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        for axes in panels.flat:
            axes.patch.set_alpha(0)
            axes.margins(0.12)
            axes.grid(color=FAINT, alpha=0.3, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def _panel(axes: Axes, found: Mapping[str, Any], of_cost: Callable[[Mapping[str, Any]], float], quality: str) -> None:
    shown = [of for of in found["budgets"] if of[quality] is not None]
    if not shown:
        axes.text(0.5, 0.6, "no score can be compared", transform=axes.transAxes, ha="center", va="center")
        return
    x, y = [of_cost(of) for of in shown], [of[quality] for of in shown]
    axes.plot(x, y, color=COLOURS["moa"], linewidth=1.2, marker="o", markersize=4)
    for of, across, up in zip(shown, x, y, strict=True):
        if quality == "score" and of["ci"] is not None:
            axes.plot([across, across], of["ci"], color=COLOURS["moa"], linewidth=1, alpha=0.5)
        if of["budget"] == found["kept"]:
            axes.plot([across], [up], "o", markersize=11, markerfacecolor="none", markeredgecolor=COLOURS["merge"])
        axes.annotate(str(of["budget"]), (across, up), xytext=(6, 5), textcoords="offset points", fontsize=8)


def _millions(of: Mapping[str, Any]) -> float:
    return of["parameters"] / 1e6


def _ratio(of: Mapping[str, Any]) -> float:
    return of["latency"]["ratio"]

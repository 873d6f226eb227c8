"""The report's three figures, as SVG text to stand inside an HTML page.

Text and axes are drawn in `currentColor` on nothing, so that they follow the page between light and dark.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moa.evaluation.summary import Results, headline_score, normalised, refused_tasks

INK = "#010203"  # stands for currentColor, which Matplotlib does not know
FAINT = "#8c8c8c"
COLOURS = {"base": "#9aa0a6", "lora": "#7ea6d6", "moa": "#1f6fd6", "router": "#5bb0a8", "merge": "#e08a3c"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.hashsalt": "moa",  # same results, same bytes
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
}
WIDTH = 5.2  # inches: 9 pt text stays readable when the page is as narrow as a phone


def score_bars(results: Results) -> str:
    """Normalised score of every system with its 95 % interval; 100 is each task's own LoRA."""
    summary = normalised(results)
    shown = [s for s in results["systems"] if s["kind"] != "oracle" and summary[s["name"]]["score"] is not None]
    with matplotlib.rc_context(STYLE):
        figure, axes = blank_figure(0.27 * len(shown) + 0.8)
        for row, system in enumerate(shown):
            _bar(axes, row, COLOURS[system["kind"]], summary[system["name"]])
        axes.axvline(100, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_yticks(range(len(shown)), [system["name"] for system in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, max(112, *axes.get_xlim()))
        axes.set_xlabel("% of each task's own LoRA, mean over tasks")
        axes.tick_params(length=0)
        axes.grid(axis="x", color=FAINT, alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        return as_svg(figure, "bars")


def adapter_heat_map(results: Results) -> str:
    """Each LoRA on each task: its score as text, its share of the task's own LoRA as colour."""
    loras = [system["name"] for system in results["systems"] if system["kind"] == "lora"]
    tasks, refused, summary = list(results["tasks"]), refused_tasks(results), normalised(results)
    shares = [[summary[lora]["per_task"].get(task, np.nan) for task in tasks] for lora in loras]
    scores = [[headline_score(results, lora, task) for task in tasks] for lora in loras]
    texts = [["" if score is None else f"{score:.0f}" for score in row] for row in scores]
    columns = [f"{task} *" if task in refused else task for task in tasks]
    with matplotlib.rc_context(STYLE):
        figure, axes = blank_figure(0.34 * len(loras) + 1.7)
        rows = [lora.split(":", 1)[-1] for lora in loras]
        _matrix(axes, np.array(shares, dtype=float).clip(0, 100), texts, rows, columns)
        axes.set_ylabel("LoRA trained on")
        axes.set_xlabel("scored on")
        figure.colorbar(axes.images[0], ax=axes, label="% of the task's own LoRA", fraction=0.05, pad=0.02)
        return as_svg(figure, "heat")


def router_confusion(router: Mapping[str, Any]) -> str:
    """How many prompts of each task went to each adapter; colour is the share of the task's prompts."""
    counts = np.array(router["confusion"], dtype=float)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [[f"{count:.0f}" if count else "·" for count in row] for row in counts]
    with matplotlib.rc_context(STYLE):
        figure, axes = blank_figure(0.34 * len(counts) + 1.7)
        _matrix(axes, shares, texts, router["names"], router["names"])
        axes.set_ylabel("task of the prompt")
        axes.set_xlabel("routed to")
        figure.colorbar(axes.images[0], ax=axes, label="% of the task's prompts", fraction=0.05, pad=0.02)
        return as_svg(figure, "router")


def risk_curve(router: Mapping[str, Any]) -> str:
    """Wrong experts among the prompts that the router is surest of, against their share of all prompts."""
    risks = 100 * np.array(router["calibration"]["risks"])
    coverage = 100 * np.arange(1, len(risks) + 1) / len(risks)
    with matplotlib.rc_context(STYLE):
        figure, axes = blank_figure(1.9)
        axes.plot(coverage, risks, color=COLOURS["moa"], marker="o", markersize=3)
        axes.set_xlim(0, 103)
        axes.set_ylim(0, max(1.0, 1.1 * risks.max()))
        axes.set_xlabel("surest prompts, % of all")
        axes.set_ylabel("wrong LoRA, %")
        axes.grid(color=FAINT, alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        return as_svg(figure, "risk")


def blank_figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    return figure, axes


def _bar(axes: Axes, row: int, colour: str, share: Mapping[str, Any]) -> None:
    axes.barh(row, share["score"], height=0.66, color=colour)
    end = share["score"]
    if share["ci"] is not None:
        low, high = share["ci"]
        axes.plot([low, high], [row, row], color=INK, linewidth=1.2, solid_capstyle="butt")
        end = max(end, high)
    if 85 < end < 100:  # clear of the dashed line
        end = 100
    axes.annotate(
        f"{share['score']:.1f}",
        (end, row),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )


def _matrix(
    axes: Axes,
    shares: np.ndarray,
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
) -> None:
    axes.imshow(np.ma.masked_invalid(shares), cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (row, column), share in np.ndenumerate(shares):
        ink = INK if np.isnan(share) else "black" if share < 55 else "white"
        axes.text(column, row, texts[row][column], ha="center", va="center", color=ink, fontsize=8)


def as_svg(figure: Figure, name: str) -> str:
    """The <svg> element alone, its ids prefixed: three figures share one page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace(INK, "currentColor")

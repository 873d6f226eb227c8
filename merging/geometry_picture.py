"""The geometry of adapters as one picture: what is alike, what is shared, what belongs together, what cancels."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moa.merging.geometry import AGREE, Geometry, tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAINT = "#8c8c8c"
CELL = 0.55
"""Inches that a pair of adapters takes in a heat map."""


def draw(found: Geometry) -> "Figure":
    """Four panels: cosines, overlaps, the tree of the groups, cancellation by layer. Adapters in the tree's order."""
    import matplotlib
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import leaves_list

    side = 2.6 + CELL * len(found.names)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(2 * side + 1, side + 4.2), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        panels = figure.subplots(2, 2, height_ratios=[side, 3.6])
        order = leaves_list(tree(found.whole.cosines))
        _cosines(panels[0, 0], found, order)
        _overlaps(panels[0, 1], found, order)
        _groups(panels[1, 0], found)
        _cancellation(panels[1, 1], found)
    return figure


def _cosines(axes: "Axes", found: Geometry, order: Sequence[int]) -> None:
    values = found.whole.cosines.numpy()[np.ix_(order, order)].copy()
    np.fill_diagonal(values, np.nan)  # always 1
    most = max(np.abs(np.nan_to_num(values)).max(), AGREE)
    _heat(axes, values, [found.names[i] for i in order], "RdBu", -most, most)
    axes.set_title("cosine of the updates: blue agrees, red conflicts")


def _overlaps(axes: "Axes", found: Geometry, order: Sequence[int]) -> None:
    inputs, outputs = (
        m.numpy()[np.ix_(order, order)] for m in (found.whole.input_overlap, found.whole.output_overlap)
    )
    values = np.triu(inputs, 1) + np.tril(outputs, -1)
    np.fill_diagonal(values, np.nan)
    _heat(axes, values, [found.names[i] for i in order], "Purples", 0, 1)
    axes.set_title("shared directions: inputs above, outputs below the diagonal")


def _groups(axes: "Axes", found: Geometry) -> None:
    from scipy.cluster.hierarchy import dendrogram

    looks = {"color_threshold": 1 - AGREE, "above_threshold_color": FAINT, "leaf_font_size": 9}
    dendrogram(tree(found.whole.cosines), labels=found.names, orientation="left", ax=axes, **looks)
    axes.invert_yaxis()  # the order of the heat maps
    axes.axvline(1 - AGREE, color="black", linewidth=1, linestyle=(0, (4, 3)))
    axes.set_title("which belong together")
    axes.set_xlabel("1 - mean cosine; they agree right of the dashed line")
    axes.tick_params(length=0)
    axes.spines[["top", "left", "right"]].set_visible(False)


def _cancellation(axes: "Axes", found: Geometry) -> None:
    """One line for each kind of layer over the depth, if layers are numbered."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for index, (name, layer) in enumerate(found.layers.items()):
        depth = re.search(r"\.(\d+)\.", name)
        kind = name.rpartition(".")[2] if depth else name
        lines.setdefault(kind, []).append((int(depth[1]) if depth else index, 100 * layer.cancellation))
    for kind, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), label=kind, linewidth=1.4, marker="o", markersize=3)
    orthogonal = 100 * found.whole.cancellation_if_orthogonal
    axes.axhline(orthogonal, color="black", linewidth=1, linestyle=(0, (4, 3)), label="if orthogonal")
    axes.set_title("what the weighted sum cancels, by layer")
    axes.set_ylabel("% of the adapters' norms")
    axes.set_xlabel("layer")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _heat(axes: "Axes", values: np.ndarray, names: Sequence[str], colours: str, least: float, most: float) -> None:
    axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=least, vmax=most)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "white" if abs(value) > 0.6 * most else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)

"""The geometry of adapters as one picture: what is alike, what is shared, what belongs together, what cancels."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from moa.merging.geometry import AGREE, Geometry, tree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAINT = "#8c8c8c"
CELL = 0.55
"""Inches that a pair of adapters takes in a heat map."""
PANELS = [["cosines", "signs", "overlaps"], ["mean", "largest", "groups"], ["cancelled"] * 3]


def draw(found: Geometry) -> "Figure":
    """All that `moa inspect` prints of pairs, groups and layers; adapters stand in the order of the tree.

    Seven panels: cosines, sign conflict, overlaps; mean and largest principal angles, the tree of the groups;
    cancellation by layer.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from scipy.cluster.hierarchy import leaves_list

    side = 2.6 + CELL * len(found.names)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(3 * side + 1, 2 * side + 3.2), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        panels = figure.subplot_mosaic(PANELS, height_ratios=[side, side, 3])
        order = leaves_list(tree(found.whole.cosines))
        _cosines(panels["cosines"], found, order)
        _signs(panels["signs"], found, order)
        _directions(panels, found, order)
        _groups(panels["groups"], found)
        _cancellation(panels["cancelled"], found)
    return figure


def _cosines(axes: "Axes", found: Geometry, order: Sequence[int]) -> None:
    values = found.whole.cosines.numpy()[np.ix_(order, order)].copy()
    np.fill_diagonal(values, np.nan)  # always 1
    most = max(np.abs(np.nan_to_num(values)).max(), AGREE)
    _heat(axes, values, [found.names[i] for i in order], "RdBu", -most, most, "z.2f")
    axes.set_title("cosine of the updates\nblue agrees, red conflicts")


def _signs(axes: "Axes", found: Geometry, order: Sequence[int]) -> None:
    values = found.whole.sign_conflict.numpy()[np.ix_(order, order)].copy()
    np.fill_diagonal(values, np.nan)  # always 0
    most = max(np.abs(np.nan_to_num(values - 0.5)).max(), AGREE / 2)
    _heat(axes, values, [found.names[i] for i in order], "RdBu_r", 0.5 - most, 0.5 + most, "z.2f")
    axes.set_title("sign conflict\nred above the half of unrelated ones")


def _directions(panels: Mapping[str, "Axes"], found: Geometry, order: Sequence[int]) -> None:
    """What two adapters read in common, above the diagonal, and what they write, below it; dark is shared."""
    names = [found.names[i] for i in order]
    for panel, measure, colours, most, form, title in (
        ("overlaps", "overlap", "Purples", 1, "z.2f", "shared directions"),
        ("mean", "mean_angle", "Purples_r", 90, "z.1f", "mean principal angle, in degrees"),
        ("largest", "largest_angle", "Purples_r", 90, "z.1f", "largest principal angle, in degrees"),
    ):
        inputs, outputs = (
            getattr(found.whole, f"{side}_{measure}").numpy()[np.ix_(order, order)] for side in ("input", "output")
        )
        values = np.triu(inputs, 1) + np.tril(outputs, -1)
        np.fill_diagonal(values, np.nan)
        _heat(panels[panel], values, names, colours, 0, most, form)
        panels[panel].set_title(f"{title}\ninputs above the diagonal, outputs below")


def _groups(axes: "Axes", found: Geometry) -> None:
    from scipy.cluster.hierarchy import dendrogram

    looks = {"color_threshold": 1 - AGREE, "above_threshold_color": FAINT, "leaf_font_size": 9}
    with warnings.catch_warnings():  # of a tree without height, that of copies
        warnings.filterwarnings("ignore", "Attempting to set identical low and high xlims")
        dendrogram(tree(found.whole.cosines), labels=found.names, orientation="left", ax=axes, **looks)
    axes.invert_yaxis()  # the order of the heat maps
    axes.set_xlim(left=max(axes.get_xlim()[0], 1.05 - AGREE))  # the tree grows to the left
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


def _heat(
    axes: "Axes", values: np.ndarray, names: Sequence[str], colours: str, least: float, most: float, form: str
) -> None:
    image = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=least, vmax=most)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            red, green, blue, _ = image.to_rgba(value)
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
            axes.text(column, row, format(value, form), ha="center", va="center", color=ink)

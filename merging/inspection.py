"""`moa inspect`: what adapters have in common, before they are merged. Loads no model.

moa inspect adapters/sst2 adapters/mnli adapters/squad --output geometry
"""

import argparse
import io
import json
import math
import tempfile
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from rich.console import Console, Group
from rich.progress import track
from rich.table import Table

from moa.errors import OneLineParser, run
from moa.merging.flags import add_initial
from moa.merging.geometry import SAMPLED, Geometry, geometry

SHOWN_PAIRS = 28
SHOWN_LAYERS = 3
ANGLES = {
    "inputs: mean": "input_mean_angle",
    "inputs: largest": "input_largest_angle",
    "outputs: mean": "output_mean_angle",
    "outputs: largest": "output_largest_angle",
}
"""Column of the table of angles to the field of `Comparison`."""
EXAMPLES = """\
examples:
  moa inspect adapters/sst2 adapters/mnli adapters/squad
  moa inspect A B C --weights 1 1 0.5 --output geometry
  moa inspect A user/adapter-on-the-hub --json > geometry.json

Cosines near 0 mean that a sum keeps each adapter whole; near 1, that they are alike and a mean does; below 0,
that they work against each other. Half of the signs of unrelated adapters differ. Principal angles are 0 degrees where
two adapters read (inputs) or write (outputs) the same directions, and 90 where they share none.
"""


@run
def main(argv: list[str] | None = None) -> None:
    """Parse, compare, print, and write what was asked for."""
    asked = _parse(argv)
    if asked.output and Path(asked.output).exists():
        raise ValueError(f"{asked.output} exists already: choose another output folder, or remove it first")
    errors = Console(stderr=True)
    found = geometry(
        asked.adapters,
        asked.weights,
        check_base=asked.check_base,
        initial=dict(asked.initial or ()),
        seed=asked.seed,
        progress=lambda names, description: track(names, description, console=errors, transient=True),
    )
    if asked.json:
        print(_json(found), end="")
    else:
        Console(markup=False).print(tables(found), highlight=False)  # names may have brackets
    if asked.output:
        _write(Path(asked.output), found)
        errors.print(f"written to {asked.output}", markup=False, soft_wrap=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="moa inspect",
        description="Compare LoRA adapters of one base model and say which belong together; loads no model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help="folder of an adapter, or its repository on the Hub")
    weights = "one for each adapter in the predicted sum (default: 1/N each)"
    add("--weights", nargs="+", action="extend", type=float, help=weights)
    add("--output", help="folder to create, with geometry.json and geometry.png")
    add("--json", action="store_true", help="print everything as JSON, the layers too")
    add("--seed", type=int, default=0, help="for the entries whose signs are compared (default: %(default)s)")
    add_initial(parser)
    add("--no-check-base", dest="check_base", action="store_false", help="compare across base models")
    return parser.parse_args(argv)


def tables(found: Geometry) -> Group:
    """What the console shows: adapters, pairs from most to least alike, the predicted sum, the suggestion."""
    return Group(_adapters(found), "", _pairs(found), "", *_lines(found))


def _adapters(found: Geometry) -> Table:
    table = _table("adapters", "adapter", "weight", "norm", "layers", "effective rank", "group")
    group_of = {name: number for number, group in enumerate(found.groups, start=1) for name in group}
    for index, name in enumerate(found.names):
        layers = sum(bool(layer.norms[index] > 0) for layer in found.layers.values())
        norm, rank = float(found.whole.norms[index]), float(found.whole.effective_ranks[index])
        weight = f"{found.weights[index]:.3g}"
        table.add_row(name, weight, f"{norm:.3g}", str(layers), _shown(rank, ".1f"), str(group_of[name]))
    return table


def _pairs(found: Geometry) -> Group:
    """Two tables of the same pairs: what they do to each other, and how far apart the directions are."""
    whole = found.whole
    pairs = sorted(combinations(range(len(found.names)), 2), key=lambda pair: -float(whole.cosines[pair].nan_to_num()))
    half = SHOWN_PAIRS // 2
    title = "pairs"
    if len(pairs) > SHOWN_PAIRS:
        title = f"the {half} pairs most alike and the {half} least (--json has all)"
        pairs = pairs[:half] + pairs[-half:]
    alike = _table(title, "adapter", "and", "cosine", "input overlap", "output overlap", "sign conflict")
    numbers = (whole.cosines, whole.input_overlap, whole.output_overlap, whole.sign_conflict)
    angles = _table("their principal angles, in degrees", "adapter", "and", *ANGLES)
    for pair in pairs:
        names = [found.names[index] for index in pair]
        alike.add_row(*names, *(_shown(float(of[pair]), ".3f") for of in numbers))
        angles.add_row(*names, *(_shown(float(getattr(whole, field)[pair]), ".1f") for field in ANGLES.values()))
    return Group(alike, "", angles)


def _lines(found: Geometry) -> Iterator[str]:
    whole = found.whole
    yield (
        f"the weighted sum cancels {_shown(whole.cancellation, '.1%')} of the adapters' norms "
        f"({_shown(whole.cancellation_if_orthogonal, '.1%')} if they were orthogonal), "
        f"its effective rank is {_shown(whole.effective_rank_of_sum, '.1f')}"
    )
    if conflicting := _conflicting_layers(found):
        yield "it cancels more than orthogonal updates would in " + ", ".join(conflicting)
    if found.sampled:
        yield f"signs of {len(found.sampled)} layers are compared in {SAMPLED} rows and columns drawn from each"
    for name, held in found.not_compared.items():
        yield f"not compared: {', '.join(held)} of {name}"
    yield f"suggestion: {found.suggestion}"


def _conflicting_layers(found: Geometry) -> list[str]:
    """The layers in which updates point against each other in sum, worst first, a few of them by name."""
    excess = {name: of.cancellation - of.cancellation_if_orthogonal for name, of in found.layers.items()}
    worst = sorted((name for name, value in excess.items() if value > 1e-6), key=lambda name: -excess[name])
    named = [f"{name} ({found.layers[name].cancellation:.1%})" for name in worst[:SHOWN_LAYERS]]
    return named + [f"{len(worst) - SHOWN_LAYERS} more"] * (len(worst) > SHOWN_LAYERS)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("adapter", "and") else "right")
    return table


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _json(found: Geometry) -> str:
    return json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n"


def _write(directory: Path, found: Geometry) -> None:
    """A folder that appears complete or not at all."""
    from moa.merging.geometry_picture import draw

    picture = io.BytesIO()
    draw(found).savefig(picture, format="png", dpi=150)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch:
        written = Path(scratch) / "geometry"
        written.mkdir()
        (written / "geometry.json").write_text(_json(found))
        (written / "geometry.png").write_bytes(picture.getvalue())
        written.rename(directory)

"""What `moa compose` leaves behind: a table, one HTML page that needs nothing else, and its figure as a PNG.

The results are those of `moa.evaluation.report` without times, the systems called compose:M, and beside them:

    {"method": "ties:density=0.4", "geometry_share": 0.5, "experts": [...],
     "agreement": {"cosines": [[...]], "nll": [[of each expert, then of the base model, on each task]],
                   "gains_kept": [[...]], "agreement": [[...]]},     # null where nothing is known
     "budgets": [see `moa.evaluation.budgets.described`],
     "recommended": budget, "recommendation": one sentence, "kept": the budget that was written}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa.evaluation.files import write_whole

COLUMNS = (
    "adapters",
    "% of own LoRA",
    "95 % interval",
    "mean NLL",
    "routed right",
    "parameters",
    "time",
    "who shares one",
)


def print_composed(found: Mapping[str, Any], console: Console) -> None:
    """A row for each budget, then the sentence."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[-1] else "right")
    for row in table_rows(found):
        table.add_row(*row)
    console.print(table)
    console.print(Text(time_note(found), style="dim"))
    console.print(Text(f"\n{found['recommendation']}", style="bold"))


def table_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cells of the table, as text."""
    for of in found["budgets"]:
        shared = ["+".join(cluster["members"]) for cluster in of["clusters"].values() if len(cluster["members"]) > 1]
        yield (
            str(of["budget"]),
            "–" if of["score"] is None else f"{of['score']:.1f}",
            "–" if of["ci"] is None else "{:.1f} to {:.1f}".format(*of["ci"]),
            "–" if of["nll"] is None else f"{of['nll']:.3f}",
            "–" if of["routed_right"] is None else f"{100 * of['routed_right']:.0f} %",
            f"{of['parameters'] / 1e6:.2f} M",
            f"{of['latency']['ratio']:.2f} x",
            ", ".join(shared) or "nobody",
        )


def time_note(found: Mapping[str, Any]) -> str:
    """How the times were measured."""
    batch = found["budgets"][0]["latency"]
    return (
        f"Time: routing, prefill of {batch['prompts']} prompts of all tasks, up to {batch['prompt_tokens']} tokens, "
        f"and {batch['new_tokens']} tokens written, beside the base model alone at the same time "
        f"({found['machine']}). Parameters: of the adapters, without router and fallback."
    )


def write_png(found: Mapping[str, Any], path: Path) -> None:
    """The figure alone, on white."""
    from moa.evaluation.compose_plot import budgets_png

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(budgets_png(found))


def write_html(found: Mapping[str, Any], path: Path) -> Path:
    """One page with the recommendation, the figure and the tables inside; it asks nothing of the network."""
    import jinja2

    from moa.evaluation.compose_plot import budgets_svg

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("moa.evaluation").joinpath("compose.html.j2").read_text("utf-8"))
    page = template.render(
        found=found,
        figure=budgets_svg(found),
        columns=COLUMNS,
        rows=list(table_rows(found)),
        time_note=time_note(found),
    )
    return write_whole(page, path)

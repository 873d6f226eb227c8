"""`moa methods`: what the registry holds, as a table, as JSON, or as the page METHODS.md.

moa methods --markdown > METHODS.md
"""

import json
from typing import Any, Literal, get_args, get_origin

from moa.errors import OneLineParser
from moa.merging.registry import LAWS, MergeMethod, methods, optional


def main(argv: list[str] | None = None) -> None:
    """Print the list."""
    parser = OneLineParser(prog="moa methods", description="List the merge methods and their options.")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="as the page METHODS.md")
    asked = parser.parse_args(argv)
    if asked.json:
        print(json.dumps([facts(method) for method in methods().values()], indent=2))
    elif asked.markdown:
        print(markdown(), end="")
    else:
        _print_table()


def facts(method: MergeMethod) -> dict[str, Any]:
    """Everything the registry knows about a method, as plain data."""
    return {
        "name": method.name,
        "summary": method.summary,
        "aliases": list(method.aliases),
        "paper": method.paper,
        "needs": list(method.needs),
        "takes_rank": "rank" in method.parameters,
        "degree_in_weights": method.degree,
        "breaks": dict(method.breaks),
        "options": {
            name: {"default": p.default, "values": _values(p.annotation), "help": method.describe(name)}
            for name, p in method.options.items()
        },
    }


def markdown() -> str:
    """The page METHODS.md."""
    laws = "\n".join(f"- **{law}**: {meaning}." for law, meaning in LAWS.items())
    return HEAD + laws + "\n" + "".join(_section(method) for method in methods().values())


HEAD = """\
# Merge methods

Generated from the registry by `moa methods --markdown`; do not edit by hand.

Each method takes adapters with updates `B_i A_i` (scaling folded in) and weights `w_i`, 1/N by default, one
layer at a time. `scale` multiplies the result of any method. A rank is that of the stored result.

Every method is tested for the laws below, with adapters of different ranks and layers that some of them lack.
Where a method does not obey a law, its section says why.

"""


def _section(method: MergeMethod) -> str:
    text = method.doc.split("\n\nArgs:")[0].split("\n\nRaises:")[0]
    lines = ["", f"## {method.name}", "", text, ""]
    if method.aliases:
        lines.append(f"Also known as {', '.join(f'`{alias}`' for alias in method.aliases)}.")
    if method.needs:
        lines.append(f"Needs {' and '.join(method.needs)}.")
    if method.paper:
        lines.append(f"Paper: <{method.paper}>.")
    lines.append(f"Degree in the weights: {method.degree}. Takes a rank: {_yes('rank' in method.parameters)}.")
    if method.options:
        lines += ["", "| option | values | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {_values(p.annotation)} | `{p.default}` | {method.describe(name)} |"
            for name, p in method.options.items()
        ]
    if method.breaks:
        lines += ["", "Does not obey:", "", *(f"- **{law}**: {reason}." for law, reason in method.breaks.items())]
    return "\n".join(lines) + "\n"


def _print_table() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_lines=True)
    for column in ("method", "what it does", "options"):
        table.add_column(column)
    for method in methods().values():
        options = [f"--{name} {p.default}" for name, p in method.options.items()]
        options += ["--rank"] if "rank" in method.parameters else []
        table.add_row(method.name, method.summary, "\n".join(options))
    console = Console()
    console.print(table)
    console.print("all take --weights and --scale; METHODS.md explains each")


def _values(annotation: Any) -> str:
    annotation, may_be_none = optional(annotation)
    values = [*map(str, get_args(annotation))] if get_origin(annotation) is Literal else [annotation.__name__]
    return ", ".join(values + ["none"] * may_be_none)


def _yes(value: bool) -> str:
    return "yes" if value else "no"

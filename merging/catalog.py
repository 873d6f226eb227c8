"""`moa methods`: what the registry holds, as a table, as JSON, or as the page METHODS.md; or all about some methods.

moa methods ties svd
moa methods --markdown > METHODS.md
"""

import argparse
import json
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moa.errors import OneLineParser, run
from moa.merging.registry import LAWS, MergeMethod, find_method, methods, optional

EXAMPLES = """\
examples:
  moa methods
  moa methods ties dare_ties
  moa methods --json regmean
  moa methods --markdown > METHODS.md
"""
BROUGHT_BY = {
    "statistics": "of each adapter's data; run 'moa statistics' once for each, or give --statistics",
    "objective": "examples that judge the weights on a model; give --model and --tasks",
}
"""How a user brings along what a method of that need is given."""
INDENT = (0, 0, 0, 2)


@run
def main(argv: list[str] | None = None) -> None:
    """Print the list, or the methods that are named."""
    asked = _parse(argv)
    found = [find_method(name) for name in asked.methods] or methods().values()
    chosen = list({method.name: method for method in found}.values())
    if asked.json:
        print(json.dumps([facts(method) for method in chosen], indent=2))
    elif asked.markdown:
        print("".join(map(_section, chosen)) if asked.methods else markdown(), end="")
    else:
        console = Console(markup=False, highlight=False)  # brackets in a docstring are shapes
        console.print(Group(*map(page, chosen)) if asked.methods else table(chosen))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="moa methods",
        description="List the merge methods, or explain some of them with their options.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="explain these (default: list all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="as the page METHODS.md")
    return parser.parse_args(argv)


def facts(method: MergeMethod) -> dict[str, Any]:
    """Everything the registry knows about a method, as plain data."""
    return {
        "name": method.name,
        "summary": method.summary,
        "aliases": list(method.aliases),
        "paper": method.paper,
        "needs": list(method.needs),
        "takes_rank": "rank" in method.parameters,
        "computes_in": method.computes_in,
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

Methods compute in float64, and those that act on entries of dense updates in float32, as their sections say; a
hierarchical merge computes as its node does. The dtype to store is rounded to once, at the end.

A method that draws at random draws for each layer by its name, and for each adapter by the adapter's name too, so that
neither order nor what else is merged matters. With one `seed`, adapters draw the same wherever they are read from, if
they have the same names; one that is renamed draws anew.

Every method is tested for the laws below, with adapters of different ranks and layers that some of them lack.
Where a method does not obey a law, its section says why.

"""


def _section(method: MergeMethod) -> str:
    lines = ["", f"## {method.name}", "", _explanation(method), ""]
    if method.aliases:
        lines.append(f"Also known as {', '.join(f'`{alias}`' for alias in method.aliases)}.")
    if method.needs:
        lines.append(f"Needs {' and '.join(method.needs)}.")
    if method.paper:
        lines.append(f"Paper: <{method.paper}>.")
    lines.append(f"Degree in the weights: {method.degree}. Takes a rank: {_yes('rank' in method.parameters)}.")
    if method.computes_in != "float64":
        lines.append(f"Computes in {method.computes_in}, whatever dtype is stored.")
    if method.options:
        lines += ["", "| option | values | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{name}` | {_values(p.annotation)} | `{p.default}` | {method.describe(name)} |"
            for name, p in method.options.items()
        ]
    if method.breaks:
        lines += ["", "Does not obey:", "", *(f"- **{law}**: {reason}." for law, reason in method.breaks.items())]
    return "\n".join(lines) + "\n"


def table(listed: Iterable[MergeMethod]) -> Group:
    """Methods by name: what each does, what a user has to bring along for it, its options with their defaults."""
    found = Table(show_lines=True)
    for column in ("method", "what it does", "needs", "options"):
        found.add_column(column, overflow="fold")
    for method in listed:
        options = [f"{_flag(name)} {p.default}" for name, p in method.options.items()]
        options += ["--rank"] if "rank" in method.parameters else []
        found.add_row(method.name, method.summary, "\n".join(method.needs), "\n".join(options))
    needs = (f"{need}: {brought}" for need, brought in BROUGHT_BY.items())
    return Group(found, *needs, "all take --weights and --scale; 'moa methods METHOD' explains one")


def page(method: MergeMethod) -> Group:
    """All about one method: its docstring, what it needs, its options, the laws that it breaks and why."""
    paragraphs = re.sub(r"(?<=\S)\n(?=[^\s-])", " ", _explanation(method))  # as wide as the console; lists stay lists
    said: list[RenderableType] = [Text(method.name, style="bold"), "", Padding(paragraphs, INDENT), ""]
    if method.aliases:
        said.append(f"also known as {', '.join(method.aliases)}")
    said += [f"paper: {method.paper}"] if method.paper else []
    said += [f"needs {need}: {BROUGHT_BY[need]}" for need in method.needs]
    said.append(f"takes a rank: {_yes('rank' in method.parameters)}; degree in the weights: {method.degree}")
    if method.computes_in != "float64":
        said.append(f"computes in {method.computes_in}, whatever --dtype is")
    if method.options:
        said += ["", _options(method)]
    if method.breaks:
        said += ["", "does not obey:"]
        said += [Padding(f"{law} ({LAWS[law]}): {why}", INDENT) for law, why in method.breaks.items()]
    said += ["", "for example:", Padding(example(method), INDENT)]
    return Group(*said, "")


def example(method: MergeMethod) -> str:
    """A command line that merges by this method, its own options as they are by default."""
    words = ["moa merge runs/sst2 runs/squad --method", method.name]
    words += [_given(name, p.default) for name, p in method.options.items() if p.default is not None]
    words += ["--model Qwen/Qwen2-0.5B --tasks sst2 squad"] if "objective" in method.needs else []
    return " ".join([*words, "--output merged"])


def _given(option: str, value: Any) -> str:
    if isinstance(value, bool):
        return _flag(option if value else f"no_{option}")
    return f"{_flag(option)} {value}"


def _options(method: MergeMethod) -> Table:
    found = Table(show_lines=True)
    for column in ("option", "values", "default", ""):
        found.add_column(column, overflow="fold")
    for name, parameter in method.options.items():
        values = _values(parameter.annotation)
        found.add_row(_flag(name), values, str(parameter.default), method.describe(name))
    return found


def _explanation(method: MergeMethod) -> str:
    """The docstring without what the table of options says."""
    return method.doc.split("\n\nArgs:")[0].split("\n\nRaises:")[0]


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _values(annotation: Any) -> str:
    annotation, may_be_none = optional(annotation)
    values = [*map(str, get_args(annotation))] if get_origin(annotation) is Literal else [annotation.__name__]
    return ", ".join(values + ["none"] * may_be_none)


def _yes(value: bool) -> str:
    return "yes" if value else "no"

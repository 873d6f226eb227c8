"""`moa merge`: adapters in, one adapter out.

Options of the methods become flags by themselves: a new method needs no line here.
"""

import argparse
from typing import Any, Literal, get_args, get_origin

from rich.console import Console
from rich.progress import track

from moa.errors import OneLineParser, run
from moa.merging.api import merge
from moa.merging.checks import DTYPES
from moa.merging.registry import MergeMethod, methods, optional

EXAMPLES = """\
examples:
  moa merge adapters/sst2 adapters/mnli adapters/squad --output merged
  moa merge A B C --method svd --weights 1 1 0.5 --rank 8 --output merged
  moa merge A B --method ties --density 0.3 --scale 0.8 --output merged
  moa merge A user/adapter-on-the-hub --method concatenation --dtype bfloat16 --output merged

`moa methods` explains the methods. Weights are used as given, 1/N each by default.
"""


@run
def main(argv: list[str] | None = None) -> None:
    """Parse, merge, print the report."""
    asked = vars(_parse(argv))
    errors = Console(stderr=True)
    result = merge(
        asked.pop("adapters"),
        **asked,
        progress=lambda names, description: track(names, description, console=errors, transient=True),
    )
    console = Console()
    console.print(result.report)
    console.print(f"written to {result.path}")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="moa merge",
        description="Merge LoRA adapters of one base model into one vanilla LoRA adapter; loads no model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help="folder of an adapter, or its repository on the Hub")
    add("--method", default="svd", help=f"one of {', '.join(methods())} (default: %(default)s)")
    add("--weights", nargs="+", type=float, help="one for each adapter (default: 1/N each)")
    add("--rank", type=_rank, help="rank of the result: a number, auto, or full (default: the method's own)")
    add("--output", required=True, help="folder to create")
    add("--name", help="name in the report (default: the method's)")
    add("--scale", type=float, default=1.0, help="factor on the result (default: %(default)s)")
    add("--restore-norm", action="store_true", help="bring each layer to the mean norm of the adapters there")
    add("--seed", type=int, default=0, help="for methods that draw random numbers (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="dtype to store (default: the widest of the inputs)")
    add("--no-check-base", dest="check_base", action="store_false", help="merge across base models")
    _add_method_options(parser.add_argument_group("options of the methods"))
    return parser.parse_args(argv)


def _rank(value: str) -> int | str:
    try:
        return value if value in ("auto", "full") else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, auto or full, got {value!r}") from None


def _add_method_options(group: argparse._ArgumentGroup) -> None:
    """One flag for every option name, left out of the result unless given: defaults stay the methods'."""
    users: dict[str, list[MergeMethod]] = {}
    for method in methods().values():
        for option in method.options:
            users.setdefault(option, []).append(method)
    for option, those in users.items():
        group.add_argument(
            *dict.fromkeys((f"--{option}", f"--{option.replace('_', '-')}")),
            default=argparse.SUPPRESS,
            help=_help(option, those),
            **_kind(option, those),
        )


def _kind(option: str, those: list[MergeMethod]) -> dict[str, Any]:
    """How argparse should read an option; which of the values a method takes is checked by the method."""
    kinds = [optional(method.options[option].annotation)[0] for method in those]
    values = dict.fromkeys(value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind))
    if values:
        return {"type": str, "metavar": "|".join(map(str, values))}
    if kinds[0] is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": kinds[0]}


def _help(option: str, those: list[MergeMethod]) -> str:
    """What the option does, once for all methods that say the same of it."""
    said: dict[tuple[str, Any], list[str]] = {}
    for method in those:
        key = (method.describe(option), method.options[option].default)
        said.setdefault(key, []).append(method.name)
    parts = (f"{', '.join(names)}: {text} (default: {default})" for (text, default), names in said.items())
    return "; ".join(parts).replace("%", "%%")

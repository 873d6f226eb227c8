"""What `moa merge` takes on its command line, and its help, which shows what concerns the merge that is asked about.

Options of the methods, and those of the rule for ranks, become flags by themselves: a new one needs no line here. A
flag is shown with hyphens and may be written with underscores too. One that takes several values may be given several
times: none of them is lost.
"""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moa.errors import OneLineParser
from moa.merging.checks import DTYPES
from moa.merging.ranks import RankRule
from moa.merging.registry import MergeMethod, described, find_method, methods, optional

ABOUT = """\
Merge LoRA adapters of one base model into one LoRA adapter that stock PEFT loads. Weights are used as given, 1/N each
by default.

examples:
  moa merge adapters/sst2 adapters/mnli adapters/squad --output merged
  moa merge A B C --method svd --weights 1 1 0.5 --rank 8 --output merged
  moa merge A B --method ties --density 0.3 --scale 0.8 --output merged
  moa merge A user/adapter-on-the-hub --rank auto --dtype bfloat16 --output merged
  moa merge dora-A lora-B --base Qwen/Qwen2-0.5B --output merged
  moa merge A B --method lorahub --model smollm2-135m --tasks sst2 mnli --source pocket --output merged
  moa merge --config recipe.yaml --output merged
  moa merge --config merged --output again                 the merge that a folder remembers, once more
  moa merge A B --state kept --output merged               keep the merge, to change it later:
  moa merge --state kept --add C --remove B --reweight A=0.7 --output merged-2
"""
EXPLAINED = """\
moa merge --method ties --help (or moa methods ties) explains a method and its own options,
moa merge --rank auto --help how ranks are chosen.
"""
WIDTH = 110


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was given; nothing stands in the result for what was not, so that defaults stay those of `merge`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = _asked_about(argv)
    method = find_method(asked.method) if asked.method else None
    parser = OneLineParser(
        prog="moa merge",
        usage="moa merge ADAPTER ADAPTER ... --output FOLDER [options]",
        description=ABOUT if method is None else f"{method.name}: {method.summary}\n",
        epilog=_by_family() if method is None else f"moa methods {method.name} explains the method.\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_common(parser)
    _add_rank_rule(parser.add_argument_group("how --rank auto chooses"), shown=asked.rank == "auto")
    _add_data(parser, set(method.needs if method else ()) | ({"statistics"} if asked.rank == "auto" else set()))
    _add_kept(parser.add_argument_group("a merge that is kept"))
    _add_method_options(parser.add_argument_group(f"options of {method.name}" if method else "of methods"), method)
    return parser.parse_args(argv)


def rank_flag(field: str) -> str:
    """The flag of a field of `RankRule`, which says that it is about ranks."""
    return field if "rank" in field else f"rank_{field}"


def _asked_about(argv: Sequence[str]) -> argparse.Namespace:
    """The method and the rank that help is to be about, before anything else is looked at."""
    early = OneLineParser(add_help=False)
    early.add_argument("--method")
    early.add_argument("--rank")
    return early.parse_known_args(argv)[0]


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("adapters", nargs="*", metavar="ADAPTER", help="folder of an adapter, or its repository on the Hub")
    add("--config", metavar="FILE", help="recipe in YAML, or the folder of a merged adapter to merge it again")
    add("--method", help="how to merge (default: svd)")
    add(
        "--weights",
        nargs="+",
        action="extend",
        type=float,
        metavar="W",
        help="one for each adapter (default: 1/N each)",
    )
    add("--rank", type=_rank, help="rank of the result: a number, auto, or full (default: the method's own)")
    add("--output", metavar="FOLDER", help="folder to create")
    add("--name", help="name in the report (default: the method's)")
    add("--scale", type=float, metavar="X", help="factor on the result (default: 1)")
    add("--restore-norm", action="store_true", help="bring each layer to the mean norm of the adapters there")
    add("--seed", type=int, metavar="N", help="for methods that draw, by adapters' names (default: 0)")
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype to store (default: the widest of the inputs); whatever it is, merges are computed in float64, and "
        "in float32 by methods that act on single entries, such as ties",
    )
    add("--no-check-base", dest="check_base", action="store_false", help="merge across base models")
    add("--base", help="base model's name or folder, for adapters that need its weights (DoRA, modules_to_save, bias)")
    add_initial(parser)


def add_initial(parser: argparse.ArgumentParser) -> None:
    """The flag for adapters whose initialisation changed the base model, as pairs of a name and a folder."""
    text = "PiSSA or OLoRA adapter before its training"
    parser.add_argument("--initial", nargs="+", action="extend", type=_pair, metavar="NAME=FOLDER", help=text)


def _add_data(parser: argparse.ArgumentParser, needs: set[str]) -> None:
    """What a user brings along, shown to those who need it."""

    def add(need: str, flag: str, text: str, **settings: Any) -> None:
        several = {"action": "extend"} if "nargs" in settings else {}
        data.add_argument(flag, help=text if need in needs else argparse.SUPPRESS, **several, **settings)

    data = parser.add_argument_group("for methods that need data")
    add("statistics", "--statistics", "by moa statistics (default: beside each adapter)", nargs="+", metavar="FILE")
    add("objective", "--model", "base model, for methods that search or learn their weights")
    add("objective", "--tasks", "tasks whose examples judge the weights", nargs="+")
    add("objective", "--source", "where examples come from: hub, pocket, or local with --data-dir")
    add("objective", "--data-dir", "folder with TASK/{train,validation,test}.jsonl")
    add("objective", "--examples", "examples of each task (default: 16)", type=int, metavar="N")


def _add_kept(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    text = "where it is kept: created, or changed and merged again, as the last time unless --method says otherwise"
    add("--state", metavar="FOLDER", help=text)
    add("--add", nargs="+", action="extend", metavar="ADAPTER[=W]", help="adapters to take in")
    add("--remove", nargs="+", action="extend", metavar="NAME", help="adapters to take out")
    add("--reweight", nargs="+", action="extend", type=_weight, metavar="NAME=W", help="weights to change")
    add("--state-rank", type=int, metavar="N", help="keep the weighted sum alone, at this rank (default: keep all)")


def _add_rank_rule(group: argparse._ArgumentGroup, *, shown: bool) -> None:
    """One flag for every field of `RankRule`, described by its docstring."""
    hints = get_type_hints(RankRule)
    for field in fields(RankRule):
        text = _with_default(described(RankRule, field.name), field.default)
        _add_flag(group, rank_flag(field.name), hints[field.name], text if shown else None)


def _add_method_options(group: argparse._ArgumentGroup, chosen: MergeMethod | None) -> None:
    """One flag for every option name of all methods; shown are those of the chosen one."""
    for option, kind in _option_kinds().items():
        if chosen and option in chosen.options:
            parameter = chosen.options[option]
            _add_flag(group, option, parameter.annotation, _with_default(chosen.describe(option), parameter.default))
        else:
            _add_flag(group, option, kind, None)


def _option_kinds() -> dict[str, Any]:
    """The type of every option; words may differ from method to method, which each checks itself."""
    kinds: dict[str, Any] = {}
    for method in methods().values():
        for option, parameter in method.options.items():
            kinds.setdefault(option, parameter.annotation)
    return kinds


def _add_flag(group: argparse._ArgumentGroup, name: str, kind: Any, text: str | None) -> None:
    """A flag of this kind, without a text not shown."""
    kind, _ = optional(kind)
    settings: dict[str, Any] = {"dest": name, "type": kind}
    if get_origin(kind) is Literal:
        settings |= {"type": str, "metavar": "|".join(map(str, get_args(kind)))}
    elif kind is bool:
        settings = {"dest": name, "action": argparse.BooleanOptionalAction}
    else:
        settings["metavar"] = {int: "N", float: "X"}.get(kind, name.upper())
    shown = argparse.SUPPRESS if text is None else text.replace("%", "%%")
    group.add_argument(f"--{name.replace('_', '-')}", help=shown, **settings)
    if "_" in name:
        group.add_argument(f"--{name}", help=argparse.SUPPRESS, **settings)


def _with_default(text: str, default: Any) -> str:
    return text if default is None else f"{text.rstrip('.')} (default: {default})"


def _by_family() -> str:
    """The methods as their files have them together, each file's docstring beginning with what those are."""
    families: dict[str, list[str]] = {}
    for method in methods().values():
        families.setdefault(method.function.__module__, []).append(method.name)
    lines = []
    for module, names in families.items():
        family = (sys.modules[module].__doc__ or module).replace("\n", " ").partition(":")[0].rstrip(". ")
        lines += textwrap.wrap(f"{', '.join(names)}: {family}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(["methods:", *lines, "", EXPLAINED])


def _rank(value: str) -> int | str:
    try:
        return value if value in ("auto", "full") else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, auto or full, got {value!r}") from None


def _pair(value: str) -> tuple[str, str]:
    name, equals, text = value.rpartition("=")
    if not equals or not name or not text:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {value!r}")
    return name, text


def _weight(value: str) -> tuple[str, float]:
    name, text = _pair(value)
    try:
        return name, float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be NAME=NUMBER, got {value!r}") from None

"""`moa merge`: adapters in, one adapter out.

Options of the methods, and those of the rule for ranks, become flags by themselves: a new one needs no line here.
"""

import argparse
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track

from moa.errors import OneLineParser, run
from moa.merging.api import MergeResult
from moa.merging.checks import DTYPES
from moa.merging.ranks import RankRule
from moa.merging.recipe import found, merge_recipe, read_recipe
from moa.merging.registry import MergeMethod, described, find_method, methods, optional

EXAMPLES = """\
examples:
  moa merge adapters/sst2 adapters/mnli adapters/squad --output merged
  moa merge A B C --method svd --weights 1 1 0.5 --rank 8 --output merged
  moa merge A B --method ties --density 0.3 --scale 0.8 --output merged
  moa merge A B --rank auto --rank-energy 0.95 --max-rank 16 --output merged
  moa merge A user/adapter-on-the-hub --method concatenation --dtype bfloat16 --output merged
  moa merge dora-A lora-B --base Qwen/Qwen2-0.5B --output merged
  moa merge A B --method lorahub --model smollm2-135m --tasks sst2 mnli --source pocket --output merged

a recipe, which may name merges of merges; and the merge that a folder remembers, once more:
  moa merge --config recipe.yaml --output merged
  moa merge --config merged --output again

a merge that is kept, to add, remove and re-weight later:
  moa merge A B --state kept --output merged
  moa merge --state kept --add C --remove B --reweight A=0.7 --method ties --output merged-2

`moa methods` explains the methods. Weights are used as given, 1/N each by default.
"""
JUDGED_BY = ("model", "tasks", "source", "data_dir", "examples")


@run
def main(argv: list[str] | None = None) -> None:
    """Parse, merge, print the report."""
    asked = vars(_parse(argv))
    errors = Console(stderr=True)
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=errors, show_time=False, show_path=False)])
    logging.getLogger("moa.merging").setLevel(logging.INFO)
    asked["progress"] = lambda names, description: track(names, description, console=errors, transient=True)
    if rule := _rank_rule(asked):
        asked["rank"] = RankRule(**rule)
    result = _kept(asked) if "state" in asked else _merged(asked)
    console = Console()
    console.print(result.report)
    if "state" in asked:
        console.print(f"kept in {asked['state']}")
    console.print(f"written to {result.path}" if result.path else "no --output was given, so no adapter was written")


def _kept(asked: dict[str, Any]) -> MergeResult:
    """What the command line asks of a merge that is kept."""
    for option in ("initial", *JUDGED_BY):
        if option in asked:
            raise ValueError(f"--{option.replace('_', '-')} is not for a merge that is kept: leave it or --state out")
    from moa.merging.kept_merge import merge_kept

    return merge_kept(**asked)


def _merged(asked: dict[str, Any]) -> MergeResult:
    """What the command line asks for, as a recipe."""
    for option in ("add", "remove", "reweight", "state_rank"):
        if option in asked:
            raise ValueError(f"--{option.replace('_', '-')} changes a merge that was kept: name its folder by --state")
    config, adapters = asked.pop("config", None), asked.pop("adapters", [])
    if (config is None) == (not adapters):
        raise ValueError("moa merge takes adapters, or a recipe by --config: give one of the two")
    recipe = {"adapters": adapters} if config is None else read_recipe(config)
    if "output" not in {**recipe, **asked}:
        raise ValueError("moa merge writes an adapter to a new folder: name it by --output")
    recipe |= {"method": asked.pop("method")} if "method" in asked else {}
    if "initial" in asked:
        asked["initial"] = dict(asked["initial"])
    beside = Path() if config is None else Path(config) if Path(config).is_dir() else Path(config).parent
    judged_by = {name: asked.pop(name) for name in JUDGED_BY if name in asked}
    if judged_by:
        shared = {key: value for key, value in (recipe | asked).items() if key in ("seed", "check_base")}
        asked["objective"] = _objective(recipe, beside, judged_by, shared)
    return merge_recipe(recipe, beside=beside, **asked)


def _rank_rule(asked: dict[str, Any]) -> dict[str, Any]:
    """The fields of `RankRule` that were given as flags, taken out of what was asked."""
    flags = {_rank_flag(field.name): field.name for field in fields(RankRule)}
    rule = {name: asked.pop(flag) for flag, name in flags.items() if flag in asked}
    if rule and asked.get("rank", "auto") != "auto":
        given = next(flag for flag, name in flags.items() if name in rule).replace("_", "-")
        raise ValueError(f"--{given} tells --rank auto how to choose, and --rank is {asked['rank']}")
    return rule


def _objective(recipe: dict[str, Any], beside: Path, judged_by: dict[str, Any], shared: dict[str, Any]) -> Any:
    """The examples that judge weights, on a model that holds the adapters."""
    method = find_method(str(recipe.get("method", "svd")))
    if "objective" not in method.needs:
        given = next(iter(judged_by)).replace("_", "-")
        raise ValueError(f"--{given} is for methods that look for their weights, and {method.name} does not")
    if lacking := [name for name in ("model", "tasks") if name not in judged_by]:
        raise ValueError(f"{method.name} judges weights by examples on a model: give --{lacking[0]} too")
    members = recipe.get("adapters") or []
    if not all(isinstance(member, str) for member in members):
        raise ValueError(
            f"{method.name} takes adapters by their folders, and this recipe has others: merge them first"
        )
    from moa.model_objective import objective_for

    return objective_for([found(member, beside) for member in members], **judged_by, **shared)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="moa merge",
        description="Merge LoRA adapters of one base model into one LoRA adapter that stock PEFT loads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("adapters", nargs="*", metavar="ADAPTER", help="folder of an adapter, or its repository on the Hub")
    add("--config", metavar="FILE", help="recipe in YAML, or the folder of a merged adapter to merge it again")
    add("--method", help=f"one of {', '.join(methods())} (default: svd)")
    add("--weights", nargs="+", type=float, help="one for each adapter (default: 1/N each)")
    add("--rank", type=_rank, help="rank of the result: a number, auto, or full (default: the method's own)")
    add("--output", help="folder to create")
    add("--name", help="name in the report (default: the method's)")
    add("--scale", type=float, help="factor on the result (default: 1)")
    add("--restore-norm", action="store_true", help="bring each layer to the mean norm of the adapters there")
    add("--seed", type=int, help="for methods that draw random numbers (default: 0)")
    add("--dtype", choices=DTYPES, help="dtype to store (default: the widest of the inputs)")
    add("--no-check-base", dest="check_base", action="store_false", help="merge across base models")
    add("--base", help="base model's name or folder, for adapters that need its weights (DoRA, modules_to_save, bias)")
    add("--initial", nargs="+", type=_pair, metavar="NAME=FOLDER", help="PiSSA or OLoRA adapter before its training")
    _add_rank_rule(parser.add_argument_group("how --rank auto chooses"))
    data = parser.add_argument_group("for methods that need data")
    data.add_argument(
        "--statistics", nargs="+", metavar="FILE", help="by moa statistics (default: beside each adapter)"
    )
    data.add_argument("--model", help="base model, for methods that search or learn their weights")
    data.add_argument("--tasks", nargs="+", help="tasks whose examples judge the weights")
    data.add_argument("--source", help="where examples come from: hub, pocket, or local with --data-dir")
    data.add_argument("--data-dir", help="folder with TASK/{train,validation,test}.jsonl")
    data.add_argument("--examples", type=int, help="examples of each task (default: 16)")
    kept = parser.add_argument_group("a merge that is kept")
    kept.add_argument("--state", metavar="FOLDER", help="where it is kept: created, or changed and merged again")
    kept.add_argument("--add", nargs="+", metavar="ADAPTER[=W]", help="adapters to take in")
    kept.add_argument("--remove", nargs="+", metavar="NAME", help="adapters to take out")
    kept.add_argument("--reweight", nargs="+", type=_weight, metavar="NAME=W", help="weights to change")
    kept.add_argument("--state-rank", type=int, help="keep the weighted sum alone, at this rank (default: keep all)")
    _add_method_options(parser.add_argument_group("options of the methods"))
    return parser.parse_args(argv)


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


def _add_rank_rule(group: argparse._ArgumentGroup) -> None:
    """One flag for every field of `RankRule`, described by its docstring."""
    hints = get_type_hints(RankRule)
    for field in fields(RankRule):
        text = f"{described(RankRule, field.name)} (default: {field.default})"
        _add_flag(group, _rank_flag(field.name), hints[field.name], text)


def _rank_flag(field: str) -> str:
    """A field's flag, which says that it is about ranks."""
    return field if "rank" in field else f"rank_{field}"


def _add_method_options(group: argparse._ArgumentGroup) -> None:
    """One flag for every option name, left out of the result unless given: defaults stay the methods'."""
    users: dict[str, list[MergeMethod]] = {}
    for method in methods().values():
        for option in method.options:
            users.setdefault(option, []).append(method)
    for option, those in users.items():
        kinds = [optional(method.options[option].annotation)[0] for method in those]
        words = dict.fromkeys(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
        _add_flag(group, option, Literal[tuple(words)] if words else kinds[0], _help(option, those))


def _add_flag(group: argparse._ArgumentGroup, name: str, kind: Any, text: str) -> None:
    """A flag of this kind; which words a method takes is checked by the method."""
    kind, _ = optional(kind)
    settings: dict[str, Any] = {"type": kind}
    if get_origin(kind) is Literal:
        settings = {"type": str, "metavar": "|".join(map(str, get_args(kind)))}
    elif kind is bool:
        settings = {"action": argparse.BooleanOptionalAction}
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    group.add_argument(*spellings, help=text.replace("%", "%%"), **settings)


def _help(option: str, those: list[MergeMethod]) -> str:
    """What the option does, once for all methods that say the same of it."""
    said: dict[tuple[str, Any], list[str]] = {}
    for method in those:
        key = (method.describe(option), method.options[option].default)
        said.setdefault(key, []).append(method.name)
    return "; ".join(f"{', '.join(names)}: {text} (default: {default})" for (text, default), names in said.items())

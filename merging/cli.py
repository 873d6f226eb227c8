"""`moa merge`: adapters in, one adapter out."""

import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track

from moa.errors import run
from moa.merging.api import MergeResult
from moa.merging.checks import check_output
from moa.merging.flags import parse, rank_flag
from moa.merging.ranks import RankRule
from moa.merging.recipe import check_options, found, merge_recipe, read_recipe
from moa.merging.registry import find_method, methods

JUDGED_BY = ("model", "tasks", "source", "data_dir", "examples")


@run
def main(argv: list[str] | None = None) -> None:
    """Parse, merge, print the report."""
    asked = vars(parse(argv))
    errors = Console(stderr=True)
    logging.basicConfig(format="%(message)s", handlers=[RichHandler(console=errors, show_time=False, show_path=False)])
    logging.getLogger("moa.merging").setLevel(logging.INFO)
    asked["progress"] = lambda names, description: track(names, description, console=errors, transient=True)
    if rule := _rank_rule(asked):
        asked["rank"] = RankRule(**rule)
    result = _kept(asked) if "state" in asked else _merged(asked)
    console = Console(markup=False)  # paths may have brackets
    console.print(result.report)
    if "state" in asked:
        console.print(f"kept in {asked['state']} ({_size(asked['state'])})", soft_wrap=True)
    said = f"written to {result.path}" if result.path else "no --output was given, so no adapter was written"
    console.print(said, soft_wrap=True)  # a path stays one word


def _size(folder: str) -> str:
    """What the files in a folder weigh."""
    return filesize.decimal(sum(file.stat().st_size for file in Path(folder).iterdir()))


def _kept(asked: dict[str, Any]) -> MergeResult:
    """What the command line asks of a merge that is kept."""
    for option in ("initial", *JUDGED_BY):
        if option in asked:
            raise ValueError(f"--{option.replace('_', '-')} is not for a merge that is kept: leave it or --state out")
    if "method" in asked:
        check_options(find_method(asked["method"]), _method_options(asked))
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
        asked["objective"] = _objective(recipe | asked, beside, judged_by)
    return merge_recipe(recipe, beside=beside, **asked)


def _rank_rule(asked: dict[str, Any]) -> dict[str, Any]:
    """The fields of `RankRule` that were given as flags, taken out of what was asked."""
    flags = {rank_flag(field.name): field.name for field in fields(RankRule)}
    rule = {name: asked.pop(flag) for flag, name in flags.items() if flag in asked}
    if rule and asked.get("rank", "auto") != "auto":
        given = next(flag for flag, name in flags.items() if name in rule).replace("_", "-")
        raise ValueError(f"--{given} tells --rank auto how to choose, and --rank is {asked['rank']}")
    return rule


def _method_options(asked: dict[str, Any]) -> dict[str, Any]:
    """Those of the keys that are an option of some method."""
    names = {option for method in methods().values() for option in method.options}
    return {name: value for name, value in asked.items() if name in names}


def _objective(recipe: dict[str, Any], beside: Path, judged_by: dict[str, Any]) -> Any:
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
    check_options(method, _method_options(recipe))  # now, since a model takes a while to load
    check_output(str(recipe["output"]))
    from moa.model_objective import objective_for

    shared = {key: value for key, value in recipe.items() if key in ("seed", "check_base")}
    return objective_for([found(member, beside) for member in members], **judged_by, **shared)

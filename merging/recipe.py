"""A merge written down: a YAML file, or what a merged adapter remembers of itself; it may name merges of merges.

    method: ties
    density: 0.3
    rank: 16
    output: merged
    adapters:
      - runs/sst2                      # a folder or a Hub repository
      - {path: runs/squad, weight: 0.5}
      - name: inference                # a merge of its own, made first and kept in memory
        method: svd
        weight: 2
        adapters: [runs/mnli, runs/rte]

Keys are the parameters of `merge` and the options of the method. A path is looked for beside the recipe, then from
the current folder.
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from moa.adapters import Adapter, read_adapter
from moa.errors import nearest
from moa.merging.api import MergeResult, merge
from moa.merging.checks import before_training
from moa.merging.layers import Progress, no_progress
from moa.merging.planned import Planned, asked_of
from moa.merging.ranks import RankRule
from moa.merging.registry import MergeMethod, find_method
from moa.merging.report import REPORT_FILE
from moa.yaml_options import read_mapping

SETTINGS = tuple(
    name
    for name, parameter in inspect.signature(merge).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("objective", "progress")
)
REPEATED = ("method", "name", "rank", "scale", "restore_norm", "seed", "dtype", "check_base")
MEMBER = ("path", "name", "weight", "sha256", "config_sha256", "initial")
NUMBER = int | float
KINDS: Mapping[str, tuple[Any, str]] = {
    "weight": (NUMBER, "a number"),
    "scale": (NUMBER, "a number"),
    "seed": (int, "a whole number"),
    "restore_norm": (bool, "true or false"),
    "check_base": (bool, "true or false"),
    "path": (str | Path, "a folder or a Hub repository"),
    "name": (str, "text"),
    "output": (str | Path, "a folder"),
    "base": (str | Path | torch.nn.Module, "a folder or a Hub repository"),
    "weights": (list | tuple, "a list of numbers"),
    "initial": (Mapping, "a mapping of adapters to folders"),
    "statistics": (list | tuple, "a list of files"),
}
"""What a file may get wrong: the values of these keys, and how to say so."""


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe in a YAML file, or that of the merge which wrote a folder's merge_report.json.

    Raises:
        FileNotFoundError: no such file, or a folder without a report.
        ValueError: not YAML, not a mapping, a key twice, a damaged report, or a merge of adapters that had no files.
    """
    path = Path(path)
    if not path.is_dir():
        return read_mapping(str(path))
    report = path / REPORT_FILE
    if not report.is_file():
        raise FileNotFoundError(f"{path} has no {REPORT_FILE}: only a merged adapter's folder can be merged again")
    try:
        return recipe_of(json.loads(report.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{report} is damaged or of another version ({error!r}): merge the adapters anew, or write a recipe"
        ) from error


def recipe_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that gives the merge of a report again, with the checksums its adapters must have.

    Raises:
        ValueError: an adapter of the merge has no file to read again.
    """
    settings = {name: report[name] for name in REPEATED} | {"base": report["base_weights"]}
    if report["statistics"]:
        settings["statistics"] = report["statistics"]
    return {**settings, **report["options"], "adapters": [_member_of(source) for source in report["sources"]]}


def _member_of(source: Mapping[str, Any]) -> dict[str, Any]:
    member = {"name": source["name"], "weight": source["weight"]}
    if source["path"] is not None:
        given = {key: source[key] for key in ("path", "sha256", "config_sha256", "initial") if source[key] is not None}
        return member | given
    if source["merge"] is not None:
        return recipe_of(source["merge"]) | member
    raise ValueError(f"adapter {source['name']!r} was part of a live model and has no file to merge again")


def merge_recipe(
    recipe: Mapping[str, Any], *, beside: Path = Path(), progress: Progress = no_progress, **instead: Any
) -> MergeResult:
    """Do what a recipe says, the inner merges first, after all of it was checked that can be.

    Args:
        recipe: as read by `read_recipe`.
        beside: folder where relative paths of the recipe are looked for before the current one.
        progress: as for `merge`.
        instead: parameters of `merge` that take the place of the recipe's; weights also of those that stand with
            the adapters.

    Raises:
        ValueError: an unknown key, a value of the wrong kind, no adapters, weights given twice, an adapter that is
            not what it was, or two merges that write to one place.
    """
    planned = _planned(recipe, beside, {name: value for name, value in instead.items() if value is not None})
    planned.check()
    return planned.merged(progress)


def _planned(recipe: Mapping[str, Any], beside: Path, instead: Mapping[str, Any]) -> Planned:
    """What a recipe says, with its adapters read; nothing is merged."""
    recipe = {**_located(recipe, beside), **instead}
    members = recipe.pop("adapters", None)
    if not isinstance(members, list | tuple) or not members:
        raise ValueError("a recipe names its adapters in a list `adapters:`, and this one has none")
    called = recipe.pop("method", None)
    called = "svd" if called is None else str(called)
    method = find_method(called)
    settings, options = _settings(recipe), _options(recipe, method)
    asked = asked_of(method, settings, options)
    paths = [member["path"] if isinstance(member, Mapping) and "path" in member else member for member in members]
    initial = before_training(paths, settings.pop("initial", None) or {})
    adapters, weights = zip(*(_member(member, beside, initial) for member in members), strict=True)
    if any(weight is not None for weight in weights) and "weights" not in instead:
        if "weights" in settings:
            raise ValueError("a recipe gives weights either in one list or with each adapter, and this one does both")
        settings["weights"] = [1 / len(weights) if weight is None else weight for weight in weights]
    return Planned(settings.get("name") or called, asked, adapters, settings | options)


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of `merge` that have a value."""
    settings = {key: _of_kind(key, recipe[key]) for key in (*SETTINGS, "objective") if recipe.get(key) is not None}
    if "rank" in settings:
        settings["rank"] = _rank(settings["rank"])
    return settings


def _options(recipe: Mapping[str, Any], method: MergeMethod) -> dict[str, Any]:
    """All other keys, which must be options of the method."""
    options = {key: value for key, value in recipe.items() if key not in (*SETTINGS, "objective")}
    for key in options:
        if key not in method.options and (hint := nearest(str(key), ("method", *SETTINGS))):
            raise ValueError(f"a recipe has no key {key!r}{hint}")
    check_options(method, options)
    return options


def _located(recipe: Mapping[str, Any], beside: Path) -> dict[str, Any]:
    """The recipe with its base model and statistics where they are found."""
    recipe = dict(recipe)
    if isinstance(recipe.get("base"), str):
        recipe["base"] = found(recipe["base"], beside)
    if isinstance(recipe.get("statistics"), list):
        recipe["statistics"] = [found(s, beside) if isinstance(s, str) else s for s in recipe["statistics"]]
    return recipe


def _of_kind(key: str, value: Any) -> Any:
    """The value, unless it is of another kind than the key takes."""
    kind, called = KINDS.get(key, (object, ""))
    items = value if key == "weights" and isinstance(value, list | tuple) else ()
    if value is not None and (not _is(value, kind) or not all(_is(item, NUMBER) for item in items)):
        raise ValueError(f"{key} of a recipe takes {called}, got {value!r}")
    return value


def _is(value: Any, kind: Any) -> bool:
    """`isinstance`, but true and false are no numbers."""
    return isinstance(value, kind) and (not isinstance(value, bool) or kind in (bool, object))


def check_options(method: MergeMethod, options: Mapping[str, Any]) -> None:
    """Refuse what the method does not take, before an adapter is read.

    Raises:
        ValueError: an option that it does not have, or a value that it cannot have.
    """
    try:
        method.check_options(options)
    except TypeError as error:  # in a file, a wrong type is a wrong value
        raise ValueError(str(error)) from error


def _rank(rank: Any) -> Any:
    """A number, a word, or a mapping of the fields of `RankRule`."""
    if rank in ("auto", "full") or isinstance(rank, RankRule) or _is(rank, int):
        return rank
    if not isinstance(rank, Mapping):
        raise ValueError(f"rank of a recipe takes a whole number, auto, full, or a rule's fields, got {rank!r}")
    known = [field.name for field in fields(RankRule)]
    for name in rank:
        if name not in known:
            raise ValueError(f"rank takes {', '.join(known)}, got {name!r}{nearest(str(name), known)}")
    return RankRule(**rank)


def _member(member: Any, beside: Path, initial: Mapping[str, str | Path]) -> tuple[Adapter | Planned, float | None]:
    """An adapter or a merge, and the weight that stands with it; `initial` has folders before training by path."""
    if isinstance(member, str | Path):
        member = {"path": str(member)}
    if not isinstance(member, Mapping) or ("path" in member) == ("adapters" in member):
        raise ValueError(f"an adapter of a recipe is a path, or has either `path` or `adapters`, got {member!r}")
    member = dict(member)
    weight = _of_kind("weight", member.pop("weight", None))
    if "adapters" in member:
        return _planned(member, beside, {"dtype": member.get("dtype") or "float64"}), weight
    for key in member:
        if key not in MEMBER:
            raise ValueError(f"an adapter of a recipe has {', '.join(MEMBER)}, got {key!r}{nearest(str(key), MEMBER)}")
        _of_kind("path" if key == "initial" else key, member[key])
    before = member.get("initial", initial.get(member["path"]))
    adapter = read_adapter(found(member["path"], beside), initial=before and found(str(before), beside))
    for key in ("sha256", "config_sha256"):
        wanted, got = member.get(key), getattr(adapter, key)
        if wanted and got != wanted:
            raise ValueError(
                f"{adapter.path.resolve()} is not the adapter that the recipe was written for: its {key} is {got}, "
                f"the recipe says {wanted}; leave {key} out to merge it all the same"
            )
    return replace(adapter, name=member.get("name", adapter.name)), weight


def found(path: str, beside: Path) -> str:
    """A path of a recipe, beside it if something is there."""
    return str(beside / path) if (beside / path).exists() else path

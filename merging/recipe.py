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
from moa.merging.ranks import RankRule
from moa.merging.registry import find_method
from moa.merging.report import REPORT_FILE
from moa.peft_checks import widest
from moa.yaml_options import read_mapping

SETTINGS = tuple(
    name
    for name, parameter in inspect.signature(merge).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("objective", "progress")
)
REPEATED = ("method", "name", "rank", "scale", "restore_norm", "seed", "dtype", "check_base")
MEMBER = ("path", "name", "weight", "sha256", "initial")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe in a YAML file, or that of the merge which wrote a folder's merge_report.json.

    Raises:
        FileNotFoundError: no such file, or a folder without a report.
        ValueError: not YAML, not a mapping, a key twice, or a merge of adapters that had no files.
    """
    path = Path(path)
    if not path.is_dir():
        return read_mapping(str(path))
    report = path / REPORT_FILE
    if not report.is_file():
        raise FileNotFoundError(f"{path} has no {REPORT_FILE}: only a merged adapter's folder can be merged again")
    return recipe_of(json.loads(report.read_text()))


def recipe_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that gives the merge of a report again, with the checksums its adapters must have.

    Raises:
        ValueError: an adapter of the merge has no file to read again.
    """
    settings = {name: report[name] for name in REPEATED} | {"base": report["base_weights"]}
    return {**settings, **report["options"], "adapters": [_member_of(source) for source in report["sources"]]}


def _member_of(source: Mapping[str, Any]) -> dict[str, Any]:
    member = {"name": source["name"], "weight": source["weight"]}
    if source["path"] is not None:
        given = {key: source[key] for key in ("path", "sha256", "initial") if source[key] is not None}
        return member | given
    if source["merge"] is not None:
        return recipe_of(source["merge"]) | member
    raise ValueError(f"adapter {source['name']!r} was part of a live model and has no file to merge again")


def merge_recipe(
    recipe: Mapping[str, Any], *, beside: Path = Path(), progress: Progress = no_progress, **instead: Any
) -> MergeResult:
    """Do what a recipe says, the inner merges first.

    Args:
        recipe: as read by `read_recipe`.
        beside: folder where relative paths are looked for before the current one.
        progress: as for `merge`.
        instead: parameters of `merge` that take the place of the recipe's.

    Raises:
        ValueError: an unknown key, no adapters, weights given twice, or an adapter that is not what it was.
    """
    recipe = {**recipe, **{name: value for name, value in instead.items() if value is not None}}
    members = recipe.pop("adapters", None)
    if not isinstance(members, list | tuple) or not members:
        raise ValueError("a recipe names its adapters in a list `adapters:`, and this one has none")
    method = find_method(str(recipe.pop("method", "svd")))
    settings = {key: recipe.pop(key) for key in SETTINGS if key in recipe}
    if settings.get("rank") is not None:
        settings["rank"] = _rank(settings["rank"])
    objective = recipe.pop("objective", None)
    for key in recipe:
        if key not in method.options and (hint := nearest(key, SETTINGS)):
            raise ValueError(f"a recipe has no key {key!r}{hint}")
    method.check_options(recipe)
    paths = [member["path"] if isinstance(member, Mapping) and "path" in member else member for member in members]
    initial = before_training(paths, settings.pop("initial", None) or {})
    adapters, weights = zip(*(_member(member, beside, initial, progress) for member in members), strict=True)
    if any(weight is not None for weight in weights):
        if settings.get("weights") is not None:
            raise ValueError("a recipe gives weights either in one list or with each adapter, and this one does both")
        settings["weights"] = [1 / len(weights) if weight is None else weight for weight in weights]
    return merge(adapters, method.name, objective=objective, progress=progress, **settings, **recipe)


def _rank(rank: Any) -> Any:
    """A number, a word, or a mapping of the fields of `RankRule`."""
    if not isinstance(rank, Mapping):
        return rank
    known = [field.name for field in fields(RankRule)]
    for name in rank:
        if name not in known:
            raise ValueError(f"rank takes {', '.join(known)}, got {name!r}{nearest(name, known)}")
    return RankRule(**rank)


def _member(
    member: Any, beside: Path, initial: Mapping[str, str | Path], progress: Progress
) -> tuple[Adapter, float | None]:
    """One of the adapters, and the weight that stands with it; `initial` has folders before training by path."""
    if isinstance(member, str):
        member = {"path": member}
    if not isinstance(member, Mapping) or ("path" in member) == ("adapters" in member):
        raise ValueError(f"an adapter of a recipe is a path, or has either `path` or `adapters`, got {member!r}")
    member = dict(member)
    weight = member.pop("weight", None)
    if "adapters" in member:
        name = member.get("name") or member.get("method", "svd")
        inner = merge_recipe(member, beside=beside, progress=progress, dtype=member.get("dtype") or "float64")
        stored = widest(getattr(torch, source.dtype) for source in inner.report.sources)
        return replace(inner.adapter(name), dtype=stored), weight
    for key in member:
        if key not in MEMBER:
            raise ValueError(f"an adapter of a recipe has {', '.join(MEMBER)}, got {key!r}{nearest(key, MEMBER)}")
    before = member.get("initial", initial.get(member["path"]))
    adapter = read_adapter(_found(member["path"], beside), initial=before and _found(str(before), beside))
    wanted = member.get("sha256")
    if wanted and adapter.sha256 != wanted:
        raise ValueError(
            f"{member['path']} is not the adapter that the recipe was written for: its sha256 is {adapter.sha256}, "
            f"the recipe says {wanted}; leave sha256 out to merge it all the same"
        )
    return replace(adapter, name=member.get("name", adapter.name)), weight


def _found(path: str, beside: Path) -> str:
    return str(beside / path) if (beside / path).is_dir() else path

"""A merge that a recipe asks for, with the merges inside it: all is checked that can be before the first is made."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from moa.adapters import Adapter
from moa.merging.api import MergeResult, check_together, merge
from moa.merging.asked import Asked
from moa.merging.checks import check_rank, check_same_base, checked_weights, layer_ranks
from moa.merging.layers import Progress
from moa.merging.members import Members
from moa.merging.registry import MergeMethod
from moa.peft_checks import widest

DEFAULTS = {name: parameter.default for name, parameter in signature(merge).parameters.items()}


def asked_of(method: MergeMethod, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Asked:
    """What these parameters of `merge` ask for, refused if it cannot be."""
    given = {**DEFAULTS, **settings, "method": method, "options": method.check_options(options)}
    return Asked(**{field.name: given[field.name] for field in fields(Asked)})


@dataclass(frozen=True)
class Planned:
    """One merge of a recipe.

    Attributes:
        called: its name where it is an adapter of another merge.
        asked: of it, but for weights.
        members: adapters, and merges that are made first.
        settings: parameters of `merge`, and options of the method.
    """

    called: str
    asked: Asked
    members: Sequence["Adapter | Planned"]
    settings: Mapping[str, Any]

    def check(self) -> None:
        """Refuse what can be refused without the result of a merge inside.

        Raises:
            ValueError: as `merge`, or folders of the recipe that are in each other's way.
        """
        for one in self.merges():
            if all(inner.asked.check_base for inner in one.merges()):
                check_same_base(one.leaves, one.asked.base)
            leaves = Members(one.leaves, [1.0] * len(one.leaves))
            check_together(one.asked, leaves)
            one._check_rank(leaves)
        _check_apart([Path(one.asked.output) for one in self.merges() if one.asked.output is not None])

    def merged(self, progress: Progress) -> MergeResult:
        """The merge, after those inside it."""
        adapters = [m if isinstance(m, Adapter) else m._adapter(progress) for m in self.members]
        return merge(adapters, self.asked.method.name, progress=progress, **self.settings)

    def merges(self) -> "Iterator[Planned]":
        """All merges inside it, and itself."""
        for member in self.members:
            if isinstance(member, Planned):
                yield from member.merges()
        yield self

    def _check_rank(self, leaves: Members) -> None:
        """Refuse a rank that no layer can have; what merges inside leave to a layer, it can have up to its size."""
        rank = "full" if self.asked.rule else self.asked.rank
        if not any(isinstance(member, Planned) for member in self.members):
            layer_ranks(rank, self.asked.method, leaves.merging, leaves.shapes)
            return
        check_rank(rank, self.asked.method)
        most = max(min(size) for size in leaves.shapes.values())
        if isinstance(rank, int) and not 1 <= rank <= most:
            raise ValueError(f"rank must be from 1 to {most}, the size of the layers, got {rank}")

    @cached_property
    def leaves(self) -> list[Adapter]:
        """The adapters with a weight that come into it, also by way of merges inside."""
        weights = checked_weights(self.settings.get("weights"), len(self.members))
        used = [member for member, weight in zip(self.members, weights, strict=True) if weight]
        return [leaf for m in used for leaf in (m.leaves if isinstance(m, Planned) else [m])]

    def _adapter(self, progress: Progress) -> Adapter:
        """Its result, to be merged further, of the dtype that it would be stored in by default."""
        result = self.merged(progress)
        stored = widest(getattr(torch, source.dtype) for source in result.report.sources)
        return replace(result.adapter(self.called), dtype=stored)


def _check_apart(outputs: Sequence[Path]) -> None:
    """Refuse two merges that write to one folder, or one inside the other's."""
    for place, first in enumerate(outputs):
        for second in outputs[place + 1 :]:
            one, other = first.resolve(), second.resolve()
            if one == other or one in other.parents or other in one.parents:
                raise ValueError(
                    f"two merges of this recipe write to {first} and {second}: give each a folder of its own"
                )

"""A merge as it was asked for, and all that can be refused before an adapter is read."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moa.adapters import check_name
from moa.base_weights import check_place
from moa.merging.checks import check_output, checked_dtype
from moa.merging.provenance import seen_from
from moa.merging.ranks import RankRule
from moa.merging.registry import MergeMethod
from moa.merging.statistics import Given


@dataclass(frozen=True)
class Asked:
    """The parameters of `merge` but for the adapters and their weights; see there.

    Attributes:
        options: all of the method's own, with their defaults.
        rank: a number, "full", or a rule; None for the method's own.
        dtype: to store; None for the widest of the inputs.

    Raises:
        ValueError: a name, an output folder, a scale or a dtype that cannot be; statistics or an objective that
            nothing looks at, or no objective where the method needs one.
        FileNotFoundError: a base model's folder that is not there, whether or not it will be needed.
        TypeError: a seed that is no whole number.
    """

    method: MergeMethod
    options: Mapping[str, Any]
    rank: int | str | RankRule | None
    output: str | Path | None
    name: str | None
    scale: float
    restore_norm: bool
    seed: int
    dtype: torch.dtype | str | None
    check_base: bool
    base: Any
    statistics: Sequence[Given] | None
    objective: Any

    def __post_init__(self):
        if self.rank == "auto":
            object.__setattr__(self, "rank", RankRule())
        if self.name is not None:
            check_name(self.name)
        if self.output is not None:
            check_output(self.output)
        if isinstance(self.base, str | Path):
            check_place(self.base)
        if not math.isfinite(self.scale) or self.scale == 0:
            raise ValueError(f"scale must be a finite number other than 0, got {self.scale}")
        if isinstance(self.seed, bool) or not hasattr(self.seed, "__index__"):
            raise TypeError(f"seed must be a whole number, got {self.seed!r}")
        object.__setattr__(self, "seed", operator.index(self.seed))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", checked_dtype(self.dtype))
        self._check_brought("statistics", self.reads_statistics)
        self._check_brought("objective", "objective" in self.method.needs)
        if "objective" in self.method.needs and self.objective is None:
            raise ValueError(
                f"{self.method.name} looks for weights by examples and was given none: pass objective=..., or on the "
                "command line take 'moa merge' with --model and --tasks"
            )

    @property
    def rule(self) -> RankRule | None:
        """How ranks are chosen, if by a rule."""
        return self.rank if isinstance(self.rank, RankRule) else None

    @property
    def reads_statistics(self) -> bool:
        """Whether the method does, or the rule for ranks."""
        return "statistics" in self.method.needs or (self.rule is not None and self.rule.by == "loss")

    def told(self) -> dict[str, Any]:
        """What the report says was asked for."""
        return {
            "name": self.name or self.method.name,
            "method": self.method.name,
            "paper": self.method.paper,
            "scale": self.scale,
            "restore_norm": self.restore_norm,
            "rank": asdict(self.rule) if self.rule else self.rank,
            "seed": self.seed,
            "options": dict(self.options),
            "check_base": self.check_base,
            "objective": None if self.objective is None else self.objective.describe(),
            "statistics": seen_from(self.statistics, self.output),
        }

    def _check_brought(self, what: str, used: bool) -> None:
        if getattr(self, what) is not None and not used:
            raise ValueError(f"{self.method.name} looks at no {what}: leave {what} out, or choose another method")

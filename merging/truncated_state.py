"""A merge state that keeps the weighted sum alone, at a rank, and a bound on its error."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moa.adapters import Adapter, AdapterError, read_adapter
from moa.low_rank import LowRank
from moa.merging.api import MergeResult, merge
from moa.merging.checks import agreed, common_base, common_kinds
from moa.merging.kept_layers import Layers
from moa.merging.kept_members import Member
from moa.merging.layers import Progress
from moa.merging.merge_state import MergeState, retold
from moa.merging.registry import find_method
from moa.merging.shared_bases import RunningSum
from moa.peft_checks import widest

SUMS = ("svd", "weighted_sum", "concatenation")
"""Methods whose result depends on the weighted sum alone."""


class TruncatedState(MergeState):
    """The weighted sum at a rank; factors are 1 while all members have 1/N, so that N can change."""

    kind = "truncated"
    takes = ("rank",)

    def __init__(self, members: Mapping[str, Member], layers: Layers, *, rank: int | None, **own: Any):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            what = "a truncated state needs the rank to cut its sum to"
            raise ValueError(f"{what}, a whole number from 1, got {rank!r}")
        super().__init__(members, layers, rank=rank, **own)

    @property
    def error_bounds(self) -> dict[str, float]:
        """Layer name to a bound on ||true weighted sum - stored one||: the norms of all that was cut, added up."""
        return {module: self._outer * layer.error for module, layer in self.layers.items()}

    def merged(self, method: str = "svd", **options: Any) -> MergeResult:
        """The stored sum, at its rank or a smaller one; the report has the error bound of each layer.

        Raises:
            ValueError: a method or option that needs the members themselves.
        """
        if find_method(method).name not in SUMS or options.get("restore_norm"):
            what = "restore_norm" if find_method(method).name in SUMS else find_method(method).name
            raise ValueError(
                f"{what} needs the members and a truncated state keeps their weighted sum alone: "
                f"take {', '.join(SUMS)}, or create an exact state"
            )
        result = merge([self._sum()], method, weights=[self._outer], **{"check_base": self.check_base, **options})
        layers = result.report.layers.items()
        return retold(
            result,
            sources=[of.source(self.weights[name], self.layers) for name, of in self.members.items()],
            layers={module: replace(layer, facts=self._error(module) | layer.facts) for module, layer in layers},
        )

    @property
    def _outer(self) -> float:
        return 1 / len(self.members) if self.members.equal else 1.0

    def _sum(self) -> Adapter:
        members = [self.adapter(name) for name in self.members]
        return Adapter(
            name="sum",
            base_model=common_base(members),
            modules={module: layer.update() for module, layer in self.layers.items()},
            dtype=widest(member.dtype for member in members),
            config={key: agreed(member.config[key] for member in members) for key in ("revision", "task_type")},
            kinds=common_kinds(members),
        )

    def _error(self, module: str) -> dict[str, float]:
        """The bound relative to the layer's norm, for the report."""
        norm = float(self.layers[module].S.norm())
        return {"error_bound": self.layers[module].error / norm} if norm else {}

    def _check_new(self, adapter: Adapter) -> None:
        super()._check_new(adapter)
        if adapter.path is None or adapter.initial is not None:
            raise AdapterError(
                f"a truncated state reads a member's folder again to re-weight or remove it, and {adapter.name!r} "
                f"is not what stands in a folder: save it to one first, or create an exact state"
            )

    def _reader(self, member: Member) -> Callable[[str, torch.dtype], LowRank]:
        adapter = functools.cache(lambda: _reread(member))
        return lambda module, dtype: adapter().modules[module].to(dtype)

    def _moved(
        self, layers: Layers, adapter: Adapter, before: float | None, after: float | None, progress: Progress
    ) -> Layers:
        change, layers = (after or 0.0) - (before or 0.0), dict(layers)
        for module in progress(list(adapter.shapes), f"adding {adapter.name}"):
            update = adapter.modules[module]
            layers[module] = layers.get(module, RunningSum.empty(update.shape)).plus(update.scaled(change), self.rank)
        return layers

    def _scaled(self, factor: float) -> Layers:
        return {module: layer.scaled(factor) for module, layer in self.layers.items()}

    def _packed(self) -> dict[str, Tensor]:
        tensors = {}
        for module, layer in self.layers.items():
            tensors |= {f"{module}.U": layer.U, f"{module}.S": layer.S, f"{module}.V": layer.V}
            tensors[f"{module}.error"] = layer.S.new_tensor(layer.error)
        return tensors

    @classmethod
    def _unpacked(cls, members: Mapping[str, Member], tensors: Mapping[str, Tensor]) -> Layers:
        modules = {module for member in members.values() for module in member.ranks}
        parts = {m: [tensors[f"{m}.{part}"] for part in ("U", "S", "V", "error")] for m in sorted(modules)}
        return {module: RunningSum(U, S, V, float(error)) for module, (U, S, V, error) in parts.items()}


def _reread(member: Member) -> Adapter:
    adapter = read_adapter(member.path, dtype=torch.float64)
    if adapter.sha256 != member.sha256:
        raise ValueError(
            f"{member.path} has changed since it was added as {member.name!r}, and a truncated state can only take "
            f"out what it took in: put the old file back, or create the state anew"
        )
    return adapter

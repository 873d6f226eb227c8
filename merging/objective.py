"""What judges weights by examples, and how one merge sees it.

A gate is the weight of an adapter, in all layers or in one. What judges gates is an `Objective`, for instance a
model that holds the adapters and adds them with these gates; no merged matrix is ever formed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from moa.merging.layers import Layers

Kind = Literal["answers", "entropy", "distillation"]
FAILED = 1e6
"""The loss of weights under which a model answers with NaN or infinity."""


@runtime_checkable
class Objective(Protocol):
    """Judges gates by examples.

    Attributes:
        names: the adapters, in the order of the gates' last axis.
        layers: the layers that they adapt, in the order of the gates' axis before it, where gates differ by layer.
        tasks: names of the sets of examples; one that is called as an adapter is what that adapter is for.
    """

    names: Sequence[str]
    layers: Sequence[str]
    tasks: Sequence[str]

    def losses(
        self, gates: Float[Tensor, "candidates adapters"], shares: Float[Tensor, " tasks"], *, crossed: bool
    ) -> Float[Tensor, " candidates"]:
        """The answers' mean cross-entropy under each candidate, over all examples; tasks count by their shares.

        Args:
            crossed: factors are summed before they are multiplied, (sum_i g_i B_i)(sum_j g_j A_j).
        """
        ...

    def step_loss(
        self,
        gates: Float[Tensor, "*layers adapters"],
        shares: Float[Tensor, " tasks"],
        *,
        kind: Kind,
        guard: float,
        step: int,
        seed: int,
    ) -> Float[Tensor, ""]:
        """A loss over the examples of one training step, to be differentiated by the gates.

        Args:
            kind: cross-entropy of the answers; entropy of the predictions; or how far they are from those of each
                task's own adapter.
            guard: weight of the divergence from the base model's predictions, added to it.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the judgement depends on, as plain data, equal for equal objectives."""
        ...


@dataclass(frozen=True)
class Found:
    """The gates that a search has found.

    Attributes:
        gates: layer to the gate of each adapter, in the order of the merge; 0 for one that changes nothing.
        names: the adapters.
        facts: how the search went.
    """

    gates: Mapping[str, Float[Tensor, " n"]]
    names: Sequence[str]
    facts: Mapping[str, float]

    def report(self, module: str) -> dict[str, float]:
        """What the report should say of this layer."""
        gates = zip(self.names, self.gates[module].tolist(), strict=True)
        return {**{f"gate_{name}": gate for name, gate in gates}, **self.facts}


@dataclass(frozen=True)
class Judged:
    """An objective as one merge sees it: only the adapters and layers that are merged, and tasks by their weights.

    Attributes:
        searched: the adapters that have a gate to find, sorted by name, so that their order in the merge does not
            matter; those that change nothing are not there.
        shares: of each task in the loss. A task that is called as an adapter counts by the size of that adapter's
            weight, one of an adapter that is not merged does not count, any other counts as the mean of the weights.
    """

    layers: Layers
    objective: Objective
    searched: list[str]
    shares: Float[Tensor, " tasks"]

    @classmethod
    def of(cls, layers: Layers, objective: Objective) -> "Judged":
        """Check that the objective runs what is merged.

        Raises:
            ValueError: an adapter or a layer that it does not have, or no example for the adapters of this merge.
        """
        for what, ours, theirs in (
            ("adapter", layers.names, objective.names),
            ("layer", layers, objective.layers),
        ):
            if missing := [name for name in ours if name not in theirs]:
                raise ValueError(
                    f"the objective knows no {what} {missing[0]!r}, only {', '.join(sorted(theirs)[:20])}: "
                    "make it of the adapters that are merged, by the same names"
                )
        searched = sorted(_changing(layers))
        return cls(layers, objective, searched, _shares(layers, objective, searched))

    @property
    def recipe(self) -> dict[str, Any]:
        """What a search over this depends on."""
        adapters = {a.name: a.sha256 for a in self.layers.adapters if a.name in self.searched}
        return {
            "adapters": dict(sorted(adapters.items())),
            "shares": self.shares.tolist(),
            "objective": self.objective.describe(),
        }

    @cached_property
    def _columns(self) -> Float[Tensor, "n adapters"]:
        return _selection(self.searched, self.objective.names)

    @cached_property
    def _rows(self) -> Float[Tensor, "layers_here layers"]:
        return _selection(list(self.layers), self.objective.layers)

    def in_objective(self, gates: Float[Tensor, "rows n"]) -> Float[Tensor, "*layers adapters"]:
        """Gates, one row for all layers or one for each, as gates of all that the objective has; zero for the rest."""
        gates = gates @ self._columns
        return gates[0] if len(gates) == 1 else self._rows.T @ gates

    def losses(self, gates: Float[Tensor, "candidates n"], *, crossed: bool) -> Float[Tensor, " candidates"]:
        """The objective's loss of each candidate, `FAILED` where it is not finite."""
        losses = self.objective.losses(gates @ self._columns, self.shares, crossed=crossed)
        return losses.to(torch.float64).nan_to_num(nan=FAILED, posinf=FAILED, neginf=FAILED)

    def found(self, gates: Float[Tensor, "rows n"], **facts: float) -> Found:
        """The gates in the merge's own order."""
        everywhere = (gates.detach() @ _selection(self.searched, self.layers.names)).expand(len(self.layers), -1)
        return Found(dict(zip(self.layers, everywhere, strict=True)), self.layers.names, facts)


def _changing(layers: Layers) -> set[str]:
    """Names of the adapters that change anything at all."""
    changing = set()
    for _, updates in layers.streamed("reading adapters"):
        changing |= {name for name, u in zip(layers.names, updates, strict=True) if u.rank and u.norm() > 0}
    return changing


def _shares(layers: Layers, objective: Objective, searched: Sequence[str]) -> Float[Tensor, " tasks"]:
    weights = dict(zip(layers.names, layers.weights.abs().tolist(), strict=True))
    weights = {name: weights[name] for name in searched}
    other = mean(weights.values()) if weights else 0.0
    shares = [weights.get(task, 0.0 if task in objective.names else other) for task in objective.tasks]
    if weights and not any(shares):
        raise ValueError(
            f"the objective's examples are for {', '.join(objective.tasks)}, of which none is among what is merged "
            f"({', '.join(searched)}): give it examples of an adapter of this merge, or of a new task"
        )
    return torch.tensor(shares, dtype=torch.float64) / (sum(shares) or 1.0)


def _selection(rows: Sequence[str], columns: Sequence[str]) -> Float[Tensor, "rows columns"]:
    """1 where the names of row and column are equal."""
    places = {name: place for place, name in enumerate(columns)}
    selection = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    selection[range(len(rows)), [places[name] for name in rows]] = 1.0
    return selection

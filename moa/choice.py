"""Weights that are one expert a row: which it is, and the rows sorted by it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


class Groups(NamedTuple):
    """Rows sorted by their expert.

    Attributes:
        order: the rows, those of one expert side by side.
        back: where each row went in that order.
        ends: for each column, how many rows stand up to the last one of its own.
    """

    order: Int[Tensor, " rows"]
    back: Int[Tensor, " rows"]
    ends: Int[Tensor, " columns"]


@dataclass(frozen=True)
class Choice:
    """The one expert of each row, at one layer or at all; computed once a route, used by every layer.

    Attributes:
        expert: column of the row's expert.
        strength: its weight; 0 for a row that runs the base model.
        columns: how many there are.
    """

    expert: Int[Tensor, " rows"]
    strength: Float[Tensor, " rows"]
    columns: int

    def to(self, device: torch.device) -> Choice:
        """On the device of a layer, which may be another one where the model is spread over several."""
        if self.expert.device == device:
            return self
        return Choice(self.expert.to(device), self.strength.to(device), self.columns)

    @cached_property
    def groups(self) -> Groups:
        """Sorted when a product over groups first asks: on a GPU none does, and these are a dozen kernels."""
        with torch.inference_mode(False):  # a later forward may want gradients through them
            order = self.expert.argsort(stable=True)
            ends = F.one_hot(self.expert, self.columns).sum(dim=0).cumsum(dim=0).int()
            return Groups(order, order.argsort(), ends)


class Look(NamedTuple):
    """What the host has to know of weights before a layer runs.

    Attributes:
        finite: whether no weight is NaN or infinite.
        alone: whether no row mixes experts, at any layer or token.
    """

    finite: bool
    alone: bool


def look_at(weights: Float[Tensor, "rows *layers_and_tokens columns"]) -> Look:
    """All of it in one wait for a GPU."""
    weights = weights.detach()
    return Look(*torch.stack([weights.isfinite().all(), (weights.ne(0).sum(dim=-1) <= 1).all()]).tolist())


def choices(weights: Float[Tensor, "rows *layers columns"], look: Look) -> tuple[Choice, ...] | None:
    """One for all layers or one for each; None where a row mixes experts, or where gradients want every expert."""
    if not look.alone or weights.dim() > 3 or weights.requires_grad:
        return None
    layers = weights.unsqueeze(1) if weights.dim() == 2 else weights
    experts = layers.ne(0).int().argmax(dim=-1)
    strengths = layers.gather(-1, experts.unsqueeze(-1)).squeeze(-1)
    columns = weights.shape[-1]
    return tuple(Choice(*parts, columns) for parts in zip(experts.unbind(dim=1), strengths.unbind(dim=1), strict=True))

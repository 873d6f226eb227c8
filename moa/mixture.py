"""The gated low-rank layer: one operation for every way to use several adapters at once.

    y = base(x) + ((x @ A_cat.T) * gate) @ B_cat.T

`A_cat [R, d_in]` and `B_cat [d_out, R]` stack the ranks of all experts (R = sum of ranks, scaling folded into B),
`gate [batch, R]` is each expert's weight for a sequence, repeated over that expert's ranks. A one-hot row runs one
adapter, a soft row mixes outputs exactly (no cross terms between one expert's A and another's B).

The layer computes `base_layer(x)` and adds to it, so the base may be quantised. The class of each LoRA layer is
swapped once, after loading; hooks would be gone when gradient checkpointing recomputes a forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class RouteState:
    """How the layers of one model run now; shared by reference, and kept after a forward for its recompute.

    Attributes:
        experts: names of the experts, in the order of the weights' columns.
        weights: `[batch, experts]` (or one row for all); None runs PEFT's active adapter.
        off: run the base model alone. `PeftModel.disable_adapter` is no substitute: it turns gradients back on.
        pinned: the weights were set by a caller and stay; otherwise each forward routes anew.
        broadcast: one row of weights serves a batch of any size; off where the caller named one expert a sequence.
    """

    experts: tuple[str, ...]
    weights: Float[Tensor, "batch experts"] | None = None
    off: bool = False
    pinned: bool = False
    broadcast: bool = True

    @contextmanager
    def set(self, **changes: Any) -> Iterator[None]:
        """Change fields for the length of a `with` block."""
        before = {name: getattr(self, name) for name in changes}
        try:
            for name, value in changes.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def check_rows(self, sequences: int) -> None:
        """Refuse weights that were made for another number of sequences than the batch has."""
        rows = self.weights.shape[0]
        if rows != sequences and not (rows == 1 and self.broadcast):
            raise ValueError(
                f"the routing is for {rows} sequence{'s' if rows > 1 else ''}, this batch has {sequences}: "
                "route this batch, or pin one expert's name (one row of weights) a sequence"
            )


@dataclass(frozen=True)
class Stack:
    """The experts' factors at one layer, side by side."""

    A: Float[Tensor, "R n"]
    B: Float[Tensor, "o R"]
    expert_of_rank: Int[Tensor, " R"]
    built_from: tuple


class GatedLayer(nn.Module):
    """Mixed into the class of every LoRA layer of a mixture by `install`."""

    route: RouteState
    stack: Stack | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise ValueError(
                f"PEFT merged {', '.join(self.merged_adapters)} into the base weights, which the experts would add to "
                "once more: call unmerge_adapter() first"
            )
        if self.route.off or self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if self.route.weights is None:
            return super().forward(x, *args, **kwargs)
        self.route.check_rows(x.shape[0])
        result = self.base_layer(x, *args, **kwargs)
        stack = self.current_stack()
        if stack is None:  # no expert adapts this layer
            return result
        return (result + gated_low_rank(x, stack, self.route.weights)).to(result.dtype)  # rounded once, as PEFT does

    def current_stack(self) -> Stack | None:
        """The experts' stacked factors, rebuilt when an adapter was loaded, moved or trained since the last time."""
        members = [name for name in self.route.experts if name in self.lora_A]
        factors = [layer[name].weight for name in members for layer in (self.lora_A, self.lora_B)]
        if torch.is_grad_enabled() and any(factor.requires_grad for factor in factors):
            return self._build_stack(members, ())
        built_from = tuple((factor.data_ptr(), factor._version) for factor in factors)
        if self.stack is None or self.stack.built_from != built_from:
            self.stack = self._build_stack(members, built_from)
        return self.stack

    def _build_stack(self, members: list[str], built_from: tuple) -> Stack | None:
        if not members:
            return None
        device = self.lora_A[members[0]].weight.device
        owners = [self.route.experts.index(name) for name in members]
        ranks = torch.tensor([self.r[name] for name in members])
        return Stack(
            A=torch.cat([self.lora_A[name].weight for name in members]),
            B=torch.cat([self.lora_B[name].weight * self.scaling[name] for name in members], dim=1),
            expert_of_rank=torch.tensor(owners).repeat_interleave(ranks).to(device),
            built_from=built_from,
        )


def gated_low_rank(
    x: Float[Tensor, "batch *tokens n"], stack: Stack, weights: Float[Tensor, "rows experts"]
) -> Float[Tensor, "batch *tokens o"]:
    """`((x @ A.T) * gate) @ B.T`, the gate of a sequence shared by its tokens; one row of weights serves all."""
    gate = weights.to(device=x.device, dtype=stack.A.dtype)[:, stack.expert_of_rank]
    gate = gate.view(gate.shape[0], *(1,) * (x.dim() - 2), gate.shape[1])
    return F.linear(F.linear(x.to(stack.A.dtype), stack.A) * gate, stack.B)


def install(model: nn.Module, route: RouteState) -> None:
    """Turn every LoRA layer of `model` into a gated one that reads `route`.

    Raises:
        ValueError: a layer whose adapter is not a plain low-rank update of a linear layer (DoRA, embeddings, ...).
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, GatedLayer):
            continue
        _check_plain(name, module)
        kind = type(module)
        module.__class__ = type(f"Gated{kind.__name__}", (GatedLayer, kind), {"__module__": __name__})
        module.route = route
        module.stack = None


def _check_plain(name: str, module: LoraLayer) -> None:
    variants = [type(variant).__name__ for variant in module.lora_variant.values()]
    if variants:
        raise ValueError(f"module {name} holds a {variants[0]}: a mixture takes plain LoRA, retrain it without")
    if not module.lora_A or not all(isinstance(factor, nn.Linear) for factor in module.lora_A.values()):
        kind = type(module.get_base_layer()).__name__
        raise ValueError(f"module {name} is an adapted {kind}: a mixture takes adapters of linear layers only")
    if any(module.lora_bias.values()):
        raise ValueError(f"module {name} has a lora_bias: a mixture takes plain LoRA, retrain it without")

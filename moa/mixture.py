"""The gated low-rank layer: one operation for every way to use several adapters at once.

    y = base(x) + ((x @ A_cat.T) * gate) @ B_cat.T

`A_cat [R, d_in]` and `B_cat [d_out, R]` stack the ranks of all experts (R = sum of ranks, scaling folded into B),
`gate [batch, R]` is each expert's weight for a sequence, repeated over that expert's ranks. A one-hot row runs one
adapter, a soft row mixes outputs exactly (no cross terms between one expert's A and another's B). Weights may differ
from layer to layer, and they may carry gradients: that is how merges learn or search them.

The layer computes `base_layer(x)` and adds to it, so the base may be quantised. The class of each LoRA layer is
swapped once, after loading; hooks would be gone when gradient checkpointing recomputes a forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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
        experts: names of the experts, in the order of the weights' last axis.
        layers: names of the gated layers in the base model, in the order of the weights' middle axis.
        weights: `[batch, experts]` (or one row for all), or `[batch, layers, experts]` where layers differ; None runs
            PEFT's active adapter.
        off: run the base model alone. `PeftModel.disable_adapter` is no substitute: it turns gradients back on.
        pinned: the weights were set by a caller and stay; otherwise each forward routes anew.
        broadcast: one row of weights serves a batch of any size; off where the caller named one expert a sequence.
        crossed: add factors instead of outputs, see `crossed_low_rank`.
    """

    experts: tuple[str, ...]
    layers: tuple[str, ...] = ()
    weights: Float[Tensor, "batch *layers experts"] | None = None
    off: bool = False
    pinned: bool = False
    broadcast: bool = True
    crossed: bool = False

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

    def gated(
        self, weights: Float[Tensor, "batch *layers experts"], *, crossed: bool = False
    ) -> AbstractContextManager[None]:
        """Run these weights for everything inside the block: one row for all sequences, or one for each."""
        return self.set(weights=weights, off=False, pinned=True, broadcast=True, crossed=crossed)

    def weights_at(self, layer: int) -> Float[Tensor, "batch experts"]:
        """The weights of one layer, by its place in `layers`."""
        return self.weights if self.weights.dim() == 2 else self.weights[:, layer]

    def check_rows(self, sequences: int) -> None:
        """Refuse weights that were made for another number of sequences than the batch has."""
        rows = self.weights.shape[0]
        if rows != sequences and not (rows == 1 and self.broadcast):
            raise ValueError(
                f"the routing is for {rows} sequence{'s' if rows > 1 else ''}, this batch has {sequences}: "
                "route this batch, or pin one expert's name (one row of weights) a sequence"
            )
        if self.weights.dim() == 3 and self.weights.shape[1] != len(self.layers):
            raise ValueError(
                f"the weights are for {self.weights.shape[1]} layers, and experts adapt {len(self.layers)}: "
                "give one row for each of route_state.layers"
            )


@dataclass(frozen=True)
class Stack:
    """The experts' factors at one layer, side by side.

    Attributes:
        A: what they read.
        B: what they write, each expert's scaling s folded in.
        expert_of_rank: index of the expert that a rank belongs to.
        root_scale: sqrt(|s|) of that expert.
    """

    A: Float[Tensor, "R n"]
    B: Float[Tensor, "o R"]
    expert_of_rank: Int[Tensor, " R"]
    root_scale: Float[Tensor, " R"]
    built_from: tuple


class GatedLayer(nn.Module):
    """Mixed into the class of every LoRA layer of a mixture by `install`."""

    route: RouteState
    place: int
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
        low_rank = crossed_low_rank if self.route.crossed else gated_low_rank
        update = low_rank(x, stack, self.route.weights_at(self.place))
        return (result + update).to(result.dtype)  # rounded once, as PEFT does

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
        root_scales = torch.tensor([abs(self.scaling[name]) ** 0.5 for name in members])
        A = torch.cat([self.lora_A[name].weight for name in members])
        return Stack(
            A=A,
            B=torch.cat([self.lora_B[name].weight * self.scaling[name] for name in members], dim=1),
            expert_of_rank=torch.tensor(owners).repeat_interleave(ranks).to(device),
            root_scale=root_scales.repeat_interleave(ranks).to(A),
            built_from=built_from,
        )


def gated_low_rank(
    x: Float[Tensor, "batch *tokens n"], stack: Stack, weights: Float[Tensor, "rows experts"]
) -> Float[Tensor, "batch *tokens o"]:
    """`((x @ A.T) * gate) @ B.T`, the gate of a sequence shared by its tokens; one row of weights serves all."""
    gate = _gate_of_ranks(x, stack, weights)
    return F.linear(F.linear(x.to(stack.A.dtype), stack.A) * gate, stack.B)


def crossed_low_rank(
    x: Float[Tensor, "batch *tokens n"], stack: Stack, weights: Float[Tensor, "rows experts"]
) -> Float[Tensor, "batch *tokens o"]:
    """`x` through the sum of the experts' factors, `(sum_i g_i B_i) (sum_j g_j A_j)`, as LoRAHub adds them up.

    Quadratic in the weights g. Every expert reads what all of them have read together, so their ranks must be
    equal. Scalings are split evenly, sqrt(s) into either factor: B_i here holds all of s_i, hence the division.

    Raises:
        ValueError: experts of different ranks.
    """
    ranks = stack.expert_of_rank.bincount()
    ranks = ranks[ranks > 0]
    if (ranks != ranks[0]).any():
        raise ValueError(
            f"factors of ranks {', '.join(map(str, ranks.tolist()))} cannot be added: use the linear form, "
            "which takes experts of any ranks"
        )
    gate = _gate_of_ranks(x, stack, weights)
    read = F.linear(x.to(stack.A.dtype), stack.A) * (gate * stack.root_scale)
    together = read.unflatten(-1, (len(ranks), -1)).sum(dim=-2).repeat(*(1,) * (x.dim() - 1), len(ranks))
    return F.linear(together * (gate / stack.root_scale), stack.B)


def _gate_of_ranks(x: Tensor, stack: Stack, weights: Tensor) -> Float[Tensor, "rows *tokens R"]:
    gate = weights.to(device=x.device, dtype=stack.A.dtype)[:, stack.expert_of_rank]
    return gate.view(gate.shape[0], *(1,) * (x.dim() - 2), gate.shape[1])


def install(base_model: nn.Module, route: RouteState) -> None:
    """Turn every LoRA layer of `base_model` into a gated one that reads `route`, and name them all in `route.layers`.

    Raises:
        ValueError: a layer whose adapter is not a plain low-rank update of a linear layer (DoRA, embeddings, ...).
    """
    adapted = {name: module for name, module in base_model.named_modules() if isinstance(module, LoraLayer)}
    route.layers = tuple(adapted)
    for place, (name, module) in enumerate(adapted.items()):
        if not isinstance(module, GatedLayer):
            _check_plain(name, module)
            kind = type(module)
            module.__class__ = type(f"Gated{kind.__name__}", (GatedLayer, kind), {"__module__": __name__})
            module.route = route
            module.stack = None
        module.place = place  # another adapter may have come with layers before this one


def _check_plain(name: str, module: LoraLayer) -> None:
    variants = [type(variant).__name__ for variant in module.lora_variant.values()]
    if variants:
        raise ValueError(f"module {name} holds a {variants[0]}: a mixture takes plain LoRA, retrain it without")
    if not module.lora_A or not all(isinstance(factor, nn.Linear) for factor in module.lora_A.values()):
        kind = type(module.get_base_layer()).__name__
        raise ValueError(f"module {name} is an adapted {kind}: a mixture takes adapters of linear layers only")
    if any(module.lora_bias.values()):
        raise ValueError(f"module {name} has a lora_bias: a mixture takes plain LoRA, retrain it without")

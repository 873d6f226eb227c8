"""The gated low-rank layer: one operation for every way to use several adapters at once.

    y = base(x) + ((x @ A.T) * gate) @ B + weights @ bias + (weights @ stretch) * base_without_bias(x)

`A [R, n]` and `B [R, o]` stack the ranks of all experts (R = sum of ranks, scaling folded into B), `gate` is each
expert's weight, repeated over that expert's ranks. A one-hot row runs one adapter, a soft row mixes outputs exactly
(no cross terms between one expert's A and another's B). The last two terms are those of lora_bias and of DoRA, and
are left out where no expert has them. Weights may differ by row, by layer and by token, and they may carry gradients:
that is how routers are trained, and how merges learn or search them.

The layer computes `base_layer(x)` and adds to it, so the base may be quantised. The class of each LoRA layer is
swapped once, after loading; hooks would be gone when gradient checkpointing recomputes a forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, UntypedStorage, nn

from moa.blocks import blocks_of, own_low_rank
from moa.constants import constant
from moa.product import shares_memory
from moa.route_state import RouteState
from moa.stack import Stack, crossed_low_rank, gated_low_rank

__all__ = ["GatedLayer", "RouteState", "gated_layers", "install"]


class GatedLayer(nn.Module):
    """Mixed into the class of every LoRA layer of a mixture by `install`."""

    route: RouteState
    place: int
    stacks: dict[int, tuple[tuple, Stack | None, list[UntypedStorage]]]
    looked: tuple | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise ValueError(
                f"PEFT merged {', '.join(self.merged_adapters)} into the base weights, which the experts would add to "
                "once more: call unmerge_adapter() first"
            )
        if self.route.off or self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if self.route.weights is None and self.route.layer_router is None:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.base_layer._forward_hooks or shares_memory(result, x):  # a hook may have kept what is added to
            result = result.clone()
        weights = self.route.weights_at(self.place, x)
        stack = self.current_stack(weights.shape[-1])
        if stack is None:  # no expert adapts this layer
            return result
        return self._added(x, result, stack, weights).to(result.dtype)  # rounded once, as PEFT does

    def _added(self, x: Tensor, result: Tensor, stack: Stack, weights: Tensor) -> Tensor:
        x = x.to(stack.A.dtype)
        if self.training:
            x = self._dropped_out(x, weights.to(x))
        onto = result
        if stack.bias is not None:
            onto = onto + weights.to(x) @ stack.bias
        if stack.stretch is not None:
            bias = self.get_base_layer().bias
            onto = onto + (weights.to(x) @ stack.stretch) * (result if bias is None else result - bias)
        choice = None if stack.blocks is None else self.route.choice_at(self.place)
        if choice is not None and stack.blocks.pay(x, choice):
            return own_low_rank(onto, x, stack.blocks, choice)
        gate = self.route.gate_at(self.place, weights, stack)
        return (crossed_low_rank if self.route.crossed else gated_low_rank)(onto, x, stack, gate)

    def _dropped_out(self, x: Tensor, weights: Tensor) -> Tensor:
        """x after lora_dropout: each row with the chance of its expert, or the mean of theirs where it mixes several.

        The base model's own output, which DoRA rescales, is that of x as it was.
        """
        dropouts = {name: one for name, one in self.lora_dropout.items() if isinstance(one, nn.Dropout)}
        chances = tuple(dropouts[n].p if n in dropouts else 0.0 for n in self.route.names(weights.shape[-1]))
        if not any(chances):
            return x
        chance = (weights.detach() * constant(chances, weights.device, weights.dtype)).sum(dim=-1, keepdim=True)
        return x * (torch.rand_like(x) >= chance) / (1 - chance)

    def current_stack(self, columns: int) -> Stack | None:
        """The experts' stacked factors, rebuilt when one was loaded, moved, trained or scaled since the last time.

        A compiled forward cannot look: it takes what was there when the routing was pinned, and stacks adapters in
        training anew.

        Args:
            columns: of the weights; one more than experts stacks the fallback adapter's factors too.
        """
        looked = (self.route.steady, columns)
        if self.looked == looked and looked[0] is not None:
            return self.stacks[columns][1]
        members = self._members(columns)
        parts = self._parts(members.values())
        # without gradients too: FSDP2 gathers trained factors to old addresses, and keeps their version counters
        if True in [part.requires_grad for part in parts]:
            return self._build_stack(members, columns)
        return self._kept_stack(members, parts, columns)

    def keep_stack(self, columns: int) -> None:
        """Stack the experts' factors as they are now, for a compiled forward to find; none that are in training."""
        members = self._members(columns)
        parts = self._parts(members.values())
        if not any(part.requires_grad for part in parts):
            self._kept_stack(members, parts, columns)

    def _kept_stack(self, members: dict[int, str], parts: Sequence[Tensor], columns: int) -> Stack | None:
        """What was stacked of these parts, which are as they were then, or anew.

        What it was stacked of is held in memory, or an adapter that comes when one has gone could take its addresses.
        """
        if torch.compiler.is_compiling():
            return self.stacks[columns][1] if columns in self.stacks else self._build_stack(members, columns)
        scalings = [self.scaling[name] for name in members.values()]
        versions = [None if part.is_inference() else part._version for part in parts]
        built_from = members, scalings, [part.data_ptr() for part in parts], versions
        if columns not in self.stacks or self.stacks[columns][0] != built_from:
            held = [part.untyped_storage() for part in parts]
            with torch.inference_mode(False):  # a later forward may train what it meets on the way
                self.stacks[columns] = built_from, self._build_stack(members, columns), held
        self.looked = self.route.steady, columns
        return self.stacks[columns][1]

    def _members(self, columns: int) -> dict[int, str]:
        """The experts that adapt this layer, by their columns in weights of so many."""
        here = self.lora_A
        return {column: name for column, name in enumerate(self.route.names(columns)) if name in here}

    def _parts(self, names: Iterable[str]) -> list[Tensor]:
        """All tensors that these experts' updates depend on."""
        read, wrote, magnitudes = self.lora_A, self.lora_B, self.lora_magnitude_vector
        parts = []
        for name in names:
            B = wrote[name]
            parts += (read[name].weight, B.weight) if B.bias is None else (read[name].weight, B.weight, B.bias)
            if name in magnitudes:
                parts += magnitudes[name].weight, self.get_base_layer().weight
        return parts

    def _build_stack(self, members: dict[int, str], columns: int) -> Stack | None:
        if not members:
            return None
        names, read, wrote, magnitudes = list(members.values()), self.lora_A, self.lora_B, self.lora_magnitude_vector
        A = torch.cat([read[name].weight for name in names])
        ranks, scalings = tuple(self.r[name] for name in names), tuple(self.scaling[name] for name in names)
        stretches = {name: self._stretch(name) for name in names if name in magnitudes}
        scales = {name: self.scaling[name] * stretches.get(name, 1) for name in names}
        biases = {name: bias * scales[name] for name in names if (bias := wrote[name].bias) is not None}
        factors = [wrote[name].weight for name in names]
        if len(set(scalings)) == 1 and not stretches:  # one product for all
            B = (torch.cat(factors, dim=1) * scalings[0]).T
        else:
            B = torch.cat([factor.T * scales[name] for factor, name in zip(factors, names, strict=True)])
        if not B.requires_grad:  # kept, and read row by row in many forwards
            B = B.contiguous()
        return Stack(
            A=A,
            B=B,
            ranks=ranks,
            members=tuple(members),
            blocks=blocks_of(A, B, ranks, list(members), columns),
            column_of_rank=constant(tuple(members), A.device, torch.long, times=ranks),
            root_scale=constant(tuple(abs(s) ** 0.5 for s in scalings), A.device, A.dtype, times=ranks),
            bias=_of_columns(biases, members, columns),
            stretch=_of_columns({name: stretch - 1 for name, stretch in stretches.items()}, members, columns),
        )

    def _stretch(self, name: str) -> Tensor:
        """DoRA's m / ||W0 + s B A||_row `[o]`; the norm is a constant to gradients, as in section 4.3 of the paper
        (https://arxiv.org/abs/2402.09353)."""
        dora = self.lora_magnitude_vector[name]
        update = dora.get_lora_weight(self.lora_A[name], self.lora_B[name], adapter_name=name).detach()
        weight = dequantize_module_weight(self.get_base_layer()).to(update)
        return dora.weight / dora.get_weight_norm(weight, update, self.scaling[name], adapter_name=name).detach()


def gated_layers(base_model: nn.Module) -> list[GatedLayer]:
    """The gated layers of a model, in the order of `RouteState.layers`."""
    return sorted((one for one in base_model.modules() if isinstance(one, GatedLayer)), key=lambda one: one.place)


def _of_columns(vectors: dict[str, Tensor], members: dict[int, str], columns: int) -> Tensor | None:
    """One row for each column, zeros where an adapter has none; None where none has any."""
    if not vectors:
        return None
    zeros = torch.zeros_like(next(iter(vectors.values())))
    return torch.stack([vectors.get(members.get(column), zeros) for column in range(columns)])


def install(base_model: nn.Module, route: RouteState) -> tuple[GatedLayer, ...]:
    """Turn every LoRA layer of `base_model` into a gated one that reads `route`, and name them all in `route.layers`.

    Returns:
        The layers.

    Raises:
        ValueError: a layer whose adapter is neither LoRA nor DoRA of a linear layer.
    """
    adapted = {name: module for name, module in base_model.named_modules() if isinstance(module, LoraLayer)}
    route.layers = tuple(adapted)
    for place, (name, module) in enumerate(adapted.items()):
        if not isinstance(module, GatedLayer):
            _check_kind(name, module)
            module.__class__ = _gated(type(module))
            module.route = route
        module.stacks, module.looked = {}, None  # columns may be other experts' now
        module.place = place  # another adapter may have come with layers before this one
    return tuple(adapted.values())


@cache
def _gated(kind: type[LoraLayer]) -> type[GatedLayer]:
    """One class for all layers of a kind: a compiled forward asks which class a layer has."""
    return type(f"Gated{kind.__name__}", (GatedLayer, kind), {"__module__": __name__})


def _check_kind(name: str, module: LoraLayer) -> None:
    other = [
        type(variant).__name__ for adapter, variant in module.lora_variant.items() if not module.use_dora[adapter]
    ]
    if other:
        raise ValueError(f"module {name} holds a {other[0]}: a mixture takes LoRA and DoRA, retrain it without")
    if not module.lora_A or not all(isinstance(factor, nn.Linear) for factor in module.lora_A.values()):
        kind = type(module.get_base_layer()).__name__
        raise ValueError(f"module {name} is an adapted {kind}: a mixture takes adapters of linear layers only")

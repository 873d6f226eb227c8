"""Token gates: each token chooses its experts at each layer by a small trained gate there.

    w_l(x_t) = softmax over the experts that adapt layer l of  G_l norm(x_t) + b_l

norm is a layer norm without parameters: what layers read differs in size by orders of magnitude. Gates start at zero,
which mixes all experts alike, and learn from the language-model loss (`MoaTrainer`), as those of X-LoRA do (Buehler &
Buehler 2024, arXiv:2402.07148). Unlike those they read what the layer itself reads, so that a cache stays right and
no second pass is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moa.mixture import gated_layers


class TokenGates(nn.Module):
    """A `LayerRouter` that can be trained; `MoaModel.set_granularity("token", by="gates")` makes and runs it.

    An expert that leaves a layer as it is, is not among the layer's choices.

    Args:
        base_model: holds the experts.
        experts: their names, in the order of the weights.
    """

    def __init__(self, base_model: nn.Module, experts: Sequence[str]):
        super().__init__()
        gated = gated_layers(base_model)
        self.gates = nn.ModuleList(nn.Linear(layer.in_features, len(experts)) for layer in gated)
        for gate in self.gates:
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)
        adapts = torch.tensor([[name in layer.lora_A for name in experts] for layer in gated])
        self.register_buffer("adapts", adapts, persistent=False)

    def forward(self, place: int, x: Float[Tensor, "batch tokens n"]) -> Float[Tensor, "batch tokens columns"]:
        gate, adapts = self.gates[place], self.adapts[place]
        read = F.layer_norm(x.to(gate.weight.dtype), x.shape[-1:])
        return gate(read).masked_fill(~adapts, -torch.inf).softmax(dim=-1)

"""Arrow: each token chooses its experts at each layer, by what their updates read most (Ostapenko et al. 2024).

    weights = softmax(top_k |x' v_i| / temperature)

v_i is the first right singular vector of B_i A_i: the input direction that expert i answers most. Nothing is trained.
https://arxiv.org/abs/2405.11157; PEFT has it too, for experts of one rank and one set of layers.

Its `use_gks` takes the mean of general adapters out of each expert before (GenKnowSub), factor by factor:
(B - mean B) (A - mean A), which is another update for the same expert in other factors. Out of the update itself it is
a merge: `moa merge EXPERT GENERAL1 GENERAL2 --method concatenation --weights 1 -0.5 -0.5`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moa.low_rank import LowRank, svd
from moa.mixture import GatedLayer, gated_layers


class ArrowRouter:
    """A `LayerRouter` over a mixture's experts of any ranks; `model.route_state.layer_router` runs it.

    An expert that leaves a layer as it is, is not among the layer's choices.

    Args:
        base_model: holds the experts, whose prototypes v_i are taken as they are now.
        experts: their names, in the order of the weights.
        top_k: how many experts a token mixes at a layer; fewer where a layer has fewer.
        temperature: of the softmax.

    Raises:
        ValueError: `top_k` below 1, or a temperature that is not positive.
    """

    def __init__(self, base_model: nn.Module, experts: Sequence[str], *, top_k: int = 3, temperature: float = 1.0):
        if top_k < 1 or not temperature > 0:
            raise ValueError(f"Arrow needs top_k of 1 or more and a positive temperature: got {top_k}, {temperature}")
        self.top_k, self.temperature = top_k, temperature
        self.prototypes = [_prototypes(layer, experts) for layer in gated_layers(base_model)]

    def __call__(self, place: int, x: Float[Tensor, "batch tokens n"]) -> Float[Tensor, "batch tokens columns"]:
        prototypes = self.prototypes[place] = self.prototypes[place].to(x)
        likeness = (x @ prototypes.T).abs().masked_fill(~prototypes.any(dim=-1), -torch.inf)
        best = likeness.topk(min(self.top_k, likeness.shape[-1]), dim=-1)
        chosen = (best.values / self.temperature).softmax(dim=-1).nan_to_num()  # a layer that no expert adapts
        return torch.zeros_like(likeness).scatter(-1, best.indices, chosen)


@torch.no_grad()
def _prototypes(layer: GatedLayer, experts: Sequence[str]) -> Float[Tensor, "experts n"]:
    """v_i of each expert, a row of zeros for one that does nothing here."""
    rows = torch.zeros(len(experts), layer.in_features)
    for row, name in zip(rows, experts, strict=True):
        if name in layer.lora_A:
            A, B = (factors[name].weight.detach().cpu().float() for factors in (layer.lora_A, layer.lora_B))
            read = svd(LowRank(B, A)).V
            row.copy_(read[:, 0] if read.shape[1] else row)
    return rows

"""The experts' factors at one layer, side by side, and the products of a gated layer that read all of them.

gated:    onto + ((x @ A.T) * gate) @ B
crossed:  factors added up before they are multiplied, as LoRAHub does
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moa.blocks import Blocks
from moa.product import plus_product


@dataclass(frozen=True)
class Stack:
    """The experts' factors at one layer, side by side; experts that leave the layer as it is have none.

    Attributes:
        A: what they read.
        B: what they write, each expert's scaling s folded in, and DoRA's stretch.
        ranks: of each expert that is here.
        members: their columns in the weights, ascending.
        blocks: the same factors, one block an expert, where it pays that rows read their own expert's alone.
        column_of_rank: the column that a rank belongs to.
        root_scale: sqrt(|s|) of that expert.
        bias: of each column, where an expert has a lora_bias, scaling folded in.
        stretch: of each column, where an expert is DoRA, m / ||W0 + s B A||_row - 1: by how much more of the base
            layer's output it wants.
    """

    A: Float[Tensor, "R n"]
    B: Float[Tensor, "R o"]
    ranks: tuple[int, ...]
    members: tuple[int, ...]
    blocks: Blocks | None
    column_of_rank: Int[Tensor, " R"]
    root_scale: Float[Tensor, " R"]
    bias: Float[Tensor, "columns o"] | None = None
    stretch: Float[Tensor, "columns o"] | None = None

    def gate(self, weights: Float[Tensor, "rows *tokens columns"]) -> Float[Tensor, "rows *tokens R"]:
        """Each adapter's weight, repeated over its ranks, in the dtype of the factors."""
        return weights.to(self.A)[..., self.column_of_rank]


def gated_low_rank(
    onto: Float[Tensor, "batch *tokens o"],
    x: Float[Tensor, "batch *tokens n"],
    stack: Stack,
    gate: Float[Tensor, "rows *tokens_or_1 R"],
) -> Float[Tensor, "batch *tokens o"]:
    """`onto + ((x @ A.T) * gate) @ B`, the gate being each expert's weight, repeated over its ranks."""
    return plus_product(onto, F.linear(x, stack.A) * gate, stack.B)


def crossed_low_rank(
    onto: Float[Tensor, "batch *tokens o"],
    x: Float[Tensor, "batch *tokens n"],
    stack: Stack,
    gate: Float[Tensor, "rows *tokens_or_1 R"],
) -> Float[Tensor, "batch *tokens o"]:
    """`x` through the sum of the experts' factors, `(sum_i g_i B_i) (sum_j g_j A_j)`, as LoRAHub adds them up.

    Quadratic in the weights g. Every expert reads what all of them have read together, so their ranks must be
    equal. Scalings are split evenly, sqrt(s) into either factor: B_i here holds all of s_i, hence the division.

    Raises:
        ValueError: experts of different ranks.
    """
    if len(set(stack.ranks)) > 1:
        raise ValueError(
            f"factors of ranks {', '.join(map(str, stack.ranks))} cannot be added: use the linear form, "
            "which takes experts of any ranks"
        )
    read = F.linear(x, stack.A) * (gate * stack.root_scale)
    experts = len(stack.ranks)
    together = read.unflatten(-1, (experts, -1)).sum(dim=-2).repeat(*(1,) * (x.dim() - 1), experts)
    return plus_product(onto, together * (gate / stack.root_scale), stack.B)

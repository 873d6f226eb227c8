"""Hard routing over many experts: each row reads its own expert's factors only, instead of all of them.

The rows of one expert are a group; how many there are of each changes with every route, the shapes do not. Prompts
gather the factors of each row and multiply batch by batch; single tokens, for which that copy would cost more than
the product, are sorted by expert and go through one grouped product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moa.choice import Choice
from moa.constants import constant
from moa.product import plus_product

GROUPED_FROM = 72
"""Total rank of the experts from which rows read their own factors only.

In a whole model (two threads, 7 x 8 = 56) a prefill is no slower through all of them: 1.00 of one adapter's time, and
1.03 through own ones. One layer alone, on a CPU (torch 2.13, one thread, fp32, 16 rows, 896 -> 896), as shares of the
base layer's time, all : own

    experts x rank = total   64 tokens a row   1 token a row
       2 x  8 =  16          0.05 : 0.05       0.05 : 0.14
       7 x  8 =  56          0.14 : 0.05       0.17 : 0.18
       7 x 16 = 112          0.27 : 0.07       0.26 : 0.23
      30 x  8 = 240          0.56 : 0.06       0.58 : 0.35
     100 x  8 = 800          1.84 : 0.06       1.80 : 0.72
"""
TIMES_FOR_TOKENS = 2
"""How many times that total single tokens want. In a whole model (two threads, 16 rows) a decode step took, all : own,
1.00 : 1.08 for 7 x 8, 1.06 : 1.14 for 7 x 16 on all linear layers, 1.11 : 1.07 for 30 x 8."""
ALIGNED = 8  # elements: the grouped product wants strides of 16 bytes, in bf16 too


@dataclass(frozen=True)
class Blocks:
    """Each expert's factors at one layer, filled up with zeros to one rank r.

    Attributes:
        A: what they read.
        B: what they write.
        of_column: the block that rows of a column read: the next one there is, where their expert is not here.
        here: 1 for each column whose expert is here, else 0; None where all are.
        last_column: the last column whose rows read a block.
        for_tokens: whether they pay for single tokens, too.
    """

    A: Float[Tensor, "members r n"]
    B: Float[Tensor, "members r o"]
    of_column: Int[Tensor, " columns"]
    here: Float[Tensor, " columns"] | None
    last_column: Int[Tensor, " members"]
    for_tokens: bool

    def pay(self, x: Float[Tensor, "batch *tokens n"], choice: Choice) -> bool:
        """Whether rows of so many tokens are faster through their own expert's factors than through all."""
        return self.for_tokens or not self.few(x.numel() // (x.shape[-1] * len(choice.strength)))

    def few(self, tokens: int) -> bool:
        """Whether a row has so few tokens that copies of factors would cost more than the products."""
        return tokens < self.A.shape[1]

    @property
    def can_group(self) -> bool:
        """Whether torch's grouped product takes these factors; on other devices it has rules of its own."""
        aligned = self.A.shape[-1] % ALIGNED == self.B.shape[-1] % ALIGNED == 0
        return aligned and self.A.device.type == "cpu" and self.A.dtype != torch.float64


def blocks_of(
    A: Float[Tensor, "R n"], B: Float[Tensor, "R o"], ranks: Sequence[int], members: Sequence[int], columns: int
) -> Blocks | None:
    """Views of stacked factors, or copies where ranks differ.

    None where reading all factors is as cheap: few ranks, or ranks so unequal that blocks would be mostly zeros.
    """
    r = -(-max(ranks) // ALIGNED) * ALIGNED
    if sum(ranks) < GROUPED_FROM or r * len(ranks) > 2 * sum(ranks):
        return None

    def constants(values: Iterable[int], dtype: torch.dtype = torch.long) -> Tensor:
        return constant(tuple(values), A.device, dtype)

    return Blocks(
        A=_filled(A, ranks, r),
        B=_filled(B, ranks, r),
        of_column=constants(min(sum(m < c for m in members), len(members) - 1) for c in range(columns)),
        here=None if len(members) == columns else constants((c in members for c in range(columns)), A.dtype),
        last_column=constants([*members[:-1], columns - 1]),
        for_tokens=sum(ranks) >= TIMES_FOR_TOKENS * GROUPED_FROM,
    )


def _filled(factor: Float[Tensor, "R size"], ranks: Sequence[int], r: int) -> Float[Tensor, "members r size"]:
    if set(ranks) == {r}:
        return factor.unflatten(0, (len(ranks), r))
    return torch.stack([F.pad(part, (0, 0, 0, r - len(part))) for part in factor.split(list(ranks))])


def own_low_rank(
    onto: Float[Tensor, "batch *tokens o"], x: Float[Tensor, "batch *tokens n"], blocks: Blocks, choice: Choice
) -> Float[Tensor, "batch *tokens o"]:
    """`onto + strength * x @ A_e.T @ B_e`, with the expert e of each row; one row of weights serves a whole batch."""
    choice = choice.to(x.device)
    own, strength = choice.expert, choice.strength.to(x.dtype)
    if blocks.here is not None:
        own, strength = blocks.of_column[own], strength * blocks.here[own]
    rows = x.reshape(len(strength), -1, x.shape[-1])
    # the grouped product cannot be compiled but in bf16
    if blocks.few(rows.shape[1]) and blocks.can_group and not torch.compiler.is_compiling():
        return onto + (_grouped(rows, blocks, choice) * strength[:, None, None]).view(onto.shape)
    read = rows @ blocks.A[own].mT * strength[:, None, None]
    return plus_product(onto.reshape(*read.shape[:2], -1), read, blocks.B[own]).view(onto.shape)


def _grouped(rows: Float[Tensor, "rows tokens n"], blocks: Blocks, choice: Choice) -> Float[Tensor, "rows tokens o"]:
    """Each row through its expert's factors, the rows of one expert at a time."""
    tokens, groups = rows.shape[1], choice.groups
    ends = groups.ends[blocks.last_column] * tokens
    ordered = rows[groups.order].flatten(0, 1)
    read = F.grouped_mm(ordered, blocks.A.mT, offs=ends)
    written = F.grouped_mm(read, blocks.B, offs=ends).unflatten(0, (-1, tokens))
    return written[groups.back]

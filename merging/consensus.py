"""Element-wise merges that ask what the others do: PCB weighs each entry by how far it competes, Consensus
keeps the entries that several adapters use."""

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import LowRank
from moa.merging.elementwise import ACTS_ON_ENTRIES
from moa.merging.entrywise import check_density
from moa.merging.registry import Merged, merge_method
from moa.merging.streaming import DenseRows, recompressed
from moa.merging.thresholds import LAYER_SAMPLE, Search, See, sampled_places, settle


def check_threshold(threshold: float) -> None:
    """Refuse a ratio of sizes that is none."""
    if not threshold >= 0:
        raise ValueError(f"threshold is a ratio of sizes and must be 0 or more, got {threshold}")


@merge_method(
    "consensus",
    paper="https://arxiv.org/abs/2405.07813",
    breaks={
        "identity": "an entry that one adapter alone uses is removed (none at k=1)",
        "duplicates": "a copy is one more adapter that uses an entry",
    }
    | ACTS_ON_ENTRIES,
    aliases=["consensus_ta"],
    check=check_threshold,
    computes_in="float32",
)
def consensus(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
    threshold: float = 0.4,
    k: int = 2,
) -> Merged:
    """The weighted sum, without the entries that fewer than k adapters use.

    With D_i = w_i delta_i and M = sum_i D_i, adapter i uses an entry where |D_i| >= threshold |M - D_i|, other
    than zero: where it is a fair share of the sum. The result is brought to a rank, by default the number of
    directions that the updates span together. The report says which share of the entries is kept.

    Args:
        threshold: lambda of the paper: with a smaller one an adapter uses more entries.
        k: how many adapters must use an entry for it to be kept.

    Raises:
        ValueError: a k that no entry can reach.
    """
    if not 1 <= k <= len(updates):
        raise ValueError(
            f"consensus keeps what at least k adapters use: k must be from 1 to their number, {len(updates)}, got {k}"
        )
    dense = DenseRows(updates, weights)
    matrix, kept = torch.zeros(dense.shape), 0
    for block in dense.blocks(together=len(dense.factors)) if dense.factors else ():
        D = dense.all_rows(block)
        M = D.sum(dim=0)
        users = ((D.abs() >= threshold * (M - D).abs()) & (D != 0)).sum(dim=0)
        kept += int((users >= k).sum())
        matrix[block] = M * (users >= k)
    return recompressed(matrix, updates, rank, seed, {"entries_kept": kept / matrix.numel()})


@merge_method(
    "pcb",
    paper="https://arxiv.org/abs/2410.02396",
    degree=0,
    breaks={
        "identity": "it trims: one adapter comes back without the entries of small score",
        "duplicates": "a copy is one more competitor",
    }
    | ACTS_ON_ENTRIES,
    aliases=["pcb_merging"],
    check=check_density,
    computes_in="float32",
)
def pcb(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
    density: float = 0.2,
) -> Merged:
    """Competition balancing: a mean of the updates, each entry weighted by a score of its own.

    With D_i = v_i delta_i, the weights v brought to a mean size of 1, and N adapters: score
    s_i = exp(N norm(|D_i|)^2) tanh(D_i sum_j D_j), where norm takes the smallest entry of a matrix to 0 and
    the largest to 1. The density share of largest scores of each matrix counts, taken from 0 at the smallest
    of them to 1 at the largest, and M = sum_i s_i D_i / sum_i |v_i| s_i. Scores are compared within a layer.
    The result is brought to a rank, by default the number of directions that the updates span together.

    Args:
        density: share of each update's entries to keep, largest score first, in (0, 1].
    """
    dense = DenseRows(updates, weights)
    if not dense.factors:
        return recompressed(torch.zeros(dense.shape), updates, 1, seed)
    sizes = weights[list(dense)].abs().to(torch.float32)
    scores = Scores(dense, float(sizes.mean()))
    least, most = scores.limits(density)
    matrix = torch.zeros(dense.shape)
    for block in scores.blocks():
        D, s = scores.of(dense.all_rows(block))
        shares = torch.where(most > least, (s - least) / (most - least), 1.0).clamp_(0, 1) * (s >= least)
        divisor = (sizes[:, None, None] / scores.size * shares).sum(dim=0)
        matrix[block] = (D * shares).sum(dim=0) / divisor.clamp_(min=torch.finfo().tiny)
    return recompressed(matrix, updates, rank, seed)


class Scores:
    """Scores of one layer's entries: exp(N norm(|D_i|)^2) tanh(D_i sum_j D_j), divided by exp(N).

    Args:
        dense: the updates with their weights in.
        size: mean size of the weights, by which D is divided.
    """

    def __init__(self, dense: DenseRows, size: float):
        self.dense, self.size = dense, size
        self.smallest = torch.full((len(dense.factors), 1, 1), torch.inf)
        self.largest = torch.zeros(len(dense.factors), 1, 1)
        for block in self.blocks():
            sizes = dense.all_rows(block).div_(size).abs_()
            self.smallest = torch.minimum(self.smallest, sizes.amin(dim=(1, 2), keepdim=True))
            self.largest = torch.maximum(self.largest, sizes.amax(dim=(1, 2), keepdim=True))

    def blocks(self) -> Iterator[slice]:
        """Slices of rows."""
        return self.dense.blocks(together=len(self.dense.factors))

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """D and its scores, both [N, b, n], from weighted rows."""
        D = rows / self.size
        spread = self.largest - self.smallest
        norm = torch.where(spread > 0, (D.abs() - self.smallest) / spread, 1.0)
        return D, torch.exp(len(D) * (norm.square() - 1)) * torch.tanh(D * D.sum(dim=0))

    def limits(self, density: float) -> tuple[Tensor, Tensor]:
        """[N, 1, 1] each: the floor(density * entries)-th largest score, and the largest."""
        total = math.prod(self.dense.shape)
        places = sampled_places(self.dense.shape, total, LAYER_SAMPLE)
        _, drawn = self.of(torch.stack([self.dense.entries(i, *places)[None] for i in self.dense]))
        searches = [
            [Search(i, count, total, drawn[i].numpy().ravel()) for i in range(len(drawn))]
            for count in (int(density * total), 1)
        ]
        settle([search for of in searches for search in of], self._show)
        least, most = (torch.tensor([search.size for search in of])[:, None, None] for of in searches)
        return least, most

    def _show(self, see: See) -> None:
        for block in self.blocks():
            _, scores = self.of(self.dense.all_rows(block))
            for i, values in enumerate(scores):
                see("", i, values.numpy().ravel())

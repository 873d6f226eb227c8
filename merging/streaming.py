"""Dense matrices of one layer, a few rows at a time: rows of the updates, votes over them, and back to a rank.

What acts on entries needs the updates as matrices, which together are far larger than the adapters. They are
formed from the factors in blocks of rows that fit a core's cache, in float32, anew in each pass; only the merged
matrix of one layer is held. Equal calls give equal bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from moa.low_rank import NUMERICAL_RANK_TOLERANCE, LowRank, core, span, stack
from moa.merging.entrywise import Ballot
from moa.merging.registry import Merged

BLOCK_ENTRIES = 2**18
"""Entries of one update that are dense at one time: 1 MB, what a core's own cache holds."""
EXTRA_DIRECTIONS = 10
"""Of the range finder, at least. With these, 14 merges of [1536, 1536] by TIES, DARE and DELLA (random, decaying and
shared updates, outliers, unequal ranks and weights, zeros, duplicates) missed of the best energy, in the median and at
most: 3e-6 and 1e-2 at the rank that the updates span, 1e-3 and 7e-2 at ranks below it, 6e-3 and 6e-2 above. Two power
passes from random directions, with half as many products again, missed 2e-4 and 1e-1, 2e-3 and 1e-1, 5e-3 and 9e-2;
one pass from the updates' own directions, with as many, 2e-5 and 2e-2, 3e-3 and 9e-2, 1e-2 and 9e-2."""

Thinning = Callable[[Tensor], Tensor]
"""Takes the rows of one update, block by block from the first, and gives them back with entries gone."""


class DenseRows:
    """The weighted updates w_i B_i A_i of one layer as float32 matrices, formed a block of rows at a time.

    Attributes:
        shape: [o, n] of the layer.
        factors: position of each adapter that changes the layer, to its factors with the weight in.
    """

    def __init__(self, updates: Sequence[LowRank], weights: Tensor):
        self.shape = updates[0].shape
        self.factors = {
            i: update.scaled(w).to(torch.float32)
            for i, (update, w) in enumerate(zip(updates, weights.tolist(), strict=True))
            if update.changes_something()
        }

    def __iter__(self) -> Iterator[int]:
        return iter(self.factors)

    def blocks(self, together: int = 1) -> Iterator[slice]:
        """Slices of rows, top to bottom, so small that `together` matrices of them fit the cache."""
        o, n = self.shape
        step = max(1, BLOCK_ENTRIES // (n * max(1, together)))
        return (slice(start, min(start + step, o)) for start in range(0, o, step))

    def rows(self, adapter: int, block: slice) -> Tensor:
        """[b, n] rows of one update."""
        return self.factors[adapter].B[block] @ self.factors[adapter].A

    def all_rows(self, block: slice) -> Tensor:
        """[N, b, n] the same rows of all updates."""
        return torch.stack([self.rows(i, block) for i in self])

    def entries(self, adapter: int, rows: Tensor, columns: Tensor) -> Tensor:
        """[m] the entries of one update at m places."""
        B, A = self.factors[adapter].B.T.contiguous(), self.factors[adapter].A
        return (B.index_select(1, rows) * A.index_select(1, columns)).sum(dim=0)


def added(dense: DenseRows, thin: Mapping[int, Thinning]) -> Tensor:
    """[o, n] the sum of the thinned updates."""
    matrix = torch.zeros(dense.shape)
    for block in dense.blocks():
        for i in dense:
            matrix[block] += thin[i](dense.rows(i, block))
    return matrix


def elected(
    dense: DenseRows,
    thin: Mapping[int, Thinning],
    weights: Tensor,
    election: Literal["total", "frequency"],
    normalise: Literal["mean", "sum"] = "sum",
) -> tuple[Tensor, float]:
    """[o, n] the entries of the thinned updates that agree with the elected sign, added up or averaged.

    Also gives the share of the votes, by their sizes, that lost the election.
    """
    matrix = torch.empty(dense.shape)
    won = cast = 0.0
    counts_voters = election == "frequency" or normalise == "mean"
    for block in dense.blocks():
        values = Ballot(matrix[block])
        voters = Ballot(matrix[block]) if counts_voters else values
        for i in dense:
            votes = thin[i](dense.rows(i, block))
            values.add(votes)
            if counts_voters:
                voters.add(votes.sign_(), abs(float(weights[i])))
        sign = (values if election == "total" else voters).sign()
        merged = values.agreeing(sign)
        won, cast = won + float(merged.abs().sum()), cast + float(values.sizes().sum())
        if normalise == "mean":
            merged /= voters.agreeing(sign).abs_().clamp_(min=torch.finfo().tiny)
        matrix[block] = merged
    return matrix, 1 - won / cast if cast else 0.0


def spanned_rank(updates: Sequence[LowRank]) -> int:
    """How many directions the updates span together: the sum of their ranks, less what they share."""
    if not any(update.rank for update in updates):
        return 1
    cores = core(updates).cores
    left, right = torch.cat(list(cores), dim=1), torch.cat(list(cores), dim=0)
    ranks = [torch.linalg.matrix_rank(side, rtol=NUMERICAL_RANK_TOLERANCE) for side in (left, right)]
    return max(1, int(min(ranks)))


def recompressed(
    matrix: Tensor,
    updates: Sequence[LowRank],
    rank: int | None,
    seed: int,
    facts: Mapping[str, float] | None = None,
) -> Merged:
    """The dense matrix [o, n] that was made of these updates at a rank, and the energy that this drops.

    Without a rank, that of the directions which the updates span together. At the full rank min(o, n) it is kept as
    it is, one factor a multiple of the identity. Below, the best approximation: exact for small layers, for larger
    ones as `approximated` finds it, repeatable by its seed.
    """
    rank = rank or spanned_rank(updates)
    if rank >= min(matrix.shape):
        return Merged(_as_factors(matrix.double()), facts=facts or {})
    if min(matrix.shape) <= 2 * (rank + EXTRA_DIRECTIONS):
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        update = LowRank(U[:, :rank] * S[:rank], Vh[:rank])
    else:
        count = -(-(rank + EXTRA_DIRECTIONS) // 8) * 8  # products are faster by eights
        update = approximated(matrix, beginning(updates, count, seed), rank)
    update, _ = update.truncated(rank)  # without directions of singular value zero, signs made canonical
    energy = sum(float(torch.linalg.vector_norm(rows, dtype=torch.float64)) ** 2 for rows in matrix.split(32))
    return Merged(update, dropped=max(energy - update.norm() ** 2, 0.0), facts=facts or {})


def approximated(matrix: Tensor, start: Tensor, rank: int) -> LowRank:
    """Nearly the best approximation of a matrix M [o, n] at a rank, float64, from more directions V [n, q].

    With Q = orth(M V) and Y = what orth(M M^T Q) has beside Q, the strongest directions of [Q Y] [Q Y]^T M: a block
    Krylov space of two blocks (Musco and Musco, 2015, https://arxiv.org/abs/1504.05477). A power pass takes as many
    products with M, four, and throws the first block away.
    """
    first = torch.linalg.qr(matrix @ start).Q
    read = matrix.T @ first
    second = torch.linalg.qr(torch.cat([first, matrix @ torch.linalg.qr(read).Q], dim=1)).Q[:, first.shape[1] :]
    written = torch.cat([first, second], dim=1).double()
    read = torch.cat([read, matrix.T @ second], dim=1).double()
    strongest = torch.linalg.eigh(read.T @ read).eigenvectors[:, -rank:]
    return LowRank(written @ strongest, (read @ strongest).T)


def beginning(updates: Sequence[LowRank], count: int, seed: int) -> Tensor:
    """[n, count] directions in which to begin looking for the range of what was made of these updates, float32.

    All that the updates D_i read, and random ones up to the number. Where they read more, sum_i D_i^T D_i times random
    directions: combinations in which those that the updates stretch most are strongest. Neither the order of the
    updates nor their factors matter.
    """
    nothing = LowRank.zero(updates[0].shape)
    changing = [D.to(torch.float64) for D in (nothing, *updates) if D is nothing or D.changes_something()]
    read = span(stack(changing).A.T).matrix()
    drawn = torch.randn(len(read), count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if read.shape[1] > count:
        drawn = sum(D.A.T @ ((D.B.T @ D.B) @ (D.A @ drawn)) for D in changing)
        return (drawn / drawn.norm(dim=0)).float()
    return torch.cat([read, drawn[:, read.shape[1] :]], dim=1).float()


def _as_factors(matrix: Tensor) -> LowRank:
    """c I and M / c, in the order that fits; c is a power of two, so nothing is rounded, and evens out the sizes.

    Raises:
        OverflowError: entries that are infinite, or differences of such.
    """
    o, n = matrix.shape
    largest = float(matrix.abs().max())
    if not math.isfinite(largest):
        raise OverflowError("entries leave the range of float32")
    c = 2.0 ** round(math.log2(largest) / 2) if largest else 1.0
    identity = c * torch.eye(min(o, n), dtype=matrix.dtype)
    return LowRank(identity, matrix / c) if o <= n else LowRank(matrix / c, identity)

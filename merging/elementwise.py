"""Element-wise merges: trim every update, elect a sign for each entry, average what agrees with it.

These rules act on entries of the dense updates, so their result has no small rank. The dense matrices are
never there all at once: rows of all updates are formed a few at a time, and only the merged matrix of one
layer is held, until it is brought back to a rank. Entries are float32, computed anew from the factors in each
pass over them; equal calls give equal bits.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import NUMERICAL_RANK_TOLERANCE, LowRank, core
from moa.merging.entrywise import agreeing_sum, check_density, elected_sign
from moa.merging.registry import Merged, merge_method

BLOCK_ENTRIES = 4_000_000
"""Entries of all updates together that are dense at one time: 16 MB a copy."""


@merge_method(
    "ties",
    paper="https://arxiv.org/abs/2306.01708",
    degree=0,
    breaks={
        "identity": "it trims: one adapter comes back without its small entries (all of it at density=1)",
        "rotation": "it acts on entries, which a rotation mixes",
        "span": "it acts on entries, which leaves the span of the adapters",
    },
)
def ties(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    seed: int = 0,
    density: float = 0.2,
    election: Literal["total", "frequency"] = "total",
    normalise: Literal["mean", "sum"] = "mean",
) -> Merged:
    """Trims each update to its largest entries, elects a sign per entry, and merges what agrees with it.

    With D_i the trimmed updates: sign = sgn(sum_i w_i D_i), and M = sum w_i D_i / sum |w_i|, both over the
    adapters with sgn(w_i D_i) = sign. Where the election is a draw, M = 0. It works on the updates, not on A
    and B, so re-factored adapters merge to the same, and weights count in the election. The result is brought
    to a rank, by default the number of directions that the updates span together.

    Args:
        density: share of each update's entries to keep, largest first, in (0, 1].
        election: weigh each vote by the entry's size (total, as published) or not (frequency).
        normalise: divide by the weights that agree (mean; only ratios of weights matter), or add up (sum).

    Raises:
        ValueError: a density outside (0, 1].
    """
    present = [(update, w) for update, w in zip(updates, weights.tolist(), strict=True) if update.rank > 0]
    updates, w = [update for update, _ in present], torch.tensor([w for _, w in present])[:, None, None]
    merged = torch.empty(updates[0].shape)
    for rows, deltas in trimmed_rows(updates, density):
        votes = w * deltas
        sign = elected_sign(votes if election == "total" else w * deltas.sign())
        merged[rows] = agreeing_sum(votes, sign)
        if normalise == "mean":
            merged[rows] /= agreeing_sum(w.abs() * votes.sign(), sign).abs().clamp(min=torch.finfo().tiny)
    return recompressed(merged, rank or spanned_rank(updates), seed)


def trimmed_rows(updates: Sequence[LowRank], density: float) -> Iterator[tuple[slice, Float[Tensor, "n b i"]]]:
    """Rows of the dense updates, each update cut to its floor(density * o * i) largest entries.

    Exact over the whole layer: entries that tie at the threshold are kept in the order of rows and columns.
    """
    check_density(density)
    trims = [Trim.of(update, density, _rows_at_once(updates)) for update in updates]
    ties_left = [trim.ties for trim in trims]
    for rows, deltas in dense_rows(updates, _rows_at_once(updates)):
        for i, trim in enumerate(trims):
            tied = deltas[i].abs() == trim.threshold
            if (count := int(tied.sum())) > ties_left[i]:
                tied &= tied.flatten().cumsum(0).view_as(tied) <= ties_left[i]
            ties_left[i] -= min(count, ties_left[i])
            deltas[i].mul_((deltas[i].abs() > trim.threshold) | tied)
        yield rows, deltas


class Trim(NamedTuple):
    """Which entries of an update to keep: those above the threshold, and the first `ties` equal to it."""

    threshold: float
    ties: int

    @classmethod
    def of(cls, update: LowRank, density: float, rows_at_once: int) -> "Trim":
        sizes = torch.cat([deltas[0].abs() for _, deltas in dense_rows([update], rows_at_once)]).flatten()
        kept = int(density * sizes.numel())
        if kept == 0:
            return cls(float("inf"), 0)
        entries = sizes.numpy()  # numpy selects in place, three times faster than torch.kthvalue
        entries.partition(len(entries) - kept)
        threshold = float(entries[-kept])
        return cls(threshold, kept - int((entries > threshold).sum()))


def dense_rows(updates: Sequence[LowRank], rows_at_once: int) -> Iterator[tuple[slice, Float[Tensor, "n b i"]]]:
    """All updates as dense float32 matrices, a few rows at a time."""
    for start in range(0, updates[0].shape[0], rows_at_once):
        rows = slice(start, start + rows_at_once)
        yield rows, torch.stack([(update.B[rows] @ update.A).to(torch.float32) for update in updates])


def spanned_rank(updates: Sequence[LowRank]) -> int:
    """How many directions the updates span together: the sum of their ranks, less what they share."""
    cores = core(updates).cores
    left, right = torch.cat(list(cores), dim=1), torch.cat(list(cores), dim=0)
    ranks = [torch.linalg.matrix_rank(side, rtol=NUMERICAL_RANK_TOLERANCE) for side in (left, right)]
    return max(1, int(min(ranks)))


def _rows_at_once(updates: Sequence[LowRank]) -> int:
    return max(1, BLOCK_ENTRIES // (len(updates) * updates[0].shape[1]))


def recompressed(matrix: Float[Tensor, "o i"], rank: int, seed: int) -> Merged:
    """The dense matrix at a rank, and the energy that this drops.

    Exact for small layers; larger ones through a randomised range finder (Halko et al., 2011, 10 extra
    directions, 4 power passes), repeatable by its seed.
    """
    if min(matrix.shape) <= 4 * (rank + 10):
        U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        V = Vh.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(matrix, q=rank + 10, niter=4)
    root = S[:rank].sqrt()
    update = LowRank(U[:, :rank] * root, (V[:, :rank] * root).T).to(torch.float64)
    update, _ = update.truncated(rank)  # without directions of singular value zero, signs made canonical
    energy = float(matrix.double().square().sum())
    return Merged(update, dropped=max(energy - update.norm() ** 2, 0.0))

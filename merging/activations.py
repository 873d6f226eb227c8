"""Merges that know each adapter's data: what its inputs look like (RegMean), which outputs matter to it (Fisher).

Both take `LayerStatistics` (`moa statistics` collects them) and stay in factors: no matrix of the layer's own
size is formed, and RegMean needs two of its inputs' size, n x n.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moa.low_rank import LowRank, inner, stack, svd
from moa.merging.registry import Merged, merge_method
from moa.merging.statistics import LayerStatistics

BLOCK_ENTRIES = 4_000_000
"""Entries of a Gram that are float64 at one time: 32 MB."""
IDLE = "on its own inputs it wants the layer unchanged, and that counts"
READS = {"regmean": ("gram",), "fisher": ("fisher",)}
"""Method to what of `LayerStatistics` it reads, which is all that a kept merge has to keep."""


def check_shares(off_diagonal: float, ridge: float) -> None:
    """Refuse shares of a Gram that are none."""
    if not 0 <= off_diagonal <= 1:
        raise ValueError(f"off_diagonal is a factor in [0, 1], got {off_diagonal}")
    if not ridge >= 0:
        raise ValueError(f"ridge is a share to add and must be at least 0, got {ridge}")


def check_eps(eps: float) -> None:
    """Refuse a share that would leave rows without any."""
    if not eps > 0:
        raise ValueError(f"eps must be above 0, or rows that nothing depends on are 0 / 0, got {eps}")


@merge_method(
    "regmean",
    paper="https://arxiv.org/abs/2212.09849",
    degree=0,
    breaks={
        "zero_adapter": IDLE,
        "rotation": "it shrinks what is off the diagonal, which a rotation mixes (nothing at off_diagonal=1)",
        "span": "the inverse of the summed Grams leaves the directions that the adapters read",
    },
    check=check_shares,
)
def regmean(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    statistics: Sequence[LayerStatistics | None],
    module: str = "",
    rank: int | None = None,
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
) -> Merged:
    """The one update that does, on each adapter's own inputs, most nearly what that adapter does.

    M = (sum_i w_i delta_i G_i) S^-1 with S = sum_i |w_i| G_i, where G_i = mean x x^T over the inputs of adapter
    i, minimises sum_i |w_i| ||(M - sign(w_i) delta_i) x||^2. In factors, B = [B_1 .. B_N] and A = [A_i G_i S^-1],
    one Cholesky of S [n, n] a layer. With equal Grams it is the weighted mean. Given a rank, M is the best update
    of that rank in the same loss, not the truncated solution. An adapter without statistics here, because it
    lacks the layer, is left out.

    The report says, as shares of sum_i |w_i| ||delta_i x||^2: `compromise_loss`, what no single update of any
    rank can do for all, and `predicted_loss`, what the dropped ranks add to it.

    Args:
        off_diagonal: factor on each Gram's entries off the diagonal, in [0, 1]: the paper's alpha. Below 1 it
            guards against Grams of few tokens; the diagonal alone, 0, weighs each input feature by its size.
        ridge: share of the Grams' mean diagonal that is added to each, so that S can be inverted.

    Raises:
        ValueError: options out of range, or statistics that are no Gram matrices of this layer.
    """
    solved = solve_regmean(updates, weights, statistics, module=module, off_diagonal=off_diagonal, ridge=ridge)
    full = solved.at_full_rank()
    facts = solved.facts(left_out=sum(one is None for one in statistics))
    if rank is None or rank >= full.rank:
        return Merged(*full.truncated(), facts)
    update, excess = solved.at_rank(rank)
    dropped = stack([full, update.scaled(-1.0)]).norm() ** 2
    return Merged(update, dropped, {**facts, "predicted_loss": excess / solved.asked if solved.asked else 0.0})


class Solved(NamedTuple):
    """RegMean's solution M in the metric of its own loss.

    For any update X, sum_i |w_i| ||(X - sign(w_i) delta_i) x||^2 = ||(X - M) C||^2 + what no update can avoid. So the
    best X of a rank truncates M C, and each dropped singular value adds its square to the loss, exactly.

    Attributes:
        whitened: M C.
        C: [n, n] lower triangular, C C^T = S.
        asked: sum_i |w_i| ||delta_i x||^2, the loss of doing nothing.
    """

    whitened: LowRank
    C: Float[Tensor, "n n"]
    asked: float

    def at_full_rank(self) -> LowRank:
        """M itself, at the sum of the ranks."""
        return self._read_back(self.whitened)

    def at_rank(self, rank: int) -> tuple[LowRank, float]:
        """The update of this rank with the least loss, and how much more that is than M's."""
        kept, excess = self.whitened.truncated(rank)
        return self._read_back(kept), excess

    def predicted_losses(self) -> Float[Tensor, " ranks"]:
        """Loss added by keeping k = 0, 1, .. ranks of M, as shares of `asked`."""
        energy = svd(self.whitened).S.square()
        return torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)]) / (self.asked or 1.0)

    def facts(self, left_out: int) -> dict[str, float]:
        """What the report says of the solution at full rank."""
        compromise = max(self.asked - self.whitened.norm() ** 2, 0.0) / (self.asked or 1.0)
        facts = {"compromise_loss": compromise, "predicted_loss": 0.0}
        return facts | ({"without_statistics": float(left_out)} if left_out else {})

    def _read_back(self, whitened: LowRank) -> LowRank:
        return LowRank(whitened.B, torch.linalg.solve_triangular(self.C, whitened.A, upper=False, left=False))


def solve_regmean(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    statistics: Sequence[LayerStatistics | None],
    *,
    module: str = "",
    off_diagonal: float = 0.9,
    ridge: float = 1e-6,
) -> Solved:
    """Solve RegMean for one layer; see `regmean` for the arguments.

    Time n^3 / 3 + 2 n^2 R flops, memory 2 n^2 numbers of 8 bytes: Grams are read a few rows at a time.
    """
    check_shares(off_diagonal, ridge)
    members = _with_statistics(updates, weights, statistics)
    n = updates[0].shape[1]
    for _, _, of in members:
        if of.gram is None:
            raise ValueError(f"the statistics of layer {module!r} hold no Gram: collect them with moa statistics")
        if tuple(of.gram.shape) != (n, n):
            raise ValueError(f"the Gram of layer {module!r} must be {[n, n]}, got {list(of.gram.shape)}")
    floor = ridge * _mean_diagonal(members)
    S = members[0][0].A.new_zeros(n, n)
    read: list[LowRank] = []
    for update, w, of in members:
        AG = torch.zeros_like(update.A)
        for rows, G in _regularised_rows(of.gram, off_diagonal, floor):
            S[rows] += abs(w) * G
            AG += update.A[:, rows] @ G
        read.append(LowRank(update.B, w * AG))
    S, failed = torch.linalg.cholesky_ex(S)
    if failed:
        raise ValueError(
            f"the input Grams of layer {module!r} have no inverse, even together: raise ridge (it is {ridge:g}), or "
            "collect statistics from more text"
        )
    asked = sum(abs(inner(AG, update)) for AG, (update, _, _) in zip(read, members, strict=True))
    pulled = stack(read)
    return Solved(LowRank(pulled.B, torch.linalg.solve_triangular(S, pulled.A.T, upper=False).T), S, asked)


@merge_method(
    "fisher",
    paper="https://arxiv.org/abs/2111.09832",
    degree=0,
    breaks={
        "zero_adapter": IDLE.replace("inputs", "rows"),
        "rotation": "it weighs rows, which a rotation of the outputs mixes",
        "span": "it scales rows, which leaves the directions that the adapters write",
    },
    check=check_eps,
)
def fisher(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    statistics: Sequence[LayerStatistics | None],
    module: str = "",
    rank: int | None = None,
    balanced: bool = True,
    eps: float = 1e-6,
) -> Merged:
    """The mean of the updates, each row weighed by how much each adapter's answers depend on it.

    M = sum_i diag(F_i / sum_j F_j) sign(w_i) delta_i with F_i = |w_i| phi_i and phi_i [o] the diagonal Fisher
    information summed over each row of the matrix. By rows, because a weight for every entry would leave no
    low rank; by outputs, because Fisher information of A and B depends on how an adapter is factored. With equal
    phi it is the weighted mean. An adapter without statistics here is left out.

    Args:
        balanced: divide each phi_i by its mean, so that no adapter wins by being less sure of its answers.
        eps: share of the mean of all phi that is added to each: rows that nothing depends on are averaged.

    Raises:
        ValueError: an eps that is not above 0, or statistics without gradients.
    """
    check_eps(eps)
    members = _with_statistics(updates, weights, statistics)
    if any(of.fisher is None for _, _, of in members):
        raise ValueError(f"the statistics of layer {module!r} hold no gradients: collect them with --fisher true")
    phi = torch.stack([of.fisher.to(torch.float64) for _, _, of in members])
    if balanced:
        phi = phi / phi.mean(dim=1, keepdim=True).clamp(min=torch.finfo(phi.dtype).tiny)
    phi = phi + eps * (phi.mean() if phi.any() else 1.0)
    w = phi.new_tensor([w for _, w, _ in members])[:, None]
    shares = phi * w / (phi * w.abs()).sum(dim=0)
    merged = stack([LowRank(s[:, None] * u.B, u.A) for s, (u, _, _) in zip(shares, members, strict=True)])
    left_out = len(updates) - len(members)
    return Merged(*merged.truncated(rank), {"without_statistics": float(left_out)} if left_out else {})


Member = tuple[LowRank, float, LayerStatistics]


def _with_statistics(
    updates: Sequence[LowRank], weights: Float[Tensor, " n"], statistics: Sequence[LayerStatistics | None]
) -> list[Member]:
    """Update, weight and statistics of each adapter that has statistics."""
    every = zip(updates, weights.tolist(), statistics, strict=True)
    return [(update, w, of) for update, w, of in every if of is not None]


def _mean_diagonal(members: Sequence[Member]) -> float:
    """tr(S) / (n sum |w|), the mean size of the inputs' squares; 1 where all inputs are zero."""
    total = sum(abs(w) * float(of.gram.diagonal().double().mean()) for _, w, of in members)
    return total / sum(abs(w) for _, w, _ in members) or 1.0


def _regularised_rows(
    gram: Float[Tensor, "n n"], off_diagonal: float, floor: float
) -> Iterator[tuple[slice, Float[Tensor, "b n"]]]:
    """Rows of alpha G + (1 - alpha) diag(G) + floor I, a few at a time."""
    n = len(gram)
    diagonal = gram.diagonal().double() + floor
    for start in range(0, n, step := max(1, BLOCK_ENTRIES // n)):
        rows = slice(start, min(start + step, n))
        block = off_diagonal * gram[rows].double()
        block.diagonal(start).copy_(diagonal[rows])
        yield rows, block

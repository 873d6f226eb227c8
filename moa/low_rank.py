"""The update of one layer as two factors, scaling folded in, and the algebra that never forms the matrix.

A LoRA adapter changes a layer's weight by `delta = s B A`, with `s = alpha / r` (or `alpha / sqrt(r)`).
`LowRank(B, A)` means `delta = B @ A` and nothing else: `s` went into the factors when they were read, so no
function after that has a scale to remember. Everything that needs a decomposition runs in float64: the
matrices are as small as the ranks, and the result is then exact to the precision of what was stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

NUMERICAL_RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding of float32 factors, not directions."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A layer's update `delta = B @ A`, shape [o, n], kept as its factors.

    Attributes:
        B: [o, r], what the layer writes.
        A: [r, n], what the layer reads.

    Raises:
        ValueError: when the factors are no matrices or do not share a rank.
    """

    B: Float[Tensor, "o r"]
    A: Float[Tensor, "r n"]

    def __post_init__(self):
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(
                f"the factors of an update are B [o, r] and A [r, n] with one r, "
                f"got B {list(self.B.shape)} and A {list(self.A.shape)}"
            )

    @classmethod
    def zero(cls, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> "LowRank":
        """The update that changes nothing: rank 0, shape [o, n]."""
        return cls(torch.zeros(shape[0], 0, dtype=dtype), torch.zeros(0, shape[1], dtype=dtype))

    @property
    def rank(self) -> int:
        """Columns of B and rows of A; the matrix itself may have a smaller rank."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape [o, n] of the matrix that the factors stand for."""
        return self.B.shape[0], self.A.shape[1]

    def delta(self) -> Float[Tensor, "o n"]:
        """The matrix itself, B @ A."""
        return self.B @ self.A

    def norm(self) -> float:
        """Frobenius norm of B @ A, from the two r x r Gram matrices."""
        return math.sqrt(max(inner(self, self), 0.0))

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The same update with factors of another dtype."""
        return LowRank(self.B.to(dtype), self.A.to(dtype))

    def scaled(self, factor: float) -> "LowRank":
        """factor * B @ A, its magnitude split evenly between the factors and its sign on B.

        An even split keeps both factors within the range of a half-precision dtype.
        """
        root = math.sqrt(abs(factor))
        return LowRank(self.B * math.copysign(root, factor), self.A * root)

    __mul__ = __rmul__ = scaled

    def truncated(self, rank: int | None = None) -> tuple["LowRank", float]:
        """The best approximation of at most `rank` (Eckart-Young), and the energy ||delta - it||^2 it drops.

        B = U sqrt(S) and A = sqrt(S) V^T, each row of A with its largest entry positive: one update has one
        such form, whatever its factors were. Without `rank`, the numerical rank is kept. Never below rank 1,
        the least that an adapter can store.
        """
        U, S, V = svd(self)
        kept = max(1, int((S / S.max() > NUMERICAL_RANK_TOLERANCE).sum())) if S.numel() else 0
        kept = min(kept, rank) if rank is not None else kept
        if kept == 0:
            return LowRank(U.new_zeros(U.shape[0], 1), V.new_zeros(1, V.shape[0])), 0.0
        U, V, root = U[:, :kept], V[:, :kept], S[:kept].sqrt()
        largest = V.abs().argmax(dim=0)
        sign = torch.where(V[largest, torch.arange(kept)] < 0, -1.0, 1.0).to(V.dtype)
        return LowRank(U * (sign * root), (V * (sign * root)).T), float(S[kept:].square().sum())


class Core(NamedTuple):
    """Updates in one shared pair of bases: `delta_i = left @ cores[i] @ right.T`, exactly.

    The cores are as small as the ranks (p, q <= R, the sum of all ranks), and the bases are orthonormal, so
    norms, angles and singular values of the cores are those of the deltas.
    """

    left: Float[Tensor, "o p"]
    cores: Float[Tensor, "N p q"]
    right: Float[Tensor, "n q"]


class SVD(NamedTuple):
    """Thin singular value decomposition `delta = U @ diag(S) @ V.T`, S descending."""

    U: Float[Tensor, "o p"]
    S: Float[Tensor, " p"]
    V: Float[Tensor, "n p"]


def stack(updates: Sequence[LowRank]) -> LowRank:
    """The sum of the updates as one: B = [B_1 .. B_N], A = [A_1; ..; A_N], rank R = sum of ranks. Exact."""
    return LowRank(torch.cat([u.B for u in updates], dim=1), torch.cat([u.A for u in updates], dim=0))


def inner(a: LowRank, b: LowRank) -> float:
    """<delta_a, delta_b> = sum((B_a^T B_b) * (A_a A_b^T)), the Frobenius inner product."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    return float(((a.B.T @ b.B) * (a.A @ b.A.T)).sum())


def gram(updates: Sequence[LowRank]) -> Float[Tensor, "N N"]:
    """All inner products of the updates, float64: norms on the diagonal (squared), cosines after scaling.

    Grams of several layers add up to that of the whole adapters.
    """
    G = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for i, a in enumerate(updates):
        for j, b in enumerate(updates[: i + 1]):
            G[i, j] = G[j, i] = inner(a, b)
    return G


def core(updates: Sequence[LowRank]) -> Core:
    """Express updates in bases that span all of them, by one QR of each stack (float64).

    [B_1 .. B_N] = left R_B and [A_1; ..; A_N]^T = right R_A, so cores[i] = R_B[:, i] R_A[:, i]^T.
    Cost 4 (o + n) R^2 flops, against o n min(o, n) for the dense matrix.
    """
    whole = stack(updates).to(torch.float64)
    left, R_B = torch.linalg.qr(whole.B)
    right, R_A = torch.linalg.qr(whole.A.T)
    ranks = [u.rank for u in updates]
    cores = [b @ a.T for b, a in zip(R_B.split(ranks, dim=1), R_A.split(ranks, dim=1), strict=True)]
    return Core(left, torch.stack(cores), right)


def svd(update: LowRank) -> SVD:
    """Thin SVD of an update through its core, at the cost of two thin QRs (float64)."""
    left, cores, right = core([update])
    U, S, Vh = torch.linalg.svd(cores[0], full_matrices=False)
    return SVD(left @ U, S, right @ Vh.T)

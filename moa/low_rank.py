"""The update of one layer as two factors, scaling folded in, and the algebra that never forms the matrix.

A LoRA adapter changes a layer's weight by `delta = s B A`, with `s = alpha / r` (or `alpha / sqrt(r)`).
`LowRank(B, A)` means `delta = B @ A` and nothing else: `s` went into the factors when they were read, so no
function after that has a scale to remember. Everything that needs a decomposition runs in float64: the
matrices are as small as the ranks, and the result is then exact to the precision of what was stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

NUMERICAL_RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest are rounding of float32 factors, not directions."""
SPAN_TOLERANCE = 1e-7
"""Directions of unit vectors below this share of the strongest are not told from rounding by a Gram matrix."""
WEAK = 1e-6
"""Below this share of the largest eigenvalue of a Gram matrix, an eigenvector has lost digits that matter."""


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
        """Frobenius norm of B @ A, from the two r x r Gram matrices; computed once."""
        return self._norm

    @cached_property
    def _norm(self) -> float:
        return math.sqrt(max(inner(self, self), 0.0))

    def changes_something(self) -> bool:
        """Whether B @ A is more than the rounding of factors that cancel."""
        return self.norm() > NUMERICAL_RANK_TOLERANCE * float(self.B.norm() * self.A.norm())

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The same update with factors of another dtype."""
        return LowRank(self.B.to(dtype), self.A.to(dtype))

    def scaled(self, factor: float) -> "LowRank":
        """factor * B @ A, its magnitude split evenly between the factors and its sign on B.

        An even split keeps both factors within the range of a half-precision dtype.
        """
        if factor == 1:
            return self
        root = math.sqrt(abs(factor))
        return LowRank(self.B * math.copysign(root, factor), self.A * root)

    __mul__ = __rmul__ = scaled

    def truncated(self, rank: int | None = None) -> tuple["LowRank", float]:
        """The best approximation of at most `rank` (Eckart-Young), and the energy ||delta - it||^2 it drops.

        B = U sqrt(S) and A = sqrt(S) V^T, each row of A with its largest entry positive: one update has one
        such form, whatever its factors were. Without `rank`, the numerical rank is kept. Never below rank 1,
        the least that an adapter can store.
        """
        shared = core([self])
        return shared.expanded(shared.cores[0], rank)


@dataclass(frozen=True, eq=False)
class Basis:
    """An orthonormal basis Q of what some vectors span, known as Q = vectors @ into.

    Q is as large as the vectors, and a method wants a few combinations of its columns, not Q: `basis @ X` is
    Q @ X at the cost of one product of the vectors with a matrix as wide as X.

    Attributes:
        vectors: [d, R], what spans.
        into: [R, p], Q = vectors @ into; p is the number of directions that are more than rounding.
        coordinates: [p, R], vectors = Q @ coordinates.
    """

    vectors: Float[Tensor, "d R"]
    into: Float[Tensor, "R p"]
    coordinates: Float[Tensor, "p R"]

    def __matmul__(self, X: Float[Tensor, "p k"]) -> Float[Tensor, "d k"]:
        return self.vectors @ (self.into @ X)

    def matrix(self) -> Float[Tensor, "d p"]:
        """Q itself."""
        return self.vectors @ self.into


class Core(NamedTuple):
    """Updates in one shared pair of bases: `delta_i = left @ cores[i] @ right^T`.

    The cores are as small as the ranks (p, q <= R, the sum of all ranks), and the bases are orthonormal, so
    norms, angles and singular values of the cores are those of the deltas.

    Attributes:
        left: basis of what the updates write, p directions of size o.
        updates: the same updates in the coordinates of the bases, [p, r_i] and [r_i, q].
        right: basis of what they read, q directions of size n.
    """

    left: Basis
    updates: list[LowRank]
    right: Basis

    @property
    def cores(self) -> Float[Tensor, "N p q"]:
        """The updates as small matrices."""
        return torch.stack([update.delta() for update in self.updates])

    def expanded(self, M: Float[Tensor, "p q"], rank: int | None = None) -> tuple[LowRank, float]:
        """left @ M @ right^T as an update of at most `rank`, and the energy that this drops.

        Its form is that of `LowRank.truncated`.
        """
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
        kept = int((NUMERICAL_RANK_TOLERANCE * S[:1] < S).sum())
        kept = kept if rank is None else min(kept, rank)
        root = S[:kept].sqrt()
        small = LowRank(U[:, :kept] * root, root[:, None] * Vh[:kept])
        return self.outside(small), float(S[kept:].square().sum())

    def outside(self, small: LowRank) -> LowRank:
        """left @ small @ right^T: an update out of the core, each row of A with its largest entry positive.

        Never below rank 1, the least that an adapter can store: without a rank, zeros.
        """
        if small.rank == 0:
            (o, _), (n, _) = self.left.vectors.shape, self.right.vectors.shape
            return LowRank(small.B.new_zeros(o, 1), small.A.new_zeros(1, n))
        B, A = self.left @ small.B, (self.right @ small.A.T).T.contiguous()
        largest = A.gather(1, A.abs().argmax(dim=1, keepdim=True))
        sign = torch.where(largest < 0, -1.0, 1.0).to(A.dtype)
        return LowRank(B * sign.T, A * sign)


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


def span(vectors: Float[Tensor, "d R"]) -> Basis:
    """An orthonormal basis of the columns, from the eigenvectors of their Gram matrix (float64).

    With lengths L and the unit columns' Gram matrix V diag(s) V^T, Q = vectors L^-1 V s^-1/2. That is one
    product of 2 d R^2 flops, in which a QR takes several times as long. Directions below `SPAN_TOLERANCE` of
    the strongest are dropped, so that what vectors share is there once; products of the basis and the
    coordinates are exact but for these. A Gram matrix squares the condition number: where a direction that
    stays is weak, the basis is computed once more from itself (as in CholeskyQR2), to be orthonormal again.
    """
    vectors = vectors.to(torch.float64)
    G = vectors.T @ vectors
    lengths = G.diagonal().sqrt()
    lengths = torch.where(lengths == 0, 1.0, lengths)
    s, V = torch.linalg.eigh(G / torch.outer(lengths, lengths))
    s, V = s[-vectors.shape[0] :], V[:, -vectors.shape[0] :]  # no more directions than rows, strongest last
    strong = s > SPAN_TOLERANCE**2 * s[-1:]
    s, V = s[strong], V[:, strong]
    basis = Basis(vectors, V / s.sqrt() / lengths[:, None], s.sqrt()[:, None] * V.T * lengths)
    if (s < WEAK * s[-1:]).any():
        again = span(basis.matrix())
        return Basis(vectors, basis.into @ again.into, again.coordinates @ basis.coordinates)
    return basis


def core(updates: Sequence[LowRank]) -> Core:
    """Express updates in bases that span all of them, from one Gram matrix of each stack (float64).

    With [B_1 .. B_N] = left R_B and [A_1; ..; A_N]^T = right R_A, the core of an update is R_Bi R_Ai^T.
    Cost 2 (o + n) R^2 flops, against o n min(o, n) for the dense matrix.
    """
    whole = stack(updates)
    left, right = span(whole.B), span(whole.A.T)
    ranks = [update.rank for update in updates]
    coordinates = zip(left.coordinates.split(ranks, dim=1), right.coordinates.split(ranks, dim=1), strict=True)
    return Core(left, [LowRank(b, a.T) for b, a in coordinates], right)


def svd(update: LowRank) -> SVD:
    """Thin SVD of an update through its core (float64)."""
    left, (small,), right = core([update])
    U, S, Vh = torch.linalg.svd(small.delta(), full_matrices=False)
    return SVD(left @ U, S, right @ Vh.T)

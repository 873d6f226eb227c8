"""One layer of a stored merge: all updates in shared orthonormal bases, or their running sum at a fixed rank.

Both take updates in and out one at a time, in float64, at the cost of a few products with the new factors.
Bases grow by what a new update adds to their span and stay orthonormal however often they change.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from moa.low_rank import LowRank

NEW_DIRECTION = 1e-13
"""Part of a unit vector outside of a basis, from which it is a direction of its own and not rounding."""


@dataclass(frozen=True, eq=False)
class SharedBases:
    """The updates of a layer, exactly: `delta_i = writes @ coordinates[i].delta() @ reads.T`.

    The factors themselves are kept, B_i = writes R_Bi and A_i = R_Ai reads^T, so that also what depends on
    more than their product is as it was. What updates share, such as one frozen A, is stored once.

    Attributes:
        writes: [o, p], orthonormal, spans all B_i.
        reads: [n, q], orthonormal, spans all A_i^T.
        coordinates: member to (R_Bi [p, r_i], R_Ai [r_i, q]).
    """

    writes: Float[Tensor, "o p"]
    reads: Float[Tensor, "n q"]
    coordinates: Mapping[str, LowRank]

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> "SharedBases":
        """A layer [o, n] that nobody changes."""
        o, n = shape
        return cls(torch.zeros(o, 0, dtype=torch.float64), torch.zeros(n, 0, dtype=torch.float64), {})

    @property
    def shape(self) -> tuple[int, int]:
        """Shape [o, n] of the layer."""
        return self.writes.shape[0], self.reads.shape[0]

    def update(self, name: str) -> LowRank:
        """The update of a member, factors as they were given."""
        own = self.coordinates[name]
        return LowRank(self.writes @ own.B, own.A @ self.reads.T)

    def plus(self, name: str, update: LowRank) -> "SharedBases":
        """With one member more: bases are extended by what is new, the others' coordinates padded by zeros."""
        writes, reads = extended(self.writes, update.B), extended(self.reads, update.A.T)
        more = (writes.shape[1] - self.writes.shape[1], reads.shape[1] - self.reads.shape[1])
        padded = {
            n: LowRank(pad(c.B, (0, 0, 0, more[0])), pad(c.A, (0, more[1]))) for n, c in self.coordinates.items()
        }
        return SharedBases(writes, reads, {**padded, name: LowRank(writes.T @ update.B, update.A @ reads)})

    def minus(self, name: str) -> "SharedBases":
        """Without a member, and without the directions that nobody else uses."""
        left = {other: own for other, own in self.coordinates.items() if other != name}
        if not left:
            return SharedBases.empty(self.shape)
        turn_B = used(torch.cat([own.B for own in left.values()], dim=1))
        turn_A = used(torch.cat([own.A.T for own in left.values()], dim=1))
        turned = {other: LowRank(turn_B.T @ own.B, own.A @ turn_A) for other, own in left.items()}
        return SharedBases(polished(self.writes @ turn_B), polished(self.reads @ turn_A), turned)


@dataclass(frozen=True, eq=False)
class RunningSum:
    """The weighted sum of updates at a rank, `U diag(S) V^T`, and how far it can be from the true one.

    Attributes:
        U: [o, k], orthonormal.
        S: [k], descending.
        V: [n, k], orthonormal.
        error: bound on the Frobenius norm of the true sum less this one, the norms of all that was dropped
            added up; rounding is not in it.
    """

    U: Float[Tensor, "o k"]
    S: Float[Tensor, " k"]
    V: Float[Tensor, "n k"]
    error: float = 0.0

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> "RunningSum":
        """The sum of nothing in a layer [o, n]."""
        bases = SharedBases.empty(shape)
        return cls(bases.writes, torch.zeros(0, dtype=torch.float64), bases.reads)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape [o, n] of the layer."""
        return self.U.shape[0], self.V.shape[0]

    def update(self) -> LowRank:
        """The sum, its magnitude split evenly between the factors."""
        root = self.S.sqrt()
        return LowRank(self.U * root, (self.V * root).T)

    def scaled(self, factor: float) -> "RunningSum":
        """The sum times a factor above 0."""
        return RunningSum(self.U, self.S * factor, self.V, self.error * factor)

    def plus(self, update: LowRank, rank: int) -> "RunningSum":
        """With an update more, cut back to the rank (incremental SVD; Brand, 2006).

        In bases extended by the update, the sum is diag(S) plus a core of the update's own. Cost O((o + n) (k + r)^2).
        """
        left, right = extended(self.U, update.B), extended(self.V, update.A.T)
        core = (left.T @ update.B) @ (update.A @ right)
        core[range(len(self.S)), range(len(self.S))] += self.S
        U, S, Vh = torch.linalg.svd(core, full_matrices=False)
        kept = min(rank, int((torch.finfo(S.dtype).eps * S[:1] < S).sum()))
        dropped = float(S[kept:].norm())
        return RunningSum(polished(left @ U[:, :kept]), S[:kept], polished(right @ Vh[:kept].T), self.error + dropped)


def extended(basis: Float[Tensor, "d p"], vectors: Float[Tensor, "d r"]) -> Float[Tensor, "d _"]:
    """An orthonormal basis and, after its columns, directions that complete it to the span of the vectors too."""
    vectors = _unit(vectors)
    new = _range_of(vectors - basis @ (basis.T @ vectors), NEW_DIRECTION)
    new = torch.linalg.qr(new - basis @ (basis.T @ new)).Q  # once more, without what rounding left: twice is enough
    return torch.cat([basis, new], dim=1)


def used(coordinates: Float[Tensor, "p R"]) -> Float[Tensor, "p _"]:
    """[p, p'] orthonormal: the directions of a basis that these coordinates use; the identity if they use all."""
    directions = _range_of(_unit(coordinates), NEW_DIRECTION)
    whole = directions.shape[0] == directions.shape[1]
    return torch.eye(len(directions), dtype=directions.dtype) if whole else directions


def polished(basis: Float[Tensor, "d p"]) -> Float[Tensor, "d p"]:
    """A basis that rounding made slightly less than orthonormal, made so again by one Newton-Schulz step.

    Q (3 - Q^T Q) / 2 squares the departure from Q^T Q = 1, so that it cannot grow over many changes.
    """
    return 1.5 * basis - 0.5 * basis @ (basis.T @ basis)


def _unit(vectors: Tensor) -> Tensor:
    """Columns of length 1, so that a member of small norm is kept as precisely as one of large norm."""
    lengths = vectors.norm(dim=0)
    return vectors / torch.where(lengths == 0, 1.0, lengths)


def _range_of(vectors: Tensor, tolerance: float) -> Tensor:
    """Orthonormal columns that span the vectors, but for what is shorter than the tolerance."""
    U, S, _ = torch.linalg.svd(vectors, full_matrices=False)
    return U[:, tolerance < S]

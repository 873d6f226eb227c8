"""Dense float64 versions of the spectral merges, written from their papers' formulas, which benchmarks compare with.

Each takes deltas [N, o, n] that have their weights 1/N in, and the rank of the result, to which it need not cut.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DENSITY, COMMON, BETA = 0.2, 0.8, 0.5  # the methods' defaults
SETTLED = 1e-8  # as in the design: HOOI ends at a gain of less of the energy
Part = tuple[Tensor, Tensor, Tensor]


def thin(matrix: Tensor, rank: int | None = None) -> Part:
    """U, S, V without the singular values that are rounding, or of a rank."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = rank or int((S / S[0] > 1e-6).sum())
    return U[:, :rank], S[:rank], Vh[:rank].T


def cut(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank."""
    U, S, V = thin(matrix, rank)
    return U * S @ V.T


def principal(matrices: Sequence[Tensor]) -> Tensor:
    """Eigenvectors of sum_i X_i X_i^T without those of eigenvalue zero."""
    values, vectors = torch.linalg.eigh(sum(X @ X.T for X in matrices))
    return vectors[:, values > 1e-11 * values[-1]]


def ties(matrices: Sequence[Tensor]) -> Tensor:
    """The largest entries of each, added up where they agree with the sign of the sum."""
    kept = int(DENSITY * matrices[0].numel())
    smallest = [X.abs().flatten().topk(kept).values[-1] for X in matrices]
    votes = torch.stack([X * (X.abs() >= size) for X, size in zip(matrices, smallest, strict=True)])
    return (votes * (votes.sign() == votes.sum(0).sign())).sum(0)


def orthogonalised(parts: Sequence[Part]) -> Part:
    """All U side by side, and all V, each turned to the nearest orthonormal columns."""
    U, S, V = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    left, right = (thin(side) for side in (U, V))
    return left[0] @ left[2].T, S, right[0] @ right[2].T


def dense_knots(deltas: Tensor, rank: int) -> Tensor:
    U = principal(deltas)
    return U @ ties([U.T @ D for D in deltas])


def dense_core_space(deltas: Tensor, rank: int) -> Tensor:
    U, V = principal(deltas), principal(deltas.mT)
    return U @ ties([U.T @ D @ V for D in deltas]) @ V.T


def dense_tsv(deltas: Tensor, rank: int) -> Tensor:
    U, S, V = orthogonalised([thin(D) for D in deltas])
    return U * S @ V.T


def dense_iso_c(deltas: Tensor, rank: int) -> Tensor:
    U, S, V = thin(deltas.sum(0), rank)
    return S.mean() * U @ V.T


def dense_iso_cts(deltas: Tensor, rank: int) -> Tensor:
    N = len(deltas)
    t = max(1, round((rank - int(COMMON * rank)) / N)) if rank > N else 0
    parts = [thin(deltas.sum(0), rank - N * t)]
    U = parts[0][0]
    parts += [thin(D - U @ (U.T @ D), t) for D in deltas if t]
    U, S, V = orthogonalised(parts)
    return S.mean() * U @ V.T


def dense_ctm(deltas: Tensor, rank: int) -> Tensor:
    """The same sweeps on dense matrices: on random adapters, where to stop them decides the result."""
    norms = deltas.flatten(1).norm(dim=1)
    X = ((BETA * norms + (1 - BETA) * norms.mean()) / norms)[:, None, None] * deltas
    energy, captured, gains = X.square().sum(), torch.tensor(0.0), 0
    V = ahead = thin(X.flatten(0, 1), rank)[2]
    U = thin(torch.cat([x @ V for x in X], dim=1), rank)[0]
    while True:
        last, V = V, stepped(torch.cat([x.T @ U for x in X], dim=1), ahead)
        before, captured = captured, sum((U.T @ x @ V).square().sum() for x in X)
        if captured - before > SETTLED * energy:
            gains += 1
        elif gains:
            gains = 0
        else:
            break
        moved = V - last @ (last.T @ V)
        ahead = V + max(gains - 1, 0) / (gains + 2) * moved
        U = stepped(torch.cat([x @ ahead for x in X], dim=1), U)
    small = [U.T @ D @ V for D in deltas]
    P, Q = principal(small), principal([C.T for C in small])
    return U @ P @ ties([P.T @ C @ Q for C in small]) @ (V @ Q).T


def stepped(X: Tensor, basis: Tensor) -> Tensor:
    """One step of orthogonal iteration on X X^T."""
    return torch.linalg.qr(X @ (X.T @ basis)).Q


def dense_wudi(deltas: Tensor, rank: int) -> Tensor:
    inputs = [D.T @ D / D.norm() ** 2 for D in deltas]
    targets = sum(len(deltas) * D @ G for D, G in zip(deltas, inputs, strict=True))
    return targets @ torch.linalg.pinv(sum(inputs), rtol=1e-10, hermitian=True)


def dense_pico(deltas: Tensor, rank: int) -> Tensor:
    own = len(deltas) * deltas
    U, S, _ = thin(torch.cat([U_i * S_i for U_i, S_i, _ in map(thin, own)], dim=1))
    damped = U / (1 + (len(own) - 1) * S**2 / (S**2).sum()) @ (U.T @ deltas.sum(0))
    return own.flatten(1).norm(dim=1).mean() / damped.norm() * damped


REFERENCES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "svd": lambda deltas, rank: deltas.sum(0),
    "knots": dense_knots,
    "core_space": dense_core_space,
    "tsv": dense_tsv,
    "iso_c": dense_iso_c,
    "iso_cts": dense_iso_cts,
    "ctm": dense_ctm,
    "wudi": dense_wudi,
    "pico": dense_pico,
}

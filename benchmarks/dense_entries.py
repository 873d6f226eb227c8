"""Dense float64 versions of the merges that add, turn, trim or weigh, written from their papers' formulas.

As in `dense_spectral`, each takes deltas [N, o, n] that have their weights 1/N in, and the rank of the result, which
only methods of low rank look at. Those `WITH_DATA` take the adapters' statistics in its place.
"""

from collections.abc import Callable, Sequence

import torch
from dense_spectral import DENSITY
from torch import Tensor

from moa.merging.statistics import LayerStatistics

GAMMA, KEPT, LAMBDA, USERS, OFF_DIAGONAL, RIDGE, EPS = 0.01, 0.9, 0.4, 2, 0.9, 1e-6, 1e-6  # the methods' defaults


def between(matrix: Tensor, first: int, last: int) -> Tensor:
    """The entries that come, by size, after the `first` largest and within the `last` largest."""
    order = matrix.abs().flatten().argsort(descending=True)[first:last]
    chosen = torch.zeros_like(matrix).flatten()
    chosen[order] = matrix.flatten()[order]
    return chosen.view_as(matrix)


def dense_magnitude(deltas: Tensor, rank: int) -> Tensor:
    return sum(between(D, 0, int(DENSITY * D.numel())) for D in deltas)


def dense_breadcrumbs(deltas: Tensor, rank: int) -> Tensor:
    entries = deltas[0].numel()
    top = int(GAMMA * entries)
    return sum(between(D, top, top + int(KEPT * entries)) for D in deltas)


def dense_ties(deltas: Tensor, rank: int) -> Tensor:
    votes = torch.stack([between(D, 0, int(DENSITY * D.numel())) for D in deltas])
    agree = (votes.sign() == votes.sum(0).sign()) & (votes != 0)
    return (votes * agree).sum(0) / (agree.sum(0) / len(deltas)).clamp(min=1e-30)


def dense_consensus(deltas: Tensor, rank: int) -> Tensor:
    total = deltas.sum(0)
    uses = (deltas.abs() >= LAMBDA * (total - deltas).abs()) & (deltas != 0)
    return total * (uses.sum(0) >= USERS)


def dense_pcb(deltas: Tensor, rank: int) -> Tensor:
    N, D = len(deltas), (len(deltas) * deltas).flatten(1)
    score = torch.exp(N * unit(D.abs()) ** 2) * torch.tanh(D * D.sum(0))
    limit = score.sort(dim=1, descending=True).values[:, int(DENSITY * D.shape[1]) - 1, None]
    share = unit(score.clamp(min=limit))
    return ((share * D).sum(0) / share.sum(0).clamp(min=1e-30)).view_as(deltas[0])


def unit(X: Tensor) -> Tensor:
    """Each row from 0 at its smallest to 1 at its largest."""
    return (X - X.amin(1, keepdim=True)) / (X.amax(1, keepdim=True) - X.amin(1, keepdim=True))


def dense_slerp(deltas: Tensor, rank: int) -> Tensor:
    a, b = 2 * deltas
    theta = torch.arccos((a * b).sum() / a.norm() / b.norm())
    return torch.sin(theta / 2) / torch.sin(theta) * (a + b)


def dense_multislerp(deltas: Tensor, rank: int) -> Tensor:
    lengths = deltas.flatten(1).norm(dim=1)
    mean = (deltas / lengths[:, None, None]).sum(0)
    return lengths.sum() * mean / mean.norm()


def dense_karcher(deltas: Tensor, rank: int) -> Tensor:
    """Steps of the mean of the directions' logarithms, until they are of no length."""
    lengths = deltas.flatten(1).norm(dim=1)
    points = deltas.flatten(1) / lengths[:, None]
    m, length = points.sum(0) / points.sum(0).norm(), torch.tensor(1.0)
    while length > 1e-12:
        angles = torch.arccos(points @ m)
        step = ((angles / angles.sin())[:, None] * (points - (points @ m)[:, None] * m)).mean(0)
        length = step.norm()
        m = length.cos() * m + torch.sinc(length / torch.pi) * step
    return lengths.sum() * m.view_as(deltas[0])


def dense_model_stock(deltas: Tensor, rank: int) -> Tensor:
    N, units = len(deltas), deltas.flatten(1) / deltas.flatten(1).norm(dim=1, keepdim=True)
    c = ((units @ units.T).sum() - N) / (N * (N - 1))
    return (N * c / (1 + (N - 1) * c)).clamp(0, 1) * deltas.sum(0)


def dense_regmean(deltas: Tensor, statistics: Sequence[LayerStatistics]) -> Tensor:
    grams = [of.gram.double() for of in statistics]
    floor = RIDGE * sum(G.diagonal().mean() for G in grams) / len(grams)
    grams = [OFF_DIAGONAL * G + torch.diag((1 - OFF_DIAGONAL) * G.diagonal() + floor) for G in grams]
    asked = sum(D @ G for D, G in zip(deltas, grams, strict=True))
    return torch.linalg.solve(sum(grams) / len(grams), asked, left=False)


def dense_fisher(deltas: Tensor, statistics: Sequence[LayerStatistics]) -> Tensor:
    phi = torch.stack([of.fisher.double() / of.fisher.double().mean() for of in statistics])
    phi = phi + EPS * phi.mean()
    return (phi[:, :, None] * deltas).sum(0) * len(deltas) / phi.sum(0)[:, None]


def dense_sum(deltas: Tensor, rank: int) -> Tensor:
    return deltas.sum(0)


REFERENCES: dict[str, Callable[[Tensor, int], Tensor]] = {
    **dict.fromkeys(("weighted_sum", "average", "concatenation"), dense_sum),
    "magnitude": dense_magnitude,
    "breadcrumbs": dense_breadcrumbs,
    "ties": dense_ties,
    "consensus": dense_consensus,
    "pcb": dense_pcb,
    "slerp": dense_slerp,
    "multislerp": dense_multislerp,
    "karcher": dense_karcher,
    "model_stock": dense_model_stock,
}
WITH_DATA: dict[str, Callable[[Tensor, Sequence[LayerStatistics]], Tensor]] = {
    "regmean": dense_regmean,
    "fisher": dense_fisher,
}

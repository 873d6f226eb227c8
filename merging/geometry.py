"""How adapters lie to each other, known before anything is merged and without a model.

Everything comes from the factors: what a sum keeps of each adapter, what the adapters read and write in common,
and which of them belong together. It says what merging does to the updates, not what the model then answers.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moa.adapters import Adapter
from moa.low_rank import NUMERICAL_RANK_TOLERANCE, SVD, LowRank, gram, stack, svd
from moa.merging.checks import check_same_base, checked_weights, common_shapes, read_all
from moa.merging.layers import Layers, no_progress
from moa.merging.principal_angles import Spaces, compared_spaces

AGREE = 0.1
"""Mean cosine from which adapters are said to agree. Measured on seven rank-8 adapters that started from one A:
0.12 to 0.19 between those of classification and short answers, 0.02 to 0.06 between all others. Adapters that started
from different A read different inputs, so that even those of one task are nearly orthogonal, for a sum at least."""
SAMPLED = 512
"""Signs are compared in all entries of a layer of up to this many rows and columns, else in as many rows and columns
drawn at random, which stays within 0.01 of all entries (measured at 4096 x 4096)."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """n adapters against each other, in one layer or in the whole model; NaN where there is nothing to compare.

    Attributes:
        norms: ||delta_i||.
        cosines: <delta_i, delta_j> / (||delta_i|| ||delta_j||).
        input_overlap, input_mean_angle, input_largest_angle: what both read, by the principal angles of the row
            spaces, see `moa.merging.principal_angles.Spaces`. Over layers, the mean.
        output_overlap, output_mean_angle, output_largest_angle: what both write, by those of the column spaces.
        sign_conflict: share of the entries that both change, which they change in opposite directions; 0.5 for
            unrelated adapters.
        effective_ranks: exp(-sum_k p_k log p_k) with p = S / sum S of delta_i; over layers, the mean.
        effective_rank_of_sum: the same of sum_i w_i delta_i.
        cancellation: 1 - ||sum_i w_i delta_i|| / sum_i ||w_i delta_i||, what a sum loses to disagreement.
        cancellation_if_orthogonal: what it would lose if all cosines were 0.
    """

    norms: Float[Tensor, " n"]
    cosines: Float[Tensor, "n n"]
    input_overlap: Float[Tensor, "n n"]
    input_mean_angle: Float[Tensor, "n n"]
    input_largest_angle: Float[Tensor, "n n"]
    output_overlap: Float[Tensor, "n n"]
    output_mean_angle: Float[Tensor, "n n"]
    output_largest_angle: Float[Tensor, "n n"]
    sign_conflict: Float[Tensor, "n n"]
    effective_ranks: Float[Tensor, " n"]
    effective_rank_of_sum: float
    cancellation: float
    cancellation_if_orthogonal: float


@dataclass(frozen=True, eq=False)
class Geometry:
    """What `geometry` finds.

    Attributes:
        names: the adapters.
        weights: their weights in the sum whose cancellation is predicted.
        whole: the adapters as wholes, over all layers.
        layers: layer name to the same for that layer.
        sampled: layers too large to compare all signs, where `SAMPLED` rows and columns stand for all.
        not_compared: adapter to what it holds beside B A, such as DoRA's magnitudes, which is left aside here.
        groups: adapters that agree, by average linkage of the cosines cut at `AGREE`.
        suggestion: the groups and conflicts in one sentence.
    """

    names: list[str]
    weights: list[float]
    whole: Comparison
    layers: dict[str, Comparison]
    sampled: list[str]
    not_compared: dict[str, list[str]]
    groups: list[list[str]]
    suggestion: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, None for NaN."""
        return _plain(self)


def geometry(
    adapters: Sequence[str | Path | Adapter],
    weights: Sequence[float | int] | None = None,
    *,
    check_base: bool = True,
    initial: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    progress: Callable[..., Iterable[str]] = no_progress,
) -> Geometry:
    """Compare adapters, layer by layer and as wholes.

    Cost: that of one SVD of every update, n^2 SVDs of their ranks' size, and the signs of at most `SAMPLED`^2 entries
    a layer.

    Args:
        adapters: two or more folders, Hub repositories, or adapters in memory.
        weights: one for each adapter, by default 1/N each. They enter only what is said of the sum.
        check_base: refuse adapters of different base models.
        initial: folders of PiSSA and OLoRA adapters before their training, as for `moa.merging.merge`.
        seed: for the rows and columns of large layers whose signs are compared.
        progress: shows the pass over the layers, as `tqdm.tqdm` and `rich.progress.track` do.

    Raises:
        ValueError: fewer than two adapters, or weights that make no sense.
        AdapterError: an adapter that cannot be read, or adapters that do not belong together.
        FileNotFoundError: no such folder.
    """
    sources = read_all(adapters, initial, plain=False)
    if len(sources) < 2:
        raise ValueError("geometry compares adapters and needs at least two, got 1: name another one")
    w = torch.tensor(checked_weights(weights, len(sources)), dtype=torch.float64)
    if check_base:
        check_same_base(sources)
    layers = Layers(sources, w, common_shapes(sources), progress)
    drawn = torch.Generator().manual_seed(seed)
    measured = {module: _measure(updates, w, drawn) for module, updates in layers.streamed("comparing adapters")}
    whole = _over_all(list(measured.values())).comparison(w)
    groups = agreeing_groups(whole.cosines, layers.names)
    return Geometry(
        names=layers.names,
        weights=w.tolist(),
        whole=whole,
        layers={module: found.comparison(w) for module, found in measured.items()},
        sampled=[module for module, size in layers.shapes.items() if max(size) > SAMPLED],
        not_compared={adapter.name: list(adapter.extras.names) for adapter in sources if adapter.extras},
        groups=groups,
        suggestion=_suggestion(whole, layers.names, groups),
    )


def tree(cosines: Float[Tensor, "n n"]) -> np.ndarray:
    """Average linkage over the distances 1 - cosine, as `scipy.cluster.hierarchy` writes it: [n-1, 4]."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    distances = (1 - cosines.nan_to_num(0.0)).clamp(min=0).fill_diagonal_(0)
    return linkage(squareform(distances.numpy(), checks=False), "average")


def agreeing_groups(cosines: Float[Tensor, "n n"], names: Sequence[str]) -> list[list[str]]:
    """Clusters of adapters whose mean cosine is at least `AGREE`; an adapter that agrees with none is its own."""
    from scipy.cluster.hierarchy import fcluster

    groups: dict[int, list[str]] = {}
    for label, name in zip(fcluster(tree(cosines), 1 - AGREE, "distance"), names, strict=True):
        groups.setdefault(int(label), []).append(name)
    return list(groups.values())


def effective_rank(S: Float[Tensor, " r"]) -> float:
    """exp of the entropy of p = S / sum S (Roy and Vetterli, 2007); NaN of a zero matrix."""
    return float(torch.special.entr(S / S.sum()).sum().exp()) if S.sum() > 0 else math.nan


class _Measured(NamedTuple):
    """What is added up or averaged over layers before it is compared."""

    gram: Tensor
    both: Tensor
    opposed: Tensor
    inputs: Tensor
    outputs: Tensor
    effective_ranks: Tensor
    effective_rank_of_sum: Tensor

    def comparison(self, weights: Tensor) -> Comparison:
        norms = self.gram.diagonal().clamp(min=0).sqrt()
        parts = norms * weights.abs()
        merged = (weights @ self.gram @ weights).clamp(min=0).sqrt()
        return Comparison(
            norms=norms,
            cosines=(self.gram / norms / norms[:, None]).clamp(-1, 1),
            **{f"input_{name}": of for name, of in zip(Spaces._fields, self.inputs, strict=True)},
            **{f"output_{name}": of for name, of in zip(Spaces._fields, self.outputs, strict=True)},
            sign_conflict=self.opposed / self.both,
            effective_ranks=self.effective_ranks,
            effective_rank_of_sum=float(self.effective_rank_of_sum),
            cancellation=float(1 - merged / parts.sum()),
            cancellation_if_orthogonal=float(1 - parts.norm() / parts.sum()),
        )


def _measure(updates: Sequence[LowRank], weights: Tensor, drawn: torch.Generator) -> _Measured:
    spectra = [_directions(update) for update in updates]
    total = stack([update.scaled(float(w)) for update, w in zip(updates, weights, strict=True)])
    both, opposed = _signs(updates, drawn)
    return _Measured(
        gram=gram(updates),
        both=both,
        opposed=opposed,
        inputs=torch.stack(compared_spaces([found.V for found in spectra])),
        outputs=torch.stack(compared_spaces([found.U for found in spectra])),
        effective_ranks=torch.tensor([effective_rank(found.S) for found in spectra], dtype=torch.float64),
        effective_rank_of_sum=torch.tensor(effective_rank(svd(total).S), dtype=torch.float64),
    )


def _over_all(layers: Sequence[_Measured]) -> _Measured:
    """Grams and counts of signs added up, the rest as a mean over the layers where it is defined."""
    columns = [torch.stack(column) for column in zip(*layers, strict=True)]
    return _Measured(*(column.sum(0) for column in columns[:3]), *(column.nanmean(0) for column in columns[3:]))


def _directions(update: LowRank) -> SVD:
    """The thin SVD without the directions of singular value zero, which are arbitrary."""
    U, S, V = svd(update)
    kept = NUMERICAL_RANK_TOLERANCE * S[:1] < S
    return SVD(U[:, kept], S[kept], V[:, kept])


def _signs(updates: Sequence[LowRank], drawn: torch.Generator) -> tuple[Tensor, Tensor]:
    """[n, n] number of entries that two adapters both change, and of those they change in opposite directions."""
    size = updates[0].shape
    rows, columns = (torch.randperm(d, generator=drawn)[:SAMPLED] if d > SAMPLED else slice(None) for d in size)
    signs = torch.stack([(u.B[rows] @ u.A[:, columns]).sign().flatten().to(torch.float32) for u in updates])
    changed = signs.abs()
    both = (changed @ changed.T).to(torch.float64)  # exact: float32 counts up to 2^24
    opposed = (both - signs @ signs.T) / 2
    return both * (math.prod(size) / signs.shape[1]), opposed * (math.prod(size) / signs.shape[1])


def _suggestion(whole: Comparison, names: Sequence[str], groups: Sequence[Sequence[str]]) -> str:
    said = []
    for group in (group for group in groups if len(group) > 1):
        pairs = [float(whole.cosines[names.index(a), names.index(b)]) for a, b in combinations(group, 2)]
        said.append(f"{_listed(group)} agree (mean cosine {sum(pairs) / len(pairs):.2f}): merge them")
    opposed = [(a, b) for a, b in combinations(range(len(names)), 2) if whole.cosines[a, b] < -AGREE]
    for a, b in opposed:
        said.append(f"{names[a]} and {names[b]} conflict (cosine {whole.cosines[a, b]:.2f}): route or keep them apart")
    if idle := [name for name, norm in zip(names, whole.norms, strict=True) if norm == 0]:
        said.append(f"{_listed(idle)} {'changes' if len(idle) == 1 else 'change'} nothing: leave out")
    explained = {*idle, *(names[index] for pair in opposed for index in pair)}
    if alone := [group[0] for group in groups if len(group) == 1 and group[0] not in explained]:
        with_whom = f"with {_listed(alone)}" if len(alone) < len(names) else "with another"
        said.append(f"no adapter agrees {with_whom}: a mean fades each, so sum or route")
    return "; ".join(said)


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _plain(value: Any) -> Any:
    if isinstance(value, Geometry | Comparison):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value

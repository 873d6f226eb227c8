"""Which rank each layer of a merge should have, from the singular values of the weighted sum there."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from moa.low_rank import stack, svd
from moa.merging.layers import Layers


@dataclass(frozen=True)
class RankRule:
    """How to choose ranks.

    Attributes:
        energy: keep the fewest singular values that hold this share of sum_j S_j^2.
    """

    energy: float = 0.99

    def __post_init__(self):
        if not 0 < self.energy <= 1:
            raise ValueError(
                f"energy is the share of the squared singular values to keep, in (0, 1], got {self.energy}"
            )


def chosen_ranks(layers: Layers, rule: RankRule, most: Mapping[str, int]) -> dict[str, int]:
    """The rank of each layer by the rule, from 1 to `most`."""
    spectra = {module: _spectrum(layers, module) for module, _ in layers.streamed("choosing ranks")}
    return {module: min(most[module], _by_energy(S, rule.energy)) for module, S in spectra.items()}


def _spectrum(layers: Layers, module: str) -> Tensor:
    return svd(stack([u.scaled(float(w)) for u, w in zip(layers[module], layers.weights, strict=True)])).S


def _by_energy(S: Tensor, energy: float) -> int:
    shares = S.square().cumsum(0)
    return max(1, int((shares < energy * shares[-1]).sum()) + 1) if shares.numel() and shares[-1] > 0 else 1

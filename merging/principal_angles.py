"""What two adapters have in common of the directions that they read, or write: the principal angles between them.

Björck and Golub, Numerical methods for computing angles between linear subspaces, 1973.
"""

from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Spaces(NamedTuple):
    """n subspaces against each other; NaN where one of them is empty.

    Attributes:
        overlap: sum_k cos^2(theta_k) / min(r_i, r_j) over the principal angles theta_k: 1 when one space holds the
            other, about max(r_i, r_j) / d by chance.
        mean_angle: of the min(r_i, r_j) principal angles, in degrees: 0 when one space holds the other, 90 when they
            have nothing in common.
        largest_angle: the largest of them, in degrees: how far the direction that is shared least is from the other
            space.
    """

    overlap: Float[Tensor, "n n"]
    mean_angle: Float[Tensor, "n n"]
    largest_angle: Float[Tensor, "n n"]


def compared_spaces(bases: Sequence[Float[Tensor, "d _"]]) -> Spaces:
    """Compare the column spaces of orthonormal bases, each with each.

    The cosines of the principal angles are the singular values of Q_i^T Q_j, so that angles below 1e-5 degrees are
    rounding.
    """
    found = Spaces(*torch.full((3, len(bases), len(bases)), torch.nan, dtype=torch.float64))
    for i, j in combinations_with_replacement(range(len(bases)), 2):
        cosines = torch.linalg.svdvals(bases[i].T @ bases[j]).clamp(max=1)
        if len(cosines):
            angles = cosines.arccos().rad2deg()
            for of, value in zip(found, (cosines.square().mean(), angles.mean(), angles.max()), strict=True):
                of[i, j] = of[j, i] = value
    return found

"""Training prompts that look like another task's: reported, never dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

FOLDS = 5


@dataclass(frozen=True)
class LabelNoise:
    """What looks mislabelled among the training prompts.

    Attributes:
        checked: how many prompts were looked at.
        suspects: their places, for each task that has some.
        unchecked: tasks with a single prompt, which nothing can be held against.
    """

    checked: int
    suspects: dict[str, list[int]]
    unchecked: list[str]

    @property
    def share(self) -> float:
        """Suspects among the prompts that were looked at."""
        return sum(map(len, self.suspects.values())) / max(1, self.checked)


def find_label_noise(
    features: Float[Tensor, "prompts hidden"],
    labels: Int[Tensor, " prompts"],
    names: Sequence[str],
    *,
    confidence: float = 0.9,
    seed: int = 0,
) -> LabelNoise:
    """Prompts for which a classifier that has not seen them is sure of another task.

    A logistic regression is fitted on the other folds (Northcutt et al. 2021, arXiv:1911.00068, use the same
    out-of-sample probabilities).

    Args:
        labels: index in `names` of each prompt's task.
        confidence: how likely it must find the other task.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    counts = labels.bincount(minlength=len(names))
    unchecked = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 1]
    kept = (counts[labels] > 1).nonzero().flatten()
    if len(labels[kept].unique()) < 2:
        return LabelNoise(0, {}, list(names))
    folds = StratifiedKFold(min(FOLDS, int(counts[counts > 1].min())), shuffle=True, random_state=seed)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    chances = torch.from_numpy(
        cross_val_predict(classifier, features[kept].numpy(), labels[kept].numpy(), cv=folds, method="predict_proba")
    )
    best, found = chances.max(dim=-1)
    guessed = labels[kept].unique()[found]
    strange = kept[(guessed != labels[kept]) & (best >= confidence)]
    suspects = {
        name: of_task for place, name in enumerate(names) if (of_task := strange[labels[strange] == place].tolist())
    }
    return LabelNoise(len(kept), suspects, unchecked)

"""What each adapter of a mixture is worth on the tasks of the others, measured in mixed batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moa.adapters import from_model
from moa.evaluation.clusters import agreement, cosines, gains_kept
from moa.evaluation.kept import Kept
from moa.evaluation.systems import experts_fingerprint
from moa.model import MoaModel
from moa.model_objective import ModelObjective
from moa.tasks import Example


def measure_agreement(
    model: MoaModel,
    tokenizer: PreTrainedTokenizerBase,
    validation: Mapping[str, Sequence[Example]],
    kept: Kept,
    geometry_share: float,
) -> dict[str, Float[Tensor, "rows columns"]]:
    """How much every two experts agree, and what that comes from; see `moa.evaluation.clusters`.

    Returns:
        `cosines`; `nll`, `[experts + 1, tasks]`, of each expert's answers to each task's rows and in the last row the
        base model's, all in mixed batches; `gains_kept`; and `agreement`.
    """
    objective = ModelObjective(model, tokenizer, validation)
    gates = torch.cat([torch.eye(len(model.experts)), torch.zeros(1, len(model.experts))])

    def measure() -> dict[str, Any]:
        tasks = track(
            torch.eye(len(validation)), "answers of every expert", console=Console(stderr=True), transient=True
        )
        return {"nll": torch.stack([objective.losses(gates, of_task) for of_task in tasks], dim=1).tolist()}

    question = [experts_fingerprint(model), objective.describe()["examples"]]
    nll = torch.tensor(kept.get("cross-task", question, measure)["nll"], dtype=torch.float64)
    tasks = list(validation)
    own = [tasks.index(name) if name in tasks else None for name in model.experts]
    angles = cosines([from_model(model, name) for name in model.experts])
    gains = gains_kept(nll[:-1], nll[-1], own)
    return {
        "cosines": angles,
        "nll": nll,
        "gains_kept": gains,
        "agreement": agreement(angles, gains, geometry_share),
    }

"""The Trainer of a router: on cached features, to a share of the experts or to what their mixture answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer

from moa.answer_losses import cross_entropy
from moa.answer_rows import Row, predict
from moa.router import SequenceRouter

if TYPE_CHECKING:
    from moa.model import MoaModel


class FeatureDataset(Dataset):
    """Prompts as the router reads them, and which experts each should go to.

    Args:
        features: pooled, `[prompts, hidden]`, or the states of each prompt's tokens, `[tokens, hidden]`.
        targets: the share of each expert; one-hot where there is one right expert.
        rows: the whole examples, where the loss is on their answers.
    """

    def __init__(
        self,
        features: Sequence[Tensor] | Tensor,
        targets: Float[Tensor, "prompts experts"],
        rows: Sequence[Row] | None = None,
    ):
        self.features, self.targets, self.rows = features, targets, rows

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {} if self.rows is None else {"rows": self.rows[index]}
        return {"features": self.features[index], "labels": self.targets[index], **row}


def collate(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of a `FeatureDataset`: token states are padded, and a `mask` says which are real."""
    features = [prompt["features"] for prompt in prompts]
    batch: dict[str, Any] = {"labels": torch.stack([prompt["labels"] for prompt in prompts])}
    if features[0].dim() == 1:
        batch["features"] = torch.stack(features)
    else:
        batch["features"] = pad_sequence(features, batch_first=True)
        batch["mask"] = pad_sequence([torch.ones(len(f), dtype=torch.bool) for f in features], batch_first=True)
    if "rows" in prompts[0]:
        batch["rows"] = [prompt["rows"] for prompt in prompts]
    return batch


class RouterTrainer(Trainer):
    """Trains a `SequenceRouter` on a `FeatureDataset`.

    The loss is the cross-entropy to the targets. With a `mixture`, it is that of the answers which the frozen mixture
    gives under the router's soft weights; what the router reads comes before any expert, so its features stay cached.

    Args:
        mixture: holds the experts; None trains to the targets.
        padding: id of the padding token.
    """

    def __init__(self, *args: Any, mixture: MoaModel | None = None, padding: int = 0, **kwargs: Any):
        super().__init__(*args, data_collator=collate, compute_metrics=routing_accuracy, **kwargs)
        self.mixture, self.padding = mixture, padding
        self.label_names = ["labels"]  # the Trainer looks for them in the model's forward, which takes features only

    def compute_loss(
        self,
        model: SequenceRouter,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        logits = model(inputs["features"], inputs.get("mask"))
        if self.mixture is None:
            loss = F.cross_entropy(logits, inputs["labels"], label_smoothing=self.args.label_smoothing_factor)
        else:
            loss = answers_loss(self.mixture, inputs["rows"], logits.softmax(dim=-1), self.padding)
        return (loss, {"logits": logits}) if return_outputs else loss


def answers_loss(
    mixture: MoaModel, rows: Sequence[Row], weights: Float[Tensor, "batch experts"], padding: int
) -> Float[Tensor, ""]:
    """-log p(answer) under these weights of the experts, mean over its tokens, then over the rows, in nats."""
    with mixture.route_state.gated(weights.to(mixture.device)):
        return cross_entropy(predict(mixture, rows, padding)).mean()


def routing_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of prompts that the router sends to the expert with the largest share in their target."""
    chosen, right = prediction.predictions.argmax(axis=-1), prediction.label_ids.argmax(axis=-1)
    return {"accuracy": float((chosen == right).mean())}

"""The two trainers: hooks of transformers' and TRL's own, no loop of ours."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import EvalPrediction, PreTrainedModel, Trainer
from trl import SFTTrainer

from moa.router import SequenceRouter


class LoraTrainer(SFTTrainer):
    """TRL's SFTTrainer, which on a CPU computes logits only where an answer is.

    TRL scores every position there and masks the prompt's afterwards; with a vocabulary of 50 000 and short answers
    that is a third of the training time. On a GPU its kernel leaves the prompt out by itself. No telemetry is sent.
    """

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        if inputs["input_ids"].device.type != "cpu" or self.args.loss_type != "nll":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        positions = answer_positions(labels)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**rest, use_cache=False, logits_to_keep=positions)
        total = F.cross_entropy(outputs.logits.float().transpose(1, 2), labels[:, positions + 1], reduction="sum")
        loss = total / (labels[:, 1:].ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # it counts every process's tokens, and DDP averages
        return (loss, outputs) if return_outputs else loss

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """PEFT has written one; TRL's would replace it by one that links to a model called None."""

    def _send_telemetry(self) -> None:
        return


def answer_positions(labels: Int[Tensor, "batch tokens"]) -> Int[Tensor, " kept"]:
    """The positions that predict an answer token in some row of the batch; labels of the prompt are -100."""
    return labels[:, 1:].ne(-100).any(dim=0).nonzero().flatten()


class RouterTrainer(Trainer):
    """Trains a `SequenceRouter` on `features` with cross-entropy on the index of the task, in `labels`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.label_names = ["labels"]  # the Trainer looks for them in the model's forward, which takes features only

    def compute_loss(
        self,
        model: SequenceRouter,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        logits = model(inputs["features"])
        loss = router_loss(logits, inputs["labels"], self.args.label_smoothing_factor)
        return (loss, {"logits": logits}) if return_outputs else loss


def router_loss(
    logits: Float[Tensor, "batch experts"], labels: Int[Tensor, " batch"], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Cross-entropy between the router's choice and the index of each prompt's task, in nats."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def routing_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of prompts that the router sends to their own task's expert."""
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}

"""The trainer of one adapter: hooks of TRL's own, no loop of ours."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer


class LoraTrainer(SFTTrainer):
    """TRL's SFTTrainer, which on a CPU computes logits only where an answer is.

    TRL scores every position there and masks the prompt's afterwards; with a vocabulary of 50 000 and short answers
    that is a third of the training time. On a GPU its kernel leaves the prompt out by itself. No telemetry is sent.

    Rows longer than `max_length` are cut with `padding_free` too, which TRL refuses together although its preparation
    of the rows cuts them just the same. Rows without padding never use a cache: with one, transformers' mask would
    let a sequence see those before it.
    """

    def __init__(self, model: PreTrainedModel, args: SFTConfig, **kwargs: Any):
        self.cut_at = args.max_length
        if args.padding_free and not args.packing:
            args = copy.copy(args)
            args.max_length = None
        super().__init__(model, args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: SFTConfig, *rest: Any) -> Any:
        args = copy.copy(args)
        args.max_length = self.cut_at
        return super()._prepare_dataset(dataset, processing_class, args, *rest)

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
        tokens = labels[:, 1:].ne(-100).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = total / tokens.clamp(min=1)  # a packed row may hold no answer
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

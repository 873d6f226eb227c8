"""Sums over routed sequences, which add up over batches and processes, and the metrics that they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moa.calibration import BINS, reliability
from moa.config import FALLBACK
from moa.routing import Routing

UNKNOWN = -100  # the task of a row that belongs to no expert, as labels mark what has no loss


@dataclass
class RoutingTally:
    """Routed sequences, counted.

    Its sums are one vector, so that one reduction serves all processes: sequences, entropy, then count, confidence
    and hits of labelled sequences in each of `BINS` equal bins of confidence, then the weight of each expert and of
    the fallback.
    """

    total: Float[Tensor, " sums"] | None = None

    def add(self, routing: Routing, task: Int[Tensor, " batch"] | None = None) -> None:
        """Count the sequences of one forward; a task of -100 is unknown."""
        logits = routing.logits.detach().float()
        weights = routing.weights.detach().to(logits)
        probabilities = logits.softmax(dim=-1)
        entropy = torch.special.entr(probabilities).sum()
        head = torch.stack([entropy.new_tensor(float(len(logits))), entropy])
        weights = weights.reshape(-1, weights.shape[-1])
        use = F.pad(weights.mean(dim=0) * len(logits), (0, logits.shape[-1] + 1 - weights.shape[-1]))
        sums = torch.cat([head, _calibration(probabilities, task), use])
        self.total = sums if self.total is None else self.total + sums

    def sums(self, experts: int) -> Float[Tensor, " sums"]:
        """Zeros where nothing was counted, so that every process has something to add up."""
        return torch.zeros(2 + 3 * BINS + experts + 1) if self.total is None else self.total

    def clear(self) -> None:
        self.total = None

    @staticmethod
    def metrics(sums: Float[Tensor, " sums"], experts: Sequence[str]) -> dict[str, float]:
        """What the sums say; nothing where no sequence was routed, no accuracy where no task was named."""
        sequences, entropy = sums[:2].tolist()
        if not sequences:
            return {}
        count, confidence, hits = sums[2 : 2 + 3 * BINS].view(3, BINS)
        told = {"routing_entropy": entropy / sequences}
        labelled = float(count.sum())
        if labelled:
            told["routing_accuracy"] = float(hits.sum()) / labelled
            told["routing_calibration_error"] = float((confidence - hits).abs().sum()) / labelled
        *use, fallback = (sums[2 + 3 * BINS :] / sequences).tolist()
        told |= {f"routing_use_{name}": share for name, share in zip(experts, use, strict=True)}
        return told | ({f"routing_use_{FALLBACK}": fallback} if fallback else {})


def _calibration(
    probabilities: Float[Tensor, "batch experts"], task: Int[Tensor, " batch"] | None
) -> Float[Tensor, " sums"]:
    if task is None:
        return probabilities.new_zeros(3 * BINS)
    task = task.to(probabilities.device)
    known = task.ne(UNKNOWN)
    confidence, chosen = probabilities[known].max(dim=-1)
    return reliability(confidence, chosen.eq(task[known])).flatten()

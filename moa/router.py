"""The sequence-level router: a classifier over the base model's own hidden states.

The prompt's hidden states entering layer k of the base model are averaged over its tokens, standardised with the
statistics of the training prompts, and classified by one linear layer; a temperature fitted on held-out prompts
makes the probabilities honest.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class SequenceRouter(nn.Module):
    """Pooled hidden state -> logits over the experts.

        logits = (W (h - mean) / std + b) / temperature

    Args:
        hidden_size: width of the base model.
        num_experts: number of experts, in the order of the mixture's names.
    """

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.head = nn.Linear(hidden_size, num_experts)
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("std", torch.ones(hidden_size))
        self.register_buffer("temperature", torch.ones(()))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def standardise(self, features: Float[Tensor, "prompts hidden"]) -> None:
        """Take mean and standard deviation from the training prompts."""
        self.mean.copy_(features.mean(dim=0))
        self.std.copy_(features.std(dim=0).clamp_min(1e-6))

    def forward(self, features: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch experts"]:
        standardised = (features.to(self.mean.dtype) - self.mean) / self.std
        return self.head(standardised) / self.temperature

    @torch.no_grad()
    def accuracy(self, features: Float[Tensor, "prompts hidden"], labels: Int[Tensor, " prompts"]) -> float:
        """Share of the prompts whose best expert is their own."""
        return float((self(features).argmax(dim=-1) == labels).float().mean())

    @torch.no_grad()
    def calibrate(self, features: Float[Tensor, "prompts hidden"], labels: Int[Tensor, " prompts"]) -> float:
        """Fit the temperature on held-out prompts by their likelihood (Guo et al. 2017, arXiv:1706.04599).

        Prompts that are all classified rightly would drive the temperature to zero, so it is kept in [0.05, 20].
        """
        from scipy.optimize import minimize_scalar

        self.temperature.fill_(1.0)
        logits = self(features)

        def loss(log_temperature: float) -> float:
            return nn.functional.cross_entropy(logits / float(torch.tensor(log_temperature).exp()), labels).item()

        best = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x
        self.temperature.fill_(float(torch.tensor(best).exp()))
        return float(self.temperature)


def mean_pool(
    hidden: Float[Tensor, "batch tokens hidden"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch hidden"]:
    """Average over the masked tokens of each sequence, in fp32.

    Raises:
        ValueError: a sequence without a single prompt token.
    """
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"sequence {empty[0]} of the batch has no prompt token to route on: give it a prompt")
    share = mask.unsqueeze(-1).float()
    return (hidden.float() * share).sum(dim=1) / share.sum(dim=1)

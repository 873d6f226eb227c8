"""The sequence-level router: a classifier over the base model's own hidden states.

The prompt's hidden states entering layer k of the base model are pooled over its tokens, standardised with the
statistics of the training prompts, and classified by a small head; a temperature fitted on held-out prompts makes the
probabilities honest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Pooling = Literal["mean", "last", "attention"]
Head = Literal["centroid", "linear", "mlp"]


class SequenceRouter(nn.Module):
    """Pooled hidden state -> logits over the experts.

        logits = head((h - mean) / std) / temperature

    The heads: `centroid` is as near as a prompt is to the mean of each expert's prompts, and has nothing to train;
    `linear` is one linear layer; `mlp` has one hidden layer.

    Args:
        hidden_size: width of the base model.
        num_experts: number of experts, in the order of the mixture's names.
        pooling: `mean` over the prompt's tokens; its `last` token; `attention` of one learned query to its tokens.
        head: `centroid`, `linear` or `mlp`.
        hidden_units: width of the hidden layer of `mlp`; other heads have none.
        clusters: expert of each of the head's outputs, where several outputs share one; None: each has its own.

    Attributes:
        others: routers at other depths, by the layer that they read; see `moa.depths`.
        detector: scores how unlike the training prompts a pooled prompt is; None where nobody fitted one.

    Raises:
        ValueError: a pooling or a head that does not exist, or an `mlp` without hidden units.
    """

    detector: nn.Module | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        pooling: Pooling = "mean",
        head: Head = "linear",
        hidden_units: int | None = None,
        clusters: Sequence[int] | None = None,
    ):
        super().__init__()
        check_architecture(pooling, head, hidden_units)
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.pooling, self.head_kind, self.hidden_units = pooling, head, hidden_units
        self.clusters = None if clusters is None else list(clusters)
        last = nn.Linear(hidden_units or hidden_size, num_experts if clusters is None else len(clusters))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(hidden_size, hidden_units), nn.GELU(), last) if head == "mlp" else last
        self.query = nn.Parameter(torch.zeros(hidden_size)) if pooling == "attention" else None
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("std", torch.ones(hidden_size))
        self.register_buffer("temperature", torch.ones(()))
        self.others = nn.ModuleDict()
        self.detector = None

    def forward(
        self,
        features: Float[Tensor, "batch *tokens hidden"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch experts"]:
        """The calibrated logits.

        Args:
            features: pooled prompts, or with a `mask` the states of their tokens, which are pooled first.
        """
        pooled = features if mask is None else self.pool(features, mask)
        logits = self.head(self.standardised(pooled)) / self.temperature
        if self.clusters is None:
            return logits
        members = torch.tensor(self.clusters, device=logits.device)
        others = members != torch.arange(self.num_experts, device=logits.device)[:, None]
        return logits.unsqueeze(1).masked_fill(others, -torch.inf).logsumexp(dim=-1)

    def folded(self, clusters: Sequence[int]) -> SequenceRouter:
        """This router over clusters of its experts: a cluster is as probable as its members together.

        p(c) = sum_{i in c} p(i), so log p(c) is the logsumexp of the members' logits, up to what all clusters share.

        Args:
            clusters: cluster of each expert, numbered from 0 without gaps.

        Raises:
            ValueError: not one cluster for each expert, or a cluster without a member.
        """
        if len(clusters) != self.num_experts or set(clusters) != set(range(max(clusters) + 1)):
            raise ValueError(
                f"clusters are numbered from 0 without gaps, one for each of {self.num_experts} experts: "
                f"got {list(clusters)}"
            )
        folded = copy.deepcopy(self)
        folded.clusters = [clusters[expert] for expert in self.clusters or range(self.num_experts)]
        folded.num_experts = max(clusters) + 1
        folded.others = nn.ModuleDict({depth: other.folded(clusters) for depth, other in self.others.items()})
        return folded

    def pool(
        self, states: Float[Tensor, "batch tokens hidden"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch hidden"]:
        """One feature for each prompt, in fp32, from the states of its tokens; each has some (`prompt_tokens`)."""
        if self.query is not None:
            return attention_pool(states, mask, self.query)
        return POOLINGS[self.pooling](states, mask)

    def standardised(self, pooled: Float[Tensor, "batch hidden"]) -> Float[Tensor, "batch hidden"]:
        return (pooled.to(self.mean.dtype) - self.mean) / self.std

    def standardise(self, features: Float[Tensor, "prompts hidden"]) -> None:
        """Take mean and standard deviation from the training prompts."""
        self.mean.copy_(features.mean(dim=0))
        std = features.std(dim=0, correction=0)
        self.std.copy_(std.masked_fill(std < 1e-6, 1.0))  # what never varied in training must not decide later

    @torch.no_grad()
    def fit_centroids(
        self, features: Float[Tensor, "prompts hidden"], targets: Float[Tensor, "prompts experts"]
    ) -> None:
        """Set a `centroid` head from pooled prompts: logits are -|z - c_i|^2 / 2, less what all experts share.

        z is a standardised prompt, c_i the mean of those of expert i, weighted by the share of `targets` that is its.
        """
        centroids = F.normalize(targets.T, p=1, dim=1) @ self.standardised(features)
        self.head.weight.copy_(centroids)
        self.head.bias.copy_(-centroids.square().sum(dim=1) / 2)

    @torch.no_grad()
    def calibrate(
        self,
        features: Float[Tensor, "prompts hidden"],
        targets: Int[Tensor, " prompts"] | Float[Tensor, "prompts experts"],
    ) -> float:
        """Fit the temperature on held-out prompts by their likelihood (Guo et al. 2017, arXiv:1706.04599).

        Prompts that are all classified rightly would drive the temperature to zero; it is kept within a factor of 20
        of the one at which the logits of a prompt have a standard deviation of 1, since heads differ in scale.
        """
        from scipy.optimize import minimize_scalar

        self.temperature.fill_(1.0)
        logits = self(features)
        scale = float(logits.std(dim=-1).mean()) or 1.0

        def loss(log_temperature: float) -> float:
            return F.cross_entropy(logits / (scale * float(torch.tensor(log_temperature).exp())), targets).item()

        best = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x
        self.temperature.fill_(scale * float(torch.tensor(best).exp()))
        return float(self.temperature)


def check_architecture(pooling: str, head: str, hidden_units: int | None) -> None:
    """Refuse a pooling or a head that does not exist, and hidden units that the head lacks or cannot have."""
    for option, value, known in (("pooling", pooling, get_args(Pooling)), ("head", head, get_args(Head))):
        if value not in known:
            raise ValueError(f"the router's {option} {value!r} does not exist: choose one of {', '.join(known)}")
    if (head == "mlp") != bool(hidden_units):
        raise ValueError(f"hidden units are the mlp head's, and only its: got hidden_units={hidden_units} for {head}")


def mean_pool(
    states: Float[Tensor, "batch tokens hidden"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch hidden"]:
    """Average over the masked tokens of each sequence, of which it has some, in fp32."""
    share = mask.unsqueeze(-1).float()
    return (states.float() * share).sum(dim=1) / share.sum(dim=1)


def last_pool(
    states: Float[Tensor, "batch tokens hidden"], mask: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch hidden"]:
    """The last masked token of each sequence, in fp32."""
    position = torch.arange(mask.shape[1], device=mask.device)
    last = (position * mask).argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), last].float()


def attention_pool(
    states: Float[Tensor, "batch tokens hidden"],
    mask: Bool[Tensor, "batch tokens"],
    query: Float[Tensor, " hidden"],
) -> Float[Tensor, "batch hidden"]:
    """sum_t a_t h_t with a = softmax over the masked tokens of LayerNorm(h_t) . q / sqrt(hidden), in fp32.

    A query of zeros is the mean.
    """
    states = states.float()
    scores = F.layer_norm(states, query.shape) @ query.float() / query.numel() ** 0.5
    attention = scores.masked_fill(~mask, -torch.inf).softmax(dim=1)
    return (attention.unsqueeze(-1) * states).sum(dim=1)


POOLINGS = {"mean": mean_pool, "last": last_pool}
"""The poolings that have nothing to learn, so that their features can be computed once for all."""

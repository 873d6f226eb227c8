"""Losses of what a model predicts where answers are: how likely they are, how sure it is, how far from another."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor


class Predicted(NamedTuple):
    """What a model predicts where the answers are; answers end together, at the last position.

    Attributes:
        logprobs: of every token of the vocabulary.
        ids: the answers' own tokens.
        real: which positions are of an answer.
    """

    logprobs: Float[Tensor, "rows answer vocabulary"]
    ids: Int[Tensor, "rows answer"]
    real: Bool[Tensor, "rows answer"]


def cross_entropy(predicted: Predicted) -> Float[Tensor, " rows"]:
    """-log p(answer), mean over its tokens, in nats."""
    logprobs, ids, real = predicted
    return _mean(-logprobs.gather(-1, ids[..., None]).squeeze(-1), real)


def entropy(predicted: Predicted) -> Float[Tensor, " rows"]:
    """H(p) = -sum p log p, mean over the answer's tokens, in nats."""
    return _mean(-(predicted.logprobs.exp() * predicted.logprobs).sum(dim=-1), predicted.real)


def divergence(p: Predicted, q: Predicted) -> Float[Tensor, " rows"]:
    """KL(p || q), mean over the answer's tokens, in nats."""
    return _mean((p.logprobs.exp() * (p.logprobs - q.logprobs)).sum(dim=-1), p.real)


def _mean(values: Float[Tensor, "rows answer"], real: Bool[Tensor, "rows answer"]) -> Float[Tensor, " rows"]:
    return (values * real).sum(dim=1) / real.sum(dim=1)

"""Which layer, pooling and head a router should have: each is fitted, and held-out prompts choose."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Bool, Float, Int
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from transformers import PrinterCallback, TrainingArguments, set_seed

from moa.router import Head, Pooling, SequenceRouter
from moa.training.prompt_features import PromptFeatures
from moa.training.router_trainer import FeatureDataset, RouterTrainer

NEGLIGIBLE = 1e-3
"""Nats between two mean losses that no user would notice."""

SIMPLEST_FIRST = (*get_args(Head), *get_args(Pooling))


@dataclass(frozen=True)
class Candidate:
    """A router that could be fitted: it reads the pooled hidden state entering `layer`."""

    layer: int
    pooling: Pooling
    head: Head


@dataclass(frozen=True)
class Judged:
    """A candidate on held-out prompts.

    Attributes:
        chosen: index of the expert that it chooses for each prompt.
        right: whether that is the one with the largest share in the prompt's target.
        losses: cross-entropy to each prompt's target after calibration, in nats.
        temperature: the calibrated one.
    """

    candidate: Candidate
    chosen: Int[Tensor, " prompts"]
    right: Bool[Tensor, " prompts"]
    losses: Float[Tensor, " prompts"]
    temperature: float

    @property
    def accuracy(self) -> float:
        return float(self.right.float().mean())

    @property
    def nll(self) -> float:
        return float(self.losses.mean())

    @property
    def diverged(self) -> bool:
        """Whether its training left numbers that are not finite."""
        return not self.losses.isfinite().all()


@dataclass(frozen=True)
class Split:
    """Prompts with the share that each expert should have of them."""

    features: PromptFeatures
    targets: Float[Tensor, "prompts experts"]

    def dataset(self, layer: int, pooling: Pooling) -> FeatureDataset:
        """What a router at this layer is trained on: pooled features, or the states that it learns to pool."""
        learned = pooling == "attention"
        return FeatureDataset(
            self.features.states(layer) if learned else self.features.pooled(layer, pooling), self.targets
        )

    @torch.no_grad()
    def pooled(self, router: SequenceRouter, layer: int) -> Float[Tensor, "prompts hidden"]:
        """What the router's head reads, on the CPU."""
        if router.pooling != "attention":
            return self.features.pooled(layer, router.pooling)
        states = self.features.states(layer)
        return torch.cat([router.pool(one[None], torch.ones(1, len(one), dtype=torch.bool)) for one in states])


def new_router(candidate: Candidate, seen: Split, hidden_units: int, seed: int) -> SequenceRouter:
    """The candidate before its training; a `centroid` head has none and is ready."""
    set_seed(seed)
    start = "mean" if candidate.pooling == "attention" else candidate.pooling  # where attention starts from
    features = seen.features.pooled(candidate.layer, start)
    router = SequenceRouter(
        features.shape[1],
        seen.targets.shape[1],
        pooling=candidate.pooling,
        head=candidate.head,
        hidden_units=hidden_units if candidate.head == "mlp" else None,
    )
    router.standardise(features)
    if candidate.head == "centroid":
        router.fit_centroids(features, seen.targets)
    return router


def compare(
    candidates: Sequence[Candidate], seen: Split, unseen: Split, hidden_units: int, training: TrainingArguments
) -> list[Judged]:
    """Fit each candidate as the winner will be, without checkpoints and logs, and judge it; the cheapest come first.

    Once one is `unbeatable` the others, which cost more, are left out, and one that diverges is, with a warning.
    """
    judged = []
    for candidate in track(sorted(candidates, key=_cost), description="comparing routers", transient=True):
        found = judge(candidate, quietly_fitted(candidate, seen, hidden_units, training), unseen)
        if found.diverged:
            warnings.warn(f"{diverged(candidate)}: it is left out", stacklevel=2)
            continue
        judged.append(found)
        if unbeatable(found):
            break
    return judged


def diverged(candidate: Candidate) -> str:
    """What happened to a router whose training left no numbers."""
    return f"the training of the {candidate.head} router ({candidate.pooling}, layer {candidate.layer}) diverged"


def quietly_fitted(
    candidate: Candidate, seen: Split, hidden_units: int, training: TrainingArguments
) -> SequenceRouter:
    """The candidate after its training, without checkpoints and logs; not calibrated."""
    quiet = replace(
        training,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        load_best_model_at_end=False,
    )
    router = new_router(candidate, seen, hidden_units, training.seed)
    if candidate.head != "centroid":
        dataset = seen.dataset(candidate.layer, candidate.pooling)
        trainer = RouterTrainer(model=router, args=quiet, train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return router.cpu()


@torch.no_grad()
def judge(candidate: Candidate, router: SequenceRouter, unseen: Split) -> Judged:
    """Calibrate the router on held-out prompts, and say how it does on them."""
    router.eval()
    features = unseen.pooled(router, candidate.layer)
    temperature = router.calibrate(features, unseen.targets)
    logits = router(features)
    chosen = logits.argmax(dim=-1)
    return Judged(
        candidate,
        chosen=chosen,
        right=chosen == unseen.targets.argmax(dim=-1),
        losses=F.cross_entropy(logits, unseen.targets, reduction="none"),
        temperature=temperature,
    )


def unbeatable(judged: Judged) -> bool:
    """Whether it is right on every held-out prompt, and so sure of it that no other could noticeably be better."""
    return judged.accuracy == 1 and judged.nll <= NEGLIGIBLE


def best_of(judged: Sequence[Judged]) -> Judged:
    """The most accurate, then the likeliest, then the cheapest.

    Where accuracies lie within two standard errors of their difference on the same prompts, nothing tells routers
    apart; then likelihoods are compared, within one, and at last the layer, the head and the pooling: the shallower
    and simpler one.

    Raises:
        ValueError: none is left, for all diverged.
    """
    if not judged:
        raise ValueError("the training of every router that was compared diverged: lower --learning_rate")
    most = max(judged, key=lambda one: (one.accuracy, -one.nll))
    accurate = [one for one in judged if not _surely_worse(most.right.float() - one.right.float(), 2)]
    likeliest = min(accurate, key=lambda one: one.nll)
    alike = [one for one in accurate if not _surely_worse(one.losses - likeliest.losses)]
    return min(alike, key=lambda one: _cost(one.candidate))


def _surely_worse(difference: Float[Tensor, " prompts"], errors: float = 1) -> bool:
    error = errors * difference.std(correction=0) / len(difference) ** 0.5
    return bool(difference.mean() > error.clamp_min(NEGLIGIBLE))


def _cost(candidate: Candidate) -> tuple[int, int, int]:
    return candidate.layer, SIMPLEST_FIRST.index(candidate.head), SIMPLEST_FIRST.index(candidate.pooling)

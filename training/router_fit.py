"""Fit a router: features once, then every choice of layer, pooling and head, then the best one to the objective."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, TrainingArguments

from moa.answer_rows import Row, tokenised
from moa.config import RouterConfig
from moa.model import MoaModel
from moa.prefix import candidate_layers, check_layer
from moa.router import SequenceRouter
from moa.router_checks import describe_router
from moa.strangeness import Mahalanobis, Score, fit_mahalanobis
from moa.tasks import Example
from moa.training.adapter_losses import losses_of_experts
from moa.training.label_noise import LabelNoise, find_label_noise
from moa.training.prompt_features import PromptFeatures
from moa.training.router_choice import (
    Candidate,
    Judged,
    Split,
    best_of,
    compare,
    diverged,
    judge,
    new_router,
    quietly_fitted,
    unbeatable,
)
from moa.training.router_doubt import Strangeness, with_doubt
from moa.training.router_options import RouterChoices
from moa.training.router_trainer import RouterTrainer

Examples = Sequence[Sequence[Example]]
"""The examples of each expert, in the order of the experts."""


@dataclass(frozen=True)
class FittedRouter:
    """A router and how it came about.

    Attributes:
        router: calibrated, on the CPU.
        config: what it reads and is for.
        judged: on the held-out prompts that also chose it.
        compared: all that it was chosen from.
        depths: the routers at other depths, where layers are routed apart.
        labels: index of the expert whose prompt each held-out one is.
        losses: of each expert's answer to each held-out example as its task writes it, where the objective asked for
            them.
        written: how many of the held-out prompts, which come first, are as their tasks write them; others are plain.
        noise: which training prompts look mislabelled.
        strangeness: of the held-out prompts, under each score that could tell strange ones.
    """

    router: SequenceRouter
    config: RouterConfig
    judged: Judged
    compared: list[Judged]
    depths: list[Judged]
    labels: Int[Tensor, " prompts"]
    losses: Float[Tensor, "written experts"] | None
    written: int
    noise: LabelNoise
    strangeness: dict[Score, Strangeness]


class RouterFit:
    """Everything that the fit of one router shares.

    Args:
        model: holds the experts; a router that it has already is not used.
        fit_on, held_out: the examples of each expert, in the order of the experts.
        plain: both kinds once more with plain prompts, which a router should know too; for each expert the same
            examples in the same order, or none.
        training: of the head; only `language_model` has its own batch size and epochs, in `choices`.

    Raises:
        ValueError: fewer than two experts, or a layer that the model does not have.
    """

    def __init__(
        self,
        model: MoaModel,
        tokenizer: PreTrainedTokenizerBase,
        fit_on: Examples,
        held_out: Examples,
        choices: RouterChoices,
        training: TrainingArguments,
        plain: tuple[Examples, Examples] = ((), ()),
    ):
        check_count(len(fit_on))
        self.written = [sum(map(len, split)) for split in (fit_on, held_out)]
        pairs = list(zip((fit_on, held_out), plain, strict=True))
        splits = [[*_labelled(as_written), *_labelled(also)] for as_written, also in pairs]
        self.answers = [torch.tensor(places_of_answers(as_written, also)) for as_written, also in pairs]
        self.model, self.tokenizer, self.choices, self.training = model, tokenizer, choices, training
        self.layers = sorted(set(choices.layers or candidate_layers(model.get_base_model())))
        for layer in self.layers:
            check_layer(model.get_base_model(), layer)
        self.labels = [torch.tensor([place for place, _ in split]) for split in splits]
        examples = [[example for _, example in split] for split in splits]
        self.rows: list[list[Row]] | None = None
        if choices.objective != "task":
            self.rows = [
                [tokenised(tokenizer, one, 0) for one in split[:written]]
                for split, written in zip(examples, self.written, strict=True)
            ]
        with training.main_process_first(desc="prompt features"):
            self._read(examples)

    def _read(self, examples: Sequence[Sequence[Example]]) -> None:
        """One pass over the prompts, and one over the answers where the objective is their utility."""
        base, count, started = self.model.get_base_model(), len(self.model.experts), time.perf_counter()
        features = [PromptFeatures(base, self.tokenizer, [example.prompt for example in split]) for split in examples]
        with self.model.using_base():
            read = sum(one.read(self.layers) for one in features)
        self._say(f"{_prompts(features)}, {read or 'none'} read anew, in {time.perf_counter() - started:.1f} s")
        self.losses: list[Tensor | None] = [None, None]
        targets = [F.one_hot(labels, count).float() for labels in self.labels]
        if self.choices.objective == "utility":
            padding = self.tokenizer.pad_token_id or 0
            self._say(f"every expert's loss on {sum(self.written)} answers, unless the cache has it: the long part")
            self.losses = [losses_of_experts(self.model, rows, padding=padding) for rows in self.rows]
            targets = [
                (-losses / self.choices.tau).softmax(dim=-1)[answers]
                for losses, answers in zip(self.losses, self.answers, strict=True)
            ]
        self.seen, self.unseen = (Split(*pair) for pair in zip(features, targets, strict=True))

    def run(self, checkpoint: str | None = None) -> FittedRouter:
        """Choose, then fit what was chosen, from `checkpoint` if an earlier run left one."""
        started = time.perf_counter()
        compared = self._compare()
        best = best_of(compared)
        chosen, rest = best.candidate, "; no other could do better" if unbeatable(best) else ""
        count = f"{len(compared)} router{'s' * (len(compared) > 1)}"
        self._say(f"{count} compared in {time.perf_counter() - started:.1f} s{rest}")
        router = self._fit(chosen, checkpoint)
        judged = _converged(judge(chosen, router, self.unseen))
        objective, layer, names = self.choices.objective, chosen.layer, self.model.experts
        seen, unseen = (split.pooled(router, layer) for split in (self.seen, self.unseen))
        router.detector = self._detector(router, seen)
        others = self._others(chosen) if self.choices.granularity == "layer" else []
        router.others = nn.ModuleDict({str(one.candidate.layer): other for one, other in others})
        config = describe_router(self.model, router, layer, objective=objective, tokenizer=self.tokenizer)
        config, strangeness = with_doubt(router, config, unseen, self.unseen.targets, self.labels[1], self.choices)
        config.plain_prompts = len(self.labels[1]) > self.written[1]
        as_written = slice(self.written[0])
        noise = find_label_noise(seen[as_written], self.labels[0][as_written], names, seed=self.training.seed)
        depths = [one for one, _ in others]
        return FittedRouter(
            router,
            config,
            judged,
            compared,
            depths,
            labels=self.labels[1],
            losses=self.losses[1],
            written=self.written[1],
            noise=noise,
            strangeness=strangeness,
        )

    def _others(self, chosen: Candidate) -> list[tuple[Judged, SequenceRouter]]:
        """The routers of the other depths: like the chosen one, each fitted to the targets and calibrated."""
        fitted = []
        for layer in self.layers:
            if layer == chosen.layer:
                continue
            if chosen.pooling == "attention":
                self._read_tokens(layer)
            candidate = replace(chosen, layer=layer)
            router = quietly_fitted(candidate, self.seen, self.choices.hidden_units, self.training)
            judged = _converged(judge(candidate, router, self.unseen))
            router.detector = self._detector(router, self.seen.pooled(router, layer))
            fitted.append((judged, router))
        return fitted

    def _detector(self, router: SequenceRouter, seen: Float[Tensor, "prompts hidden"]) -> Mahalanobis:
        plain = torch.arange(len(seen)) >= self.written[0]
        return fit_mahalanobis(router.standardised(seen), self.labels[0], len(self.model.experts), plain)

    def _read_tokens(self, layer: int) -> None:
        """The states of all tokens at a layer, which attention learns to pool."""
        with self.training.main_process_first(desc="states of the prompts' tokens"), self.model.using_base():
            for split in (self.seen, self.unseen):
                split.features.states(layer)

    def _compare(self) -> list[Judged]:
        """All heads over all layers and fixed poolings; then attention, at the layer that was best, if it is asked.

        It ends early with a router that nothing could beat.
        """
        fixed = [pooling for pooling in self.choices.poolings if pooling != "attention"]
        trained = [head for head in self.choices.heads if head != "centroid"]
        heads = trained if self.choices.objective == "language_model" else self.choices.heads
        learned = "attention" in self.choices.poolings and trained
        compared = self._judge(product(self.layers, fixed or ["mean"], heads))
        if not learned or (fixed and unbeatable(best_of(compared))):
            return compared
        layer = best_of(compared).candidate.layer
        self._read_tokens(layer)
        with_attention = self._judge(product([layer], ["attention"], trained))
        return [*compared, *with_attention] if fixed else with_attention

    def _judge(self, combinations: Any) -> list[Judged]:
        candidates = [Candidate(*combination) for combination in combinations]
        return compare(candidates, self.seen, self.unseen, self.choices.hidden_units, self.training)

    def _fit(self, chosen: Candidate, checkpoint: str | None) -> SequenceRouter:
        """The chosen router, trained to the objective with checkpoints and logs."""
        router = new_router(chosen, self.seen, self.choices.hidden_units, self.training.seed)
        if chosen.head == "centroid":
            return router
        seen, unseen = (split.dataset(chosen.layer, chosen.pooling) for split in (self.seen, self.unseen))
        training, more = self.training, {}
        if self.choices.objective == "language_model":
            seen.rows, unseen.rows = self.rows
            more = {"mixture": self.model, "padding": self.tokenizer.pad_token_id or 0}
            training = replace(
                training,
                num_train_epochs=self.choices.language_model_epochs,
                per_device_train_batch_size=self.choices.language_model_batch_size,
                per_device_eval_batch_size=self.choices.language_model_batch_size,
            )
        trainer = RouterTrainer(model=router, args=training, train_dataset=seen, eval_dataset=unseen, **more)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        self._say(f"router fitted in {time.perf_counter() - started:.1f} s")
        trainer.evaluate()
        return router.cpu()

    def _say(self, sentence: str) -> None:
        if self.training.should_save:
            print(sentence, flush=True)


def check_count(tasks: int) -> None:
    """Refuse a choice between fewer than two."""
    if tasks < 2:
        raise ValueError("a router needs at least two tasks to choose between: name more with --tasks")


def _converged(judged: Judged) -> Judged:
    if judged.diverged:
        raise ValueError(f"{diverged(judged.candidate)}: lower --learning_rate")
    return judged


def _labelled(examples: Examples) -> list[tuple[int, Example]]:
    return [(place, example) for place, of_one in enumerate(examples) for example in of_one]


def places_of_answers(as_written: Examples, plain: Examples) -> list[int]:
    """Of each example with either prompt, the place among those as written of the one that has its answer."""
    starts = itertools.accumulate(map(len, as_written), initial=0)
    also = [start + place for start, of_one in zip(starts, plain, strict=False) for place in range(len(of_one))]
    return [*range(sum(map(len, as_written))), *also]


def _prompts(features: Sequence[PromptFeatures]) -> str:
    return f"features of {len(features[0])} training and {len(features[1])} held-out prompts"

"""A mixture at every budget, on one model object: clusters of its experts merged, its router over the clusters.

At a budget of all experts it is the mixture itself, at a budget of one adapter the plain merge of all, which asks no
router.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from moa.evaluation.clusters import Composition, cluster_name
from moa.evaluation.kept import Kept
from moa.evaluation.latency import NEW_TOKENS, REPEATS, measure_latency
from moa.evaluation.merges import AskedMerge, chosen_strength, make_merge, needs_of
from moa.evaluation.systems import System, adapter_cost, mixture_system
from moa.model import MoaModel
from moa.routing import Routing
from moa.tasks import Example


class Composer:
    """Merges clusters of a mixture's experts, and runs the mixture of the merges.

    Attributes:
        latencies: budget to what `measure_latency` found, of the systems that `systems` is done with.
    """

    def __init__(
        self,
        model: MoaModel,
        tokenizer: PreTrainedTokenizerBase,
        asked: AskedMerge,
        *,
        scales: Sequence[float],
        validation: Mapping[str, Sequence[Example]],
        mixture: Path,
        kept: Kept,
    ):
        """Nothing is merged yet.

        Args:
            model: the mixture, with a router.
            asked: how to merge the members of a cluster.
            scales: strengths to choose from, for each cluster on rows of its members' tasks.
            validation: these rows, by the task's name.
            mixture: folder of the mixture, where the statistics that some methods need stand beside the experts.
            kept: holds what was found, so that a resumed run looks no more.

        Raises:
            FileNotFoundError, ValueError: what the method needs of the experts is not there, see `needs_of`.
        """
        needs_of([asked], model, tokenizer, mixture, validation)
        self.model, self.tokenizer, self.asked = model, tokenizer, asked
        self.scales, self.validation, self.mixture, self.kept = scales, validation, mixture, kept
        self.experts = model.experts
        self.whole = mixture_system(model)
        self.latencies: dict[int, dict[str, Any]] = {}

    def strength(self, cluster: Sequence[str]) -> dict[str, Any]:
        """The `scale` of a cluster's merge, the `nll` of each that was tried, its `cost`; an expert alone keeps 1."""
        if len(cluster) == 1:
            return {"scale": 1.0, "nll": {}, "cost": adapter_cost(self.model, cluster)}
        name, model = cluster_name(cluster), self.model
        there = name in model.peft_config
        with self._only(cluster) as (rows, needs):
            found = chosen_strength(
                model,
                self.tokenizer,
                self.asked,
                name,
                self.scales,
                list(rows.values()),
                self.kept,
                needs,
                of=f"{name}-",
            )
        if not there and name in model.peft_config and found["scale"] != 1:  # it was made at 1, to look
            model.delete_adapter(name)
        return found

    @contextmanager
    def running(self, composition: Composition) -> Iterator[None]:
        """Make the model the mixture of these clusters: experts, router and config; it can be saved as that."""
        self._make(composition)
        model, router, config = self.model, self.model.moa_router, self.model.moa_config
        if composition.budget == len(self.experts):
            yield
            return
        names, folded = list(composition.names), router.folded(composition.cluster_of(self.experts))
        described = replace(config.router, experts=names, clusters=folded.clusters, calibration=None)
        top_k = min(config.top_k, composition.budget)
        composed = replace(config, experts=names, router=described, top_k=top_k, scores={})
        with model.route_state.set(experts=composition.names):
            model.moa_router, model.moa_config = folded, composed
            try:
                yield
            finally:
                model.moa_router, model.moa_config = router, config

    def systems(self, compositions: Sequence[Composition], prompts: BatchEncoding) -> Iterator[System]:
        """Each as a system, from the largest budget to the smallest; merges are dropped when no other needs them.

        Args:
            prompts: a mixed batch, on which the latency of a system is measured when the next one is asked for.
        """
        ordered = sorted(compositions, key=lambda composition: -composition.budget)
        for place, composition in enumerate(ordered):
            system = self.system(composition)
            yield system
            self.latencies[composition.budget] = self._latency(system, prompts)
            needed = {name for later in ordered[place + 1 :] for name in later.names}
            for name in set(composition.names) - needed - set(self.experts):
                if name in self.model.peft_config:
                    self.model.delete_adapter(name)

    def system(self, composition: Composition) -> System:
        """The mixture of these clusters; their merges are made when it is first used."""
        strengths = [self.strength(cluster) for cluster in composition.clusters]
        routings: list[Routing] = []

        @contextmanager
        def activate(input_ids: Tensor, attention_mask: Tensor) -> Iterator[None]:
            model = self.model
            with self.running(composition):
                if composition.budget == 1:
                    with model.using(*composition.names):
                        yield
                    return
                routing = model.route(input_ids, attention_mask)
                routings.append(routing)
                with model.pinned(routing):
                    yield

        costs = [strength["cost"] for strength in strengths]
        cost = {
            "extra_parameters": sum(cost["extra_parameters"] for cost in costs),
            "rank": max(cost["rank"] for cost in costs),
        }
        if composition.budget > 1:
            cost["prefill_overhead"] = self.whole.cost["prefill_overhead"]
        keys = [strength.get("key", "") for strength in strengths]
        fingerprint = f"{self.whole.fingerprint} {self.asked.spec} {composition.clusters} {keys}"
        note = ", ".join("+".join(members) for members in composition.clusters)
        return System(f"compose:{composition.budget}", "compose", fingerprint, activate, cost, note, routings=routings)

    def _make(self, composition: Composition) -> None:
        """Have the merge of each cluster in the model, at its strength."""
        for cluster in composition.clusters:
            name = cluster_name(cluster)
            if name not in self.model.peft_config:
                scale = self.strength(cluster)["scale"]
                with self._only(cluster) as (_, needs):
                    make_merge(self.model, self.asked, name, needs, scale)

    @contextmanager
    def _only(self, cluster: Sequence[str]) -> Iterator[tuple[dict[str, Sequence[Example]], dict[str, Any]]]:
        """Make the members all the experts that there are; gives their rows, and what the method needs of them.

        The rows are of the members' own tasks, or of all where none of these is there.
        """
        with self.model.route_state.set(experts=tuple(cluster)):
            rows = {task: rows for task, rows in self.validation.items() if task in cluster} or dict(self.validation)
            yield rows, needs_of([self.asked], self.model, self.tokenizer, self.mixture, rows)

    def _latency(self, system: System, prompts: BatchEncoding) -> dict[str, Any]:
        question = [system.fingerprint, prompts["input_ids"].tolist(), NEW_TOKENS, REPEATS]
        return self.kept.get(
            f"latency-{system.name}", question, lambda: measure_latency(self.model, prompts, system.activate)
        )

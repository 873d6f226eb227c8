"""Merges whose weights are found on examples: LoRAHub, LoRA Soups, AdaMerging, distillation.

    from moa.model_objective import ModelObjective
    objective = ModelObjective(model, tokenizer, {"sst2": examples, "mnli": more})
    model.merge_adapters("lorahub_linear", objective=objective, into="merged")

One engine for all: a gate for each adapter, or for each adapter and layer, is tried on a model that holds the
adapters side by side and adds them with these gates. The result is the weighted sum of the updates, M = sum_i g_i
B_i A_i (LoRAHub as published: of the factors), one vanilla adapter.

The weights w_i that a user gives say how much each adapter's own examples count in the loss, as shares
|w_i| / sum |w|; the gates are found, whatever the weights are. An adapter that changes nothing has no gate, and its
examples do not count. Gates may all be zero, if nothing helps: the result then changes nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from moa.low_rank import LowRank
from moa.merging.layers import Layers
from moa.merging.learning import Granularity, learn
from moa.merging.linear import factor_sum, weighted_sum
from moa.merging.objective import Found, Objective
from moa.merging.registry import Merged, merge_method
from moa.merging.search import search

JUDGED = {
    "identity": "its weight is found as well: one adapter may help most at more or less than its whole strength",
    "duplicates": "a copy is one more weight to find, and its path there is another one",
    "sign": "the examples decide: negated adapters are given negated weights, not a negated result",
    "rotation": "the model that judges the weights is not turned with the adapters",
}
FACTORS = {
    "rank_order": "rank k of one adapter is added to rank k of another",
    "gauge": "the cross terms B_i A_j depend on how each adapter is factored",
    "scale_split": "the cross terms B_i A_j depend on how each adapter is factored",
}


def check_search(budget: int, parallel: int, bound: float, l1: float) -> None:
    """Refuse a search that would judge nothing, or reward what it should shun."""
    _check_positive(budget=budget, parallel=parallel, bound=bound)
    _check_not_negative(l1=l1)


def check_training(steps: int, lr: float, l1: float = 0.0, guard: float = 0.0) -> None:
    """Refuse a training that would learn nothing, or be rewarded for what it should shun."""
    _check_positive(steps=steps, lr=lr)
    _check_not_negative(l1=l1, guard=guard)


@merge_method(
    "lorahub",
    paper="https://arxiv.org/abs/2307.13269",
    degree=0,
    breaks={**JUDGED, **FACTORS},
    check=check_search,
)
def lorahub(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    module: str,
    layers: Layers,
    objective: Objective,
    run_seed: int,
    budget: int = 40,
    parallel: int = 1,
    l1: float = 0.05,
    bound: float = 1.5,
    journal: str | None = None,
) -> Merged:
    """Weights by gradient-free search on a few examples, of the factors: LoRAHub as it was published.

    M = (sum_i g_i B_i) (sum_j g_j A_j) with the g of least cross-entropy of the answers + l1 * mean|g|. Quadratic in
    the weights: one adapter at weight g is there by g^2, all g of the other sign give the same, and terms B_i A_j of
    two adapters, which mean nothing, are part of what is searched. lorahub_linear has none of that.

    Args:
        budget: candidates to judge; each costs a forward pass over all examples.
        parallel: candidates to judge at once, as rows of one mixed batch. One by one (NGOpt) takes fewest candidates;
            8 at once (CMA) took 4 times as many for the same loss, in half as many steps.
        l1: weight of mean|g| in the loss, against adapters that do not help.
        bound: every weight is searched from -bound to bound.
        journal: file to keep the search in, as JSON; the same merge started again goes on from it.

    Raises:
        ValueError: adapters of different ranks, an objective of other adapters, or a journal of another search.
    """
    found = layers.once(search, objective, True, budget, parallel, l1, bound, run_seed, journal)
    return _gated(factor_sum, updates, found, module, split="both")


@merge_method("lorahub_linear", paper="https://arxiv.org/abs/2307.13269", degree=0, breaks=JUDGED, check=check_search)
def lorahub_linear(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    module: str,
    layers: Layers,
    objective: Objective,
    run_seed: int,
    budget: int = 40,
    parallel: int = 1,
    l1: float = 0.05,
    bound: float = 1.5,
    journal: str | None = None,
) -> Merged:
    """Weights by gradient-free search on a few examples, of the updates: LoRAHub without its cross terms.

    M = sum_i g_i B_i A_i with the g of least cross-entropy of the answers + l1 * mean|g|. Takes adapters of any ranks,
    negative weights subtract, and what was searched is what is merged.

    Args:
        budget: candidates to judge; each costs a forward pass over all examples.
        parallel: candidates to judge at once, as rows of one mixed batch. One by one (NGOpt) takes fewest candidates;
            8 at once (CMA) took 4 times as many for the same loss, in half as many steps.
        l1: weight of mean|g| in the loss, against adapters that do not help.
        bound: every weight is searched from -bound to bound.
        journal: file to keep the search in, as JSON; the same merge started again goes on from it.

    Raises:
        ValueError: an objective of other adapters, or a journal of another search.
    """
    found = layers.once(search, objective, False, budget, parallel, l1, bound, run_seed, journal)
    return _gated(weighted_sum, updates, found, module, rank=rank)


@merge_method("lora_soups", paper="https://arxiv.org/abs/2410.13025", degree=0, breaks=JUDGED, check=check_training)
def lora_soups(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    module: str,
    layers: Layers,
    objective: Objective,
    run_seed: int,
    granularity: Granularity = "layer",
    convex: bool = False,
    steps: int = 100,
    lr: float = 0.01,
    journal: str | None = None,
) -> Merged:
    """Weights by gradient on labelled examples (LoRA Soups, learnable concatenation).

    M = sum_i g_i B_i A_i with g from 1/N on, by Adam on the cross-entropy of the answers.

    Args:
        granularity: a weight for each adapter, or, as published, for each adapter and layer.
        convex: weights are a softmax over the adapters, as in the authors' code: none is negative, and their sum is 1,
            so that the result cannot be stronger than its adapters.
        steps: steps of Adam, each on one batch of examples.
        lr: how far a step may move a weight; the paper takes many small steps (0.0001, an epoch of 10000 examples).
        journal: file to keep the training in, as JSON; the same merge started again goes on from it.

    Raises:
        ValueError: an objective of other adapters, a loss that is not finite, or a journal of another training.
    """
    found = layers.once(learn, objective, "answers", granularity, None, convex, steps, lr, 0.0, 0.0, run_seed, journal)
    return _gated(weighted_sum, updates, found, module, rank=rank)


@merge_method("adamerging", paper="https://arxiv.org/abs/2310.02575", degree=0, breaks=JUDGED, check=check_training)
def adamerging(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    module: str,
    layers: Layers,
    objective: Objective,
    run_seed: int,
    granularity: Granularity = "layer",
    start: float = 0.3,
    steps: int = 100,
    lr: float = 0.01,
    guard: float = 0.1,
    journal: str | None = None,
) -> Merged:
    """Weights by gradient on the entropy of the predictions, which needs no label (AdaMerging).

    M = sum_i g_i B_i A_i by Adam on H(p) + guard * KL(p || p_base), averaged over the tokens of the answers. A
    language model can lower its entropy by always saying the same; the guard keeps it near the base model.

    Args:
        granularity: a weight for each adapter, or for each adapter and layer.
        start: all weights at the first step.
        steps: steps of Adam, each on one batch of examples.
        lr: how far a step may move a weight; the paper takes more and smaller steps (0.001, 1000 of them).
        guard: weight of the divergence from the base model; 0 is the paper's loss.
        journal: file to keep the training in, as JSON; the same merge started again goes on from it.

    Raises:
        ValueError: an objective of other adapters, a loss that is not finite, or a journal of another training.
    """
    found = layers.once(
        learn, objective, "entropy", granularity, start, False, steps, lr, 0.0, guard, run_seed, journal
    )
    return _gated(weighted_sum, updates, found, module, rank=rank)


@merge_method("distillation", degree=0, breaks=JUDGED, check=check_training)
def distillation(
    updates: Sequence[LowRank],
    weights: Float[Tensor, " n"],
    *,
    rank: int | None = None,
    module: str,
    layers: Layers,
    objective: Objective,
    run_seed: int,
    granularity: Granularity = "layer",
    steps: int = 100,
    lr: float = 0.01,
    l1: float = 0.0,
    journal: str | None = None,
) -> Merged:
    """Weights by gradient, so that the merge answers each task as that task's own adapter does; needs no label.

    M = sum_i g_i B_i A_i with g from 1/N on, by Adam on the mean over adapters i and their own prompts of
    KL(p_i || p_M), over the tokens of the answers, + l1 * mean|g|.

    Args:
        granularity: a weight for each adapter, or for each adapter and layer.
        steps: steps of Adam, each on one batch of examples.
        lr: how far a step may move a weight.
        l1: weight of mean|g| in the loss, against adapters that do not help.
        journal: file to keep the training in, as JSON; the same merge started again goes on from it.

    Raises:
        ValueError: an objective of other adapters, examples that are of no adapter's task, a loss that is not finite,
            or a journal of another training.
    """
    found = layers.once(
        learn, objective, "distillation", granularity, None, False, steps, lr, l1, 0.0, run_seed, journal
    )
    return _gated(weighted_sum, updates, found, module, rank=rank)


def _gated(
    merge: Callable[..., Merged], updates: Sequence[LowRank], found: Found, module: str, **options: Any
) -> Merged:
    """Merge the updates whose gate is not zero; an update of zero where there is none."""
    gates = found.gates[module]
    kept = [index for index, update in enumerate(updates) if update.rank and gates[index] != 0]
    if kept:
        merged = merge([updates[index] for index in kept], gates[kept], **options)
    else:
        merged = Merged(updates[0].scaled(0.0).truncated()[0])
    return replace(merged, facts={**merged.facts, **found.report(module)})


def _check_positive(**options: int | float) -> None:
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} must be more than 0, got {value}")


def _check_not_negative(**options: float) -> None:
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")

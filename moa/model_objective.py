"""What judges the weights of a merge: a mixture that runs examples with its experts weighted so, and a loss.

    objective = ModelObjective(model, tokenizer, {"sst2": examples, "mnli": more})
    model.merge_adapters("lorahub", objective=objective, into="merged")

Every row of a batch has weights of its own, so that several candidates are judged by one forward pass. It is what
`moa.merging.objective.Objective` asks for; merging itself knows no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moa.answer_losses import Predicted, cross_entropy, divergence, entropy
from moa.answer_rows import predict, tokenised
from moa.fingerprint import fingerprint
from moa.model import MoaModel
from moa.tasks import Example, load_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ModelObjective:
    """Examples that judge the weights of a mixture's experts; see `moa.merging.objective.Objective`.

    The losses are means over the tokens of an example's answer, then over the examples of a task, then over the
    tasks by their shares. Entropy and distillation take no answer for right, but they look where its tokens are,
    with those before as context: for answers of one token, that is the prompt alone.
    """

    def __init__(
        self,
        model: MoaModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Mapping[str, Sequence[Example]],
        *,
        names: Sequence[str] | None = None,
        batch_size: int = 16,
    ):
        """Tokenise the examples.

        Args:
            model: holds the adapters as experts.
            examples: task to its examples; a task with an expert's name is what that expert is for.
            names: what the merge calls the experts, where it calls them otherwise.
            batch_size: rows of a forward pass; one of a training step holds as many examples.

        Raises:
            ValueError: no examples, or one whose answer has no token of its own.
        """
        if not any(map(len, examples.values())):
            raise ValueError("weights are judged by examples, and there are none: give at least one of one task")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        self.model, self.batch_size = model, batch_size
        self.names = tuple(model.experts if names is None else names)
        if len(self.names) != len(model.experts):
            raise ValueError(f"names must be one for each of {len(model.experts)} experts, got {len(self.names)}")
        self.tasks = tuple(task for task in examples if len(examples[task]))
        self._padding = tokenizer.pad_token_id or 0
        self._rows = [
            tokenised(tokenizer, example, place) for place, task in enumerate(self.tasks) for example in examples[task]
        ]
        self._examples = {task: _described(examples[task]) for task in self.tasks}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that adapters change, in the order of the gates' middle axis."""
        return self.model.route_state.layers

    def describe(self) -> dict[str, Any]:
        """What the losses depend on: fingerprints of the base model and the experts, each task's examples."""
        return {
            "base_model": fingerprint(self.model.get_base_model()),
            "experts": dict(zip(self.names, experts_sha256(self.model), strict=True)),
            "examples": self._examples,
            "batch_size": self.batch_size,
        }

    @torch.no_grad()
    def losses(
        self, gates: Float[Tensor, "candidates experts"], shares: Float[Tensor, " tasks"], *, crossed: bool = False
    ) -> Float[Tensor, " candidates"]:
        """The answers' mean cross-entropy under each candidate; all candidates are rows of mixed batches.

        Args:
            shares: of each task, in the order of `tasks`; they add up to 1.
            crossed: add factors instead of outputs, see `moa.stack.crossed_low_rank`.
        """
        weights = self._weights(shares)
        counted = weights.nonzero().flatten().tolist()
        pairs = [(index, candidate) for index in counted for candidate in range(len(gates))]
        pairs.sort(key=lambda pair: len(self._rows[pair[0]].ids))
        total = torch.zeros(len(gates), dtype=torch.float64)
        for start in range(0, len(pairs), self.batch_size):
            examples, candidates = map(list, zip(*pairs[start : start + self.batch_size], strict=True))
            with self._gated(gates[candidates], crossed):
                loss = cross_entropy(self._predicted(examples))
            total.index_add_(0, torch.tensor(candidates), weights[examples] * loss.double().cpu())
        return total

    def step_loss(
        self,
        gates: Float[Tensor, "*layers experts"],
        shares: Float[Tensor, " tasks"],
        *,
        kind: Literal["answers", "entropy", "distillation"],
        guard: float = 0.0,
        step: int,
        seed: int = 0,
    ) -> Float[Tensor, ""]:
        """A loss over one batch of examples, with gradients to the gates.

        Args:
            gates: of each expert, or of each layer and expert, in the order of `layers`.
            kind: `answers`: cross-entropy of the answers. `entropy`: of the predictions. `distillation`: KL(p_i || p)
                from the predictions p_i of the expert that the example's task is named for.
            guard: adds guard * KL(p || p_base), the divergence from the base model.
            step, seed: choose the batch; every example is drawn once before any is drawn again.

        Raises:
            ValueError: distillation of a task that is no expert's.
        """
        weights = self._weights(shares)
        counted = weights.nonzero().flatten()
        chosen = counted[_drawn(len(counted), self.batch_size, step, seed)].tolist()
        with self._gated(gates[None]):
            predicted = self._predicted(chosen)
        if kind == "answers":
            loss = cross_entropy(predicted)
        elif kind == "entropy":
            loss = entropy(predicted)
        else:
            loss = divergence(self._of_own_experts(chosen), predicted)
        if guard:
            loss = loss + guard * divergence(predicted, self._of_base(chosen))
        return (weights[chosen].to(loss) * loss).sum() * len(counted) / len(chosen)

    def _weights(self, shares: Float[Tensor, " tasks"]) -> Float[Tensor, " examples"]:
        """Of each example in the mean: its task's share, divided among the task's examples."""
        tasks = torch.tensor([row.task for row in self._rows])
        return (shares.double() / tasks.bincount(minlength=len(self.tasks)))[tasks]

    def _gated(
        self, gates: Float[Tensor, "rows *layers experts"], crossed: bool = False
    ) -> AbstractContextManager[None]:
        return self.model.route_state.gated(gates.to(self.model.device), crossed=crossed)

    @torch.no_grad()
    def _of_own_experts(self, examples: Sequence[int]) -> Predicted:
        tasks = [self.tasks[self._rows[index].task] for index in examples]
        if strangers := [task for task in tasks if task not in self.names]:
            raise ValueError(
                f"distillation asks each task's own adapter, and none is called {strangers[0]!r}: "
                f"name examples after the adapters ({', '.join(self.names)})"
            )
        own = torch.tensor([self.names.index(task) for task in tasks])
        with self._gated(F.one_hot(own, len(self.names)).float()):
            return self._predicted(examples)

    @torch.no_grad()
    def _of_base(self, examples: Sequence[int]) -> Predicted:
        with self.model.using_base():
            return self._predicted(examples)

    def _predicted(self, examples: Sequence[int]) -> Predicted:
        return predict(self.model, [self._rows[index] for index in examples], self._padding)


def _drawn(count: int, batch_size: int, step: int, seed: int) -> Int[Tensor, " batch"]:
    """The step's batch of `count` examples in shuffled rounds; the last one of a round may be smaller."""
    batches = -(-count // batch_size)
    generator = torch.Generator().manual_seed(hash((seed, step // batches)) % 2**63)
    return torch.randperm(count, generator=generator).split(batch_size)[step % batches]


def _described(examples: Sequence[Example]) -> dict[str, Any]:
    texts = "\0".join(example.prompt + example.answer for example in examples)
    return {"count": len(examples), "sha256": hashlib.sha256(texts.encode()).hexdigest()}


def experts_sha256(model: MoaModel) -> Iterator[str]:
    """Of the factors of each expert, as they are now."""
    for expert in model.experts:
        digest = hashlib.sha256()
        for name, factor in model.named_parameters():
            if ".lora_" in name and name.split(".")[-2] == expert:
                digest.update(name.encode() + factor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        yield digest.hexdigest()


def objective_for(
    adapters: Sequence[str | Path],
    model: str,
    tasks: Sequence[str],
    *,
    source: str = "hub",
    data_dir: str | None = None,
    examples: int = 16,
    seed: int = 0,
    batch_size: int = 16,
    check_base: bool = True,
) -> ModelObjective:
    """The objective of a merge of these adapters, from names alone: loads the base model, the adapters and the rows.

    Args:
        adapters: folders or Hub repositories, as `moa.merging.merge` takes them.
        model: the base model's name or folder.
        tasks: the tasks whose training rows judge. As many as adapters: one for each adapter, in their order.
            Another number: new tasks, that are no adapter's own.
        source, data_dir: where rows come from.
        examples: rows of each task.
        seed: of their choice.

    Raises:
        ValueError, FileNotFoundError: an adapter, a model, a task or its rows that do not exist or do not fit.
    """
    from moa.base_model import load_base_model, load_tokenizer
    from moa.merging.checks import read_all

    names = [adapter.name for adapter in read_all(adapters)]
    rows = {
        task.name: task.examples("train", source=source, data_dir=data_dir, limit=examples, seed=seed)
        for task in load_tasks(tasks)
    }
    if len(rows) == len(names) and set(rows) != set(names):
        rows = dict(zip(names, rows.values(), strict=True))
    # experts need names that PEFT can hold; those of the merge are folders', and two may be called alike
    experts = {f"expert_{place}": path for place, path in enumerate(adapters)}
    mixture = MoaModel.from_adapters(load_base_model(model), experts, check_base=check_base)
    return ModelObjective(mixture, load_tokenizer(model), rows, names=names, batch_size=batch_size)

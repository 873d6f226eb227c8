"""Collect statistics: one pass over batches of text, with a hook on each layer; padding never counts."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moa.merging.statistics import Statistics, fisher_key, gram_key
from moa.peft_checks import all_finite


def collect(
    model: nn.Module, modules: Sequence[str], batches: Iterable[Mapping[str, Any]], *, fisher: bool = False
) -> Statistics:
    """Statistics of the named layers' inputs (and gradients) as the model, adapter included, reads the batches.

    Layers that read the same tensor, such as q_proj, k_proj and v_proj, share one Gram. What is accumulated
    stays where the model is, float32 at least: n^2 numbers for each distinct input of n features.

    Args:
        model: called as `model(**batch)`, labels left out.
        modules: names of layers inside `model`.
        batches: `input_ids`, `attention_mask` (all tokens count where there is none), for `fisher` also `labels`
            (-100 where no loss is), and whatever else the model takes.
        fisher: also collect the row-wise Fisher information, which takes a backward pass.

    Raises:
        ValueError: no such layer, no batches, no labels, or a layer whose inputs are not one vector a token.
    """
    collector = _Collector(fisher)
    with collector.watching(_found(model, modules)), torch.set_grad_enabled(fisher):
        for batch in batches:
            collector.read(model, batch)
    return collector.statistics(modules)


def answer_loss(
    logits: Float[Tensor, "batch tokens vocabulary"], labels: Int[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Negative log-likelihood of all labels, in nats, summed: no token's gradient depends on what else is there."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def _found(model: nn.Module, modules: Sequence[str]) -> dict[str, nn.Module]:
    known = dict(model.named_modules())
    if missing := [name for name in modules if name not in known]:
        raise ValueError(f"the model has no layer {missing[0]!r}: the adapter belongs to another base model")
    return {name: known[name] for name in modules}


class _Collector:
    """The running sums, and what one batch needs until it is done."""

    def __init__(self, fisher: bool):
        self.with_fisher = fisher
        self.grams: dict[str, Tensor] = {}
        self.fishers: dict[str, Tensor] = {}
        self.tokens: Counter[str] = Counter()
        self.reads_with: dict[str, str] = {}
        self._start(None)

    def _start(self, mask: Tensor | None) -> None:
        self.mask = mask
        self.first_readers: dict[int, tuple[weakref.ref, str]] = {}
        self.outputs: list[tuple[str, Tensor, Tensor]] = []

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        hooks = [layer.register_forward_hook(partial(self._after, name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def read(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        mask = batch.get("attention_mask")
        self._start(None if mask is None or mask.all() else mask.bool())
        labels = batch.get("labels")
        if self.with_fisher and labels is None:
            raise ValueError("Fisher information is of the answers' likelihood: give each batch its labels")
        out = model(**{name: value for name, value in batch.items() if name != "labels"})
        if self.with_fisher:
            self._add_fisher(answer_loss(out.logits, labels))
        self._start(None)

    def _after(self, name: str, _layer: nn.Module, args: tuple, output: Tensor) -> None:
        (x, *_) = args
        if not x.is_floating_point():
            raise ValueError(f"layer {name!r} reads ids, not features: statistics are for linear layers")
        first = self._first_reader(name, x)
        if self.reads_with.setdefault(name, first) != first:
            raise ValueError(f"layer {name!r} shares its input with {first!r} in some batches only: collect it alone")
        if first == name:
            rows = self._real(name, x)
            self.grams.setdefault(name, rows.new_zeros(rows.shape[1], rows.shape[1])).addmm_(rows.T, rows)
            self.tokens[name] += len(rows)
        if self.with_fisher:
            if not output.requires_grad:  # the first layer of a frozen model: gradients start here
                output.requires_grad_()
            self.outputs.append((name, self._real(name, x).square().sum(dim=1), output))

    def _first_reader(self, name: str, x: Tensor) -> str:
        """The layer that was the first to read this very tensor in this batch.

        By weak reference: an id alone may belong to a tensor that is gone, and keeping all inputs costs memory.
        """
        known, first = self.first_readers.get(id(x), (lambda: None, name))
        if known() is not x:
            self.first_readers[id(x)] = weakref.ref(x), name
            return name
        return first

    def _real(self, name: str, x: Tensor) -> Float[Tensor, "tokens n"]:
        """The rows of tokens that are not padding."""
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        if self.mask is None:
            return x.reshape(-1, x.shape[-1])
        if x.shape[:-1] != self.mask.shape:
            raise ValueError(
                f"layer {name!r} sees {list(x.shape[:-1])} vectors of a padded batch of {list(self.mask.shape)} "
                "tokens, so padding cannot be told apart: give it batches without padding"
            )
        return x[self.mask]

    def _add_fisher(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, [output for *_, output in self.outputs], allow_unused=True)
        for (name, squared_norms, output), g in zip(self.outputs, gradients, strict=True):
            rows = self._real(name, torch.zeros_like(output) if g is None else g)
            self.fishers.setdefault(name, rows.new_zeros(rows.shape[1])).add_(squared_norms @ rows.square())

    def statistics(self, modules: Sequence[str]) -> Statistics:
        """The means of what was summed."""
        if unread := [name for name in modules if name not in self.reads_with]:
            raise ValueError(f"layer {unread[0]!r} read nothing: give at least one batch that reaches it")
        tensors = {gram_key(name): (total / self.tokens[name]).cpu() for name, total in self.grams.items()}
        for name, total in self.fishers.items():
            tensors[fisher_key(name)] = (total / self.tokens[self.reads_with[name]]).cpu()
        for key, tensor in tensors.items():
            if not all_finite(tensor):
                raise ValueError(f"{key} is not finite: the model overflows on this text, load it in float32")
        layers = {
            name: {
                "gram": gram_key(self.reads_with[name]),
                "tokens": self.tokens[self.reads_with[name]],
                "fisher": self.with_fisher,
            }
            for name in modules
        }
        return Statistics(tensors.__getitem__, layers)

"""What the layers of one mixture read: whose weights, for which rows, or no weights at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moa.choice import Choice, choices, look_at
from moa.config import FALLBACK

if TYPE_CHECKING:
    from moa.stack import Stack

RECOMPUTED = ("weights", "token_rows", "broadcast", "crossed")
RUNS = ("_weights", "_choices", "_chosen_at", "_gates", "_layer_router", "token_rows", "broadcast", "crossed", "off")
"""All that decides what a layer computes."""


class LayerRouter(Protocol):
    """Weights that a layer computes from its own input, of each token alone, which a KV cache cannot make wrong."""

    def __call__(self, place: int, x: Float[Tensor, "batch tokens n"], /) -> Float[Tensor, "batch tokens columns"]: ...


class RouteState:
    """How the gated layers run now; shared by reference, and kept after a forward for its recompute.

    Weights have a column for each expert, and may have one more, the fallback adapter's. A row of zeros runs the
    base model. They are checked when they are set.

    Attributes:
        experts: names of the experts, in the order of the columns.
        held: every adapter that the model holds, by its name, to its PEFT config.
        layers: names of the gated layers in the base model.
        weights: per sequence `[rows, columns]`; per gated layer too `[rows, layers, columns]`; per token
            `[rows, layers or 1, tokens, columns]`. Rows are the batch's, or one for all. None runs `layer_router`, or
            PEFT's active adapter where there is none.
        layer_router: computes weights inside each layer, where none are set.
        token_rows: of a packed row, which row of the weights each token takes, `[1, tokens]`.
        alone: the adapter of PEFT's that runs where there are no weights and no layer router.
        off: run the base model alone. `PeftModel.disable_adapter` is no substitute: it turns gradients back on.
        pinned: the weights were set by a caller and stay; otherwise each forward routes anew.
        broadcast: one row of weights serves a batch of any size; off where the caller named one expert a sequence.
        crossed: add factors instead of outputs, see `moa.stack.crossed_low_rank`.
        steady: while it is set, adapters do not change, so that each layer looks at them once only.
    """

    def __init__(self, experts: tuple[str, ...], held: Mapping[str, Any] | None = None):
        self.experts = experts
        self.held = dict.fromkeys(experts) if held is None else held
        self.layers: tuple[str, ...] = ()
        self._weights: Tensor | None = None
        self._choices: tuple[Choice, ...] | None = None
        self._chosen_at: int | None = None
        self._gates: dict[tuple, Tensor] = {}
        self._layer_router: LayerRouter | None = None
        self.token_rows: Int[Tensor, "1 tokens"] | None = None
        self.off = self.pinned = self.crossed = False
        self.broadcast = True
        self.steady: object | None = None
        self.alone: str | None = None

    @property
    def weights(self) -> Float[Tensor, "rows *layers_and_tokens columns"] | None:
        return self._weights

    @weights.setter
    def weights(self, weights: Tensor | None) -> None:
        found = version = None
        if weights is not None:
            self._check_shape(weights)
            if weights is self._weights and self._chosen_at is not None and self._chosen_at == _version(weights):
                return  # as for each token of a conversation: looking at them again would wait for a GPU
            look = look_at(weights)
            self._check_values(weights, look.finite)
            found, version = choices(weights, look), _version(weights)
        self._weights, self._gates, self._choices, self._chosen_at = weights, {}, found, version

    @property
    def layer_router(self) -> LayerRouter | None:
        return self._layer_router

    @layer_router.setter
    def layer_router(self, router: LayerRouter | None) -> None:
        if router is not None and (dora := self._dora(self.experts)):
            raise ValueError(_mixed_dora(dora[0]))
        self._layer_router = router

    @contextmanager
    def set(self, **changes: Any) -> Iterator[None]:
        """Change fields for the length of a `with` block."""
        before = {name: getattr(self, name) for name in changes}
        try:
            for name, value in changes.items():
                setattr(self, name, value)
            yield
        finally:
            if before.get("pinned") is False:
                # Outside nobody reads weights before the next route sets them, but a backward pass after this block
                # may: gradient checkpointing runs the layers once more.
                before = {name: value for name, value in before.items() if name not in RECOMPUTED}
            for name, value in before.items():
                setattr(self, name, value)

    def gated(self, weights: Tensor, *, broadcast: bool = True, crossed: bool = False) -> AbstractContextManager[None]:
        """Run these weights for everything inside the block: one row for all sequences, or one for each."""
        return self.set(weights=weights, off=False, pinned=True, broadcast=broadcast, crossed=crossed, token_rows=None)

    def recomputed(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """A `context_fn` for torch.utils.checkpoint: nothing for the forward, and for its recompute the route of now.

        So that another forward may come before the backward of this one.
        """
        return nullcontext(), self._again({name: getattr(self, name) for name in RUNS})

    @contextmanager
    def _again(self, then: Mapping[str, Any]) -> Iterator[None]:
        """Run as at another time, with values that were checked when they were set."""
        now = {name: getattr(self, name) for name in then}
        vars(self).update(then)
        try:
            yield
        finally:
            vars(self).update(now)

    @property
    def by_row(self) -> bool:
        """Whether what runs depends on the row: then a packed row must say which of its tokens belong together."""
        if self.off or (self.layer_router is not None and not self.pinned):
            return False
        return not self.pinned or (self.weights is not None and not (self.broadcast and len(self.weights) == 1))

    def names(self, columns: int) -> tuple[str, ...]:
        """The adapters that weights of so many columns are for."""
        return (*self.experts, FALLBACK)[:columns]

    def weights_at(self, place: int, x: Float[Tensor, "batch *tokens n"]) -> Float[Tensor, "rows *tokens columns"]:
        """The weights of one layer for its input; tokens that share a row's weights are one."""
        if self._weights is None:
            return self._layer_router(place, x)
        self._check_rows(x)
        weights = self._weights
        if weights.dim() > 2:
            weights = weights[:, place if weights.shape[1] > 1 else 0]
        if weights.dim() > 2:
            return weights
        if self.token_rows is not None:
            return weights[self.token_rows]
        return weights.view(len(weights), *(1,) * (x.dim() - 2), -1)

    def gate_at(
        self, place: int, weights: Float[Tensor, "rows *tokens columns"], stack: Stack
    ) -> Float[Tensor, "rows *tokens R"]:
        """A layer's weights, each repeated over the ranks of its adapter.

        Computed once a route for all layers that are alike: on a GPU, two kernels less for each of them. Weights that
        differ between the tokens of a row are as large as what a layer reads, and not kept.
        """
        found = self._weights
        of_tokens = found is None or found.dim() > 3 or self.token_rows is not None
        if of_tokens or found.requires_grad or torch.compiler.is_compiling():
            return stack.gate(weights)
        layer = place if found.dim() > 2 else None
        alike = _version(found), layer, weights.dim(), stack.ranks, stack.members, stack.A.dtype, stack.A.device
        if alike not in self._gates:
            with torch.inference_mode(False):  # a later forward may want gradients through it
                self._gates[alike] = stack.gate(weights)
        return self._gates[alike]

    def choice_at(self, place: int) -> Choice | None:
        """The one expert of each row at a layer; None where rows mix experts, or tokens of one row differ, or weights
        were changed since the experts were looked for."""
        if self._choices is None or self.token_rows is not None or self.crossed:
            return None
        if not torch.compiler.is_compiling() and _version(self._weights) != self._chosen_at:
            return None
        return self._choices[place if len(self._choices) > 1 else 0]

    # ---- checks

    def _check_shape(self, weights: Tensor) -> None:
        columns = (len(self.experts), len(self.experts) + (FALLBACK in self.held))
        if not weights.is_floating_point() or not 2 <= weights.dim() <= 4 or weights.numel() == 0:
            raise ValueError(
                "weights are numbers [rows, experts], [rows, layers, experts] or [rows, layers or 1, tokens, "
                f"experts]: got {weights.dtype} {list(weights.shape)}"
            )
        if weights.shape[-1] not in columns:
            fallback = f", and one for {FALLBACK!r}" if FALLBACK in self.held else ""
            raise ValueError(
                f"the weights have {weights.shape[-1]} columns, the mixture {len(self.experts)} experts "
                f"({', '.join(self.experts)}): give one column for each, in this order{fallback}"
            )
        if gone := [name for name in self.experts if name not in self.held]:
            raise ValueError(
                f"the adapter of expert {gone[0]!r} was deleted: load one under its name, or take the expert out with "
                f"model.remove_expert({gone[0]!r})"
            )
        layers = (len(self.layers),) if weights.dim() == 3 else (len(self.layers), 1)
        if weights.dim() > 2 and weights.shape[1] not in layers:
            raise ValueError(
                f"the weights are for {weights.shape[1]} layers, and experts adapt {len(self.layers)}: "
                "give one row for each of route_state.layers"
            )

    def _check_values(self, weights: Tensor, finite: bool) -> None:
        names = self.names(weights.shape[-1])
        if not finite:
            row = (~torch.isfinite(weights.detach()).flatten(1).all(dim=1)).nonzero()[0].item()
            raise ValueError(
                f"the weights of row {row} hold NaN or infinite values: check what computed them, a router that "
                "diverged has to be fitted again"
            )
        if dora := self._dora(names):
            alone = ((weights != 0).sum(dim=-1) == 1) & (weights.sum(dim=-1) == 1)
            of_dora = (weights[..., [names.index(name) for name in dora]] != 0).any(dim=-1)
            if (of_dora & ~alone).any():
                raise ValueError(_mixed_dora(dora[0]))

    def _dora(self, names: tuple[str, ...]) -> list[str]:
        return [name for name in names if getattr(self.held.get(name), "use_dora", False)]

    def _check_rows(self, x: Tensor) -> None:
        """Refuse weights that were made for another batch than this one; looks at sizes only."""
        rows, sequences = len(self._weights), x.shape[0]
        tokens = self._weights.shape[2] if self._weights.dim() == 4 else None
        if self.token_rows is not None:
            tokens, rows = self.token_rows.shape[1], 1
        if rows != sequences and not (rows == 1 and self.broadcast):
            raise ValueError(
                f"the routing is for {rows} sequence{'s' if rows > 1 else ''}, this batch has {sequences}: "
                "route this batch, or pin one expert's name (one row of weights) a sequence"
            )
        if tokens not in (None, x.shape[1]):
            raise ValueError(
                f"the routing is for {tokens} tokens a row, this batch has {x.shape[1]}: weights of each token serve "
                "the batch that they were made for, without a cache"
            )


def _version(weights: Tensor) -> int | None:
    """Another number after weights were changed in place."""
    return None if weights.is_inference() else weights._version


def _mixed_dora(name: str) -> str:
    return (
        f"expert {name!r} is a DoRA adapter, which rescales the base layer's own output, so it runs a sequence alone "
        "or not at all: route with routing='hard', or pin one expert a sequence"
    )

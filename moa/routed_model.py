"""A PEFT model of several LoRA adapters whose layers follow a route: what a mixture does with a prompt.

A forward or a generation routes each prompt once, on the base model's hidden states, and keeps that route for every
token it produces: routing anew at each step would read keys and values that another adapter wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from peft.helpers import rescale_adapter_scale
from torch import Tensor
from transformers import Cache

from moa.cached_route import forget, remember
from moa.mixture import GatedLayer, install
from moa.prompt_route import mask_of_prompts, one_route, take_route
from moa.routing import Routing, route_names
from moa.routing_model import RoutingModel


class RoutedModel(RoutingModel):
    """The running half of `moa.model.MoaModel`, which makes, merges and saves mixtures.

    Attributes:
        route_state: what the layers read; see `pinned`, `using` and `using_base`.
        gated_layers: they themselves, in the order of `route_state.layers`.
        last_routing: how the last forward routed; None where the caller had chosen.
        last_task: the `task` that was passed to it.
    """

    gated_layers: tuple[GatedLayer, ...] = ()
    last_routing: Routing | None = None
    last_task: Tensor | None = None

    def gate_layers(self) -> None:
        """Let every layer with an adapter read `route_state`: once more after adapters came."""
        self.gated_layers = install(self.get_base_model(), self.route_state)

    @contextmanager
    def pinned(self, routing: Routing | Sequence[str]) -> Iterator[None]:
        """Keep one routing for everything inside the block.

        Args:
            routing: a `Routing`, whose one row serves a batch of any size, or a list of one expert's name a sequence.
                A sequence is a row of the batch, or a part of a packed row.

        Raises:
            ValueError: no names, a name that is no expert, or weights of a wrong shape, with NaN, or that mix a DoRA
                expert.
        """
        if isinstance(routing, Tensor):
            raise ValueError("weights are pinned as a Routing: model.pinned(Routing(weights))")
        named = not isinstance(routing, Routing)
        weights = (route_names(routing, self.experts) if named else routing).weights
        with self.route_state.gated(weights.to(self.device), broadcast=not named):
            for layer in self.gated_layers:
                layer.keep_stack(weights.shape[-1])
            yield

    def reroute(self, past_key_values: Cache) -> None:
        """Renew the route of a conversation: empties its cache, so that the whole conversation is routed anew.

        Without this call every turn keeps the route of the first, whose keys and values the cache holds. Pass the
        whole conversation to the next forward or generation, as a cache needs it anyway.
        """
        past_key_values.reset()
        forget(past_key_values)

    @contextmanager
    def using(self, adapter: str, scale: float = 1.0) -> Iterator[None]:
        """Run one adapter alone for all sequences: an expert, or what `merge_adapters(into=...)` made.

        Args:
            scale: multiplies the adapter's update, to try a strength without merging again.

        Raises:
            ValueError: no adapter has this name.
        """
        if adapter not in self.peft_config:
            raise ValueError(f"no adapter is called {adapter!r}: this model holds {', '.join(self.peft_config)}")
        before = self.active_adapter
        alone = f"{adapter!r} at scale {scale:g}"
        with self.route_state.set(weights=None, layer_router=None, off=False, pinned=True, alone=alone):
            self.set_adapter(adapter, inference_mode=True)
            try:
                with rescale_adapter_scale(self, scale):
                    yield
            finally:
                self.set_adapter(before, inference_mode=True)

    @contextmanager
    def using_base(self) -> Iterator[None]:
        """Run the base model alone."""
        with self.route_state.set(off=True, pinned=True):
            yield

    def _disabled(self) -> AbstractContextManager[None]:
        """Inside PEFT's `disable_adapter()`, the base model."""
        return self.using_base() if self._adapters_disabled else nullcontext()

    @contextmanager
    def _pinned_by_argument(self, names: Sequence[str]) -> Iterator[None]:
        """PEFT's `adapter_names`: one expert a sequence, at inference."""
        if self.training:
            raise ValueError("adapter_names are for inference: call model.eval(), or train inside model.pinned(names)")
        if "__base__" in names:
            raise ValueError(
                "adapter_names of a mixture cannot hold '__base__': run those prompts apart, with model.using_base()"
            )
        with self.pinned(names):
            yield

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        adapter_names: Sequence[str] | None = None,
        task: Int[Tensor, " batch"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the base model's forward. Routes on the prompt (what `labels` marks -100) unless a routing is pinned.

        A packed row is routed sequence by sequence. A cache that this mixture filled goes on with the route that
        filled it; see `reroute`.

        Args:
            adapter_names: one expert's name a sequence, instead of routing.
            task: index of the expert that each sequence belongs to, -100 where none is known. It changes nothing
                here; trainers and callbacks compare it with `last_routing`.

        Raises:
            ValueError: nothing is pinned and there are no `input_ids`, or a cache of unknown origin; a cache that
                another route filled; a packed row without `seq_idx` or `cu_seq_lens_q`, or with a cache.
        """
        if adapter_names is not None:
            with self._pinned_by_argument(adapter_names):
                return self.forward(input_ids, attention_mask, **kwargs)
        if torch.compiler.is_compiling() and self.route_state.pinned:  # one graph; sizes are checked in the layers
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        self.last_routing, self.last_task = None, task
        with self._disabled():
            with take_route(self, input_ids, attention_mask, kwargs):
                out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            remember(getattr(out, "past_key_values", None), self.route_state)
        return out

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the base model's; what is recomputed takes the route of its own forward, whatever ran since.

        With `use_reentrant=True` it takes the last forward's: then each backward must follow its forward.
        """
        options = dict(activation_checkpointing_kwargs or {"use_reentrant": False})
        if options.get("use_reentrant") is False:
            options.setdefault("context_fn", self.route_state.recomputed)
        self.get_base_model().activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def generate(
        self, inputs: Tensor | None = None, *, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """As `transformers`' generate: each prompt is routed once, and keeps its route to its last token.

        Turns of a conversation that share a cache share the route of the first; see `reroute`.

        Args:
            adapter_names: one expert's name a prompt, instead of routing.

        Raises:
            ValueError: no prompts to route on, or a cache that another route filled.
        """
        if adapter_names is not None:
            with self._pinned_by_argument(adapter_names):
                return self.generate(inputs, **kwargs)
        input_ids, cache = kwargs.pop("input_ids", inputs), kwargs.get("past_key_values")
        kwargs["attention_mask"] = mask_of_prompts(self, input_ids, kwargs)
        with self._disabled(), one_route(self, input_ids, kwargs):
            out = super().generate(input_ids=input_ids, **kwargs)
            for filled in (cache, getattr(out, "past_key_values", None)):
                remember(filled, self.route_state)
        return out

"""MoaModel: several LoRA experts on one base model, and a router that picks or mixes them for each prompt.

    model = MoaModel.from_adapters(base, {"sst2": "outputs/sst2", "squad": "outputs/squad"})
    model = MoaModel.from_pretrained(base, "outputs/moa")      # with its router
    model.generate(**tokenizer(prompts, return_tensors="pt"))  # each prompt through its own expert
    model.merge_adapters(method="ties", into="merged")         # or one adapter for all of them

It is a `PeftModelForCausalLM` that holds ordinary LoRA adapters, so that everything which takes one takes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from peft import PeftModelForCausalLM
from peft.helpers import rescale_adapter_scale
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from moa.adapters import add_to_model, from_model
from moa.arrow import ArrowRouter
from moa.assembly import assemble, check_adapter_name
from moa.base_model import load_base_model, portable_name
from moa.cached_route import forget, remember
from moa.config import FALLBACK, Fallback, MoaConfig, RouterConfig
from moa.growing import Growth, Prompts, add_expert, remove_expert
from moa.mixture import RouteState, install, refresh
from moa.prefix import default_layer, prompt_features
from moa.prompt_route import route_to_generate, take_route
from moa.router import SequenceRouter, mean_pool
from moa.router_checks import check_router, check_tokenizer, describe_router
from moa.routing import Granularity, Routing, RoutingMode, check_granularity, fall_back, route_logits, route_names
from moa.strangeness import strangeness

if TYPE_CHECKING:
    from moa.merging import MergeResult


class MoaModel(PeftModelForCausalLM):
    """A Mixture-of-LoRAs; make one with `from_adapters` or `from_pretrained`.

    A forward or a generation routes each prompt once, on the base model's hidden states, and keeps that route for
    every token it produces: routing anew at each step would read keys and values that another adapter wrote.

    Attributes:
        moa_config: names of the experts, how to route, where the router reads.
        moa_router: the fitted `SequenceRouter`, or None.
        route_state: what the layers read; see `pinned`, `using` and `using_base`.
        last_routing: how the last forward routed; None where the caller had chosen.
        last_task: the `task` that was passed to it.
    """

    moa_config: MoaConfig
    moa_router: SequenceRouter | None
    route_state: RouteState
    last_routing: Routing | None = None
    last_task: Tensor | None = None

    @classmethod
    def from_adapters(
        cls,
        base: PreTrainedModel | str | Path,
        adapters: Mapping[str, str | Path],
        *,
        router_layer: int | None = None,
        routing: RoutingMode = "hard",
        top_k: int = 2,
        granularity: Granularity = "sequence",
        check_base: bool = True,
    ) -> MoaModel:
        """Load LoRA adapters, of any ranks and target modules, as the experts of one base model.

        Args:
            base: the base model, which must hold no adapter yet, or its name or folder.
            adapters: name of each expert -> its folder or Hub repository.
            router_layer: the router reads the hidden state entering this layer; default a quarter of the depth.
            routing: `hard`, `top_k`, `soft` or `conformal`.
            top_k: how many experts `top_k` mixes.
            granularity: `sequence` or `token`, see `set_granularity`.
            check_base: refuse adapters that name another base model.

        Raises:
            ValueError: no adapters, a name that PEFT cannot hold, adapters of different base models, a base that
                holds adapters already, or an adapter that is more than LoRA or DoRA on linear layers, or not finite.
        """
        if isinstance(base, str | Path):
            base = load_base_model(str(base))
        model = assemble(cls, base, adapters, check_base=check_base)
        model.moa_config = MoaConfig(
            base_model=portable_name(base),
            experts=list(adapters),
            router=RouterConfig(layer=default_layer(base) if router_layer is None else router_layer),
            routing=routing,
            top_k=top_k,
            check_base=check_base,
        )
        model.moa_router = None
        model.route_state = RouteState(tuple(adapters), model.peft_config)
        install(model.get_base_model(), model.route_state)
        model.set_granularity(granularity)
        model.requires_grad_(False)
        return model.eval()

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the routing weights."""
        return self.route_state.experts

    def add_expert(
        self,
        name: str,
        path: str | Path,
        examples: Prompts = (),
        *,
        held_out: Mapping[str, Prompts] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Growth:
        """Load one more adapter as the last expert, and give the router a row for it without training the others.

        The row follows from the mean of the examples' features (`moa.growing`). Temperature and the other rows stay;
        thresholds widen until the new expert's own prompts keep to them; the fallback is merged anew. Conversations
        that began before start anew, see `reroute`.

        Args:
            path: folder or Hub repository of the adapter, checked as by `from_adapters`.
            examples: about a hundred prompts, or tasks' examples, that are the new expert's; needed by a router.
            held_out: other prompts of some experts, to tell the router's accuracy before and after. Without any of
                the new expert's, its examples are judged in five folds.
            tokenizer: default the base model's own.

        Raises:
            ValueError: a name that is taken, an adapter that cannot be an expert here, fewer than two examples, or a
                router that cannot gain a row: an mlp head, or a linear one without the means of its prompts.
        """
        return add_expert(self, name, path, examples, held_out or {}, tokenizer)

    def remove_expert(
        self,
        name: str,
        *,
        held_out: Mapping[str, Prompts] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Growth:
        """Drop an expert and its row of the router; the fallback is merged anew from those that stay.

        Args:
            held_out, tokenizer: as for `add_expert`.

        Raises:
            ValueError: no such expert, the last one, or fewer left than `top_k` mixes.
        """
        return remove_expert(self, name, held_out or {}, tokenizer)

    # ---- routing

    def set_router(
        self, router: SequenceRouter, fitted: RouterConfig | None = None, *, check_base: bool = True
    ) -> None:
        """Give the mixture a fitted router, whose outputs are the experts in their order.

        Args:
            fitted: what it reads and was fitted for; None means for this model, at the layer that its config names.
            check_base: refuse a router that was fitted on other base weights.

        Raises:
            ValueError: the router is for other experts or other base weights, has another number of outputs than
                there are experts, or reads another width.
        """
        if fitted is None:
            fitted = describe_router(self, router, self.moa_config.router.layer)
        check_router(self, router, fitted, check_base=check_base)
        self.moa_router = router.to(self.device).requires_grad_(False).eval()
        self.moa_config.router = fitted

    def set_granularity(self, granularity: Granularity) -> None:
        """Route each prompt (`sequence`), by the router, or each token at each layer (`token`), by Arrow.

        Arrow needs no router and no training: it mixes the `moa_config.top_k` experts whose updates read a token most,
        see `moa.arrow`. It takes the adapters as they are at this call; call it again when they change.

        Raises:
            ValueError: another granularity, or `token` with a DoRA expert, which cannot be mixed.
        """
        check_granularity(granularity)
        arrow = None
        if granularity == "token":
            arrow = ArrowRouter(self.get_base_model(), self.experts, top_k=self.moa_config.top_k)
        self.route_state.layer_router = arrow
        self.moa_config.granularity = granularity

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that cuts text otherwise, or has another chat template, than the router's own.

        Raises:
            ValueError: which of the two it is; nothing where there is no router, or one that does not name its own.
        """
        if self.moa_router is not None:
            check_tokenizer(self.moa_config.router, tokenizer)

    def features(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        prompt_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch hidden"]:
        """What the router reads: the base model's pooled hidden state entering `moa_config.router.layer`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with self.route_state.set(off=True):
            return prompt_features(
                self.get_base_model(),
                self.moa_config.router.layer,
                input_ids,
                attention_mask,
                prompt_mask,
                mean_pool if self.moa_router is None else self.moa_router.pool,
            )

    def route(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        *,
        prompt_mask: Tensor | None = None,
        routing: RoutingMode | None = None,
        top_k: int | None = None,
        abstain: bool = True,
    ) -> Routing:
        """Weights of the experts for each prompt; they carry gradients where the router's parameters want them.

        A prompt that is stranger than `moa_config.router.abstention` allows runs the merged adapter (`set_fallback`)
        or the base model instead, but never in training mode, where it teaches its experts.

        Args:
            prompt_mask: which tokens are the prompt; default all that are not padding.
            routing, top_k: instead of the mixture's own.
            abstain: False trusts the experts with every prompt.

        Raises:
            ValueError: the mixture has no fitted router, or one without the conformal set that `routing` asks for.
        """
        if self.moa_router is None:
            raise ValueError(
                "this mixture has no router: fit one with training/train_moa.py, or choose the experts yourself "
                "with model.pinned([...]) or model.using(name)"
            )
        pooled, config = self.features(input_ids, attention_mask, prompt_mask), self.moa_config
        logits = self.moa_router(pooled)
        floor = None if config.router.conformal is None else config.router.conformal.floor
        routed = route_logits(logits, routing or config.routing, config.top_k if top_k is None else top_k, floor)
        return self._without_strangers(routed, pooled) if abstain and not self.training else routed

    def _without_strangers(self, routed: Routing, pooled: Float[Tensor, "batch hidden"]) -> Routing:
        """The routing less the prompts that no expert should be trusted with."""
        limits = self.moa_config.router.abstention
        if limits is None:
            return routed
        found = strangeness(self.moa_router, limits, pooled, routed.logits).detach()
        merged = FALLBACK in self.peft_config
        if not merged and (found > limits.merged_above).any():
            warnings.warn(
                "strange prompts run the base model, for the mixture has no merged adapter: call model.set_fallback()",
                stacklevel=3,
            )
        return fall_back(routed, found, limits.merged_above, limits.base_above, merged=merged)

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
        named = not isinstance(routing, Routing)
        weights = (route_names(routing, self.experts) if named else routing).weights
        with self.route_state.gated(weights.to(self.device), broadcast=not named):
            refresh(self.get_base_model(), weights.shape[-1])
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
        with self.route_state.set(weights=None, layer_router=None, off=False, pinned=True):
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
        if not self._adapters_disabled:
            take_route(self, input_ids, attention_mask, kwargs)
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if not self._adapters_disabled:
            remember(getattr(out, "past_key_values", None), self.route_state)
        return out

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
        state = self.route_state
        if self._adapters_disabled:
            return super().generate(input_ids=input_ids, **kwargs)
        with state.set(**route_to_generate(self, input_ids, kwargs), token_rows=None, steady=object()):
            out = super().generate(input_ids=input_ids, **kwargs)
            for filled in (cache, getattr(out, "past_key_values", None)):
                remember(filled, state)
        return out

    # ---- merging

    def merge_adapters(
        self,
        method: str = "svd",
        *,
        adapters: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        rank: int | None = None,
        into: str | None = None,
        **options: Any,
    ) -> MergeResult:
        """Merge experts into one adapter; see `moa methods` for what there is.

        Args:
            method: name of a merge method.
            adapters: names of the adapters to merge; default all experts.
            weights: one for each adapter; default 1/N each.
            rank: rank of the merged adapter; the default depends on the method.
            into: also load the merged adapter into this model, under this name.
            options: options of the method, `scale` and `seed`.

        Raises:
            ValueError: an unknown adapter, method or option, or a name in `into` that is taken or not usable.
        """
        from moa.merging import merge

        if into == FALLBACK:
            raise ValueError(f"{FALLBACK!r} is the fallback's name: make it with set_fallback, or choose another name")
        if into in self.peft_config:
            raise ValueError(f"an adapter called {into!r} is already loaded: choose another name for the merge")
        if into is not None:
            check_adapter_name(self.get_base_model(), into)

        names = list(self.experts if adapters is None else adapters)
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"no adapter is called {name!r}: this model holds {', '.join(self.peft_config)}")
        options.setdefault("check_base", self.moa_config.check_base)
        members = [from_model(self, name) for name in names]
        if any(member.extras for member in members):  # DoRA's merge depends on the base model's weights
            options.setdefault("base", self)
        result = merge(members, method, weights=weights, rank=rank, **options)
        if into is not None:
            self._add(into, result)
        return result

    def _add(self, name: str, merged: MergeResult) -> None:
        add_to_model(self, name, merged.modules, kinds=merged.kinds, extras=merged.extras)
        install(self.get_base_model(), self.route_state)

    def set_fallback(self, method: str = "svd", **options: Any) -> MergeResult:
        """Merge the experts into the adapter at the root of the saved folder, which plain PEFT and vLLM load.

        Args:
            options: as for `merge_adapters`.
        """
        result = self.merge_adapters(method, **options)
        if FALLBACK in self.peft_config:
            self.delete_adapter(FALLBACK)
        self._add(FALLBACK, result)
        self.moa_config.fallback = Fallback(method, dict(result.report.weights), result.report.scale)
        return result

    # ---- saving and loading

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | str | Path | None,
        model_id: str | Path,
        *,
        check_base: bool = True,
        router: bool = True,
        **kwargs: Any,
    ) -> MoaModel:
        """Load a saved mixture: adapters, router, settings; checks that no adapter changed since it was saved.

        Args:
            model: the base model, its name or folder, or None for the one that the mixture names.
            model_id: a folder, or a Hub repository.
            check_base: refuse another base model than the mixture was saved on.
            router: False leaves the fitted router out, to give it another one.
            kwargs: `revision`, `token`, `cache_dir` for the Hub.

        Raises:
            FileNotFoundError: neither a folder nor a repository that can be reached.
            ValueError: not a saved mixture, or one of its files was changed.
        """
        from moa.saving import load_mixture

        return load_mixture(cls, model, model_id, check_base=check_base, router=router, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write one folder with three readers: its root is a plain LoRA adapter (the fallback, a merge of the
        experts), each subfolder a plain LoRA adapter (an expert), `moa_config.json` and `moa_router.safetensors` the
        router. Stock PEFT and vLLM read the first two.

        Args:
            kwargs: `push_to_hub=True, repo_id=...` pushes as well; the rest goes to PEFT.
        """
        from moa.saving import save_mixture

        save_mixture(self, Path(save_directory), **kwargs)

    def push_to_hub(self, repo_id: str, *, fused: str | None = None, **kwargs: Any) -> str:
        """Push the mixture, or one fused adapter or model, with its model card; returns the commit's address.

        Args:
            fused: None pushes the mixture, `"adapter"` its fallback alone, `"model"` the base model with the fallback
                folded in.
            kwargs: `private`, `token`, `commit_message`, `revision`.
        """
        from moa.push import push_mixture

        return push_mixture(self, repo_id, fused=fused, **kwargs)

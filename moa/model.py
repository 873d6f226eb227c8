"""MoaModel: several LoRA experts on one base model, and a router that picks or mixes them for each prompt.

    model = MoaModel.from_adapters(base, {"sst2": "outputs/sst2", "squad": "outputs/squad"})
    model = MoaModel.from_pretrained(base, "outputs/moa")      # with its router
    model.generate(**tokenizer(prompts, return_tensors="pt"))  # each prompt through its own expert
    model.merge_adapters(method="ties", into="merged")         # or one adapter for all of them

It is a `PeftModelForCausalLM` that holds ordinary LoRA adapters, so that everything which takes one takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from peft import PeftModelForCausalLM
from peft.helpers import rescale_adapter_scale
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from moa.adapters import add_to_model, from_model
from moa.assembly import assemble, check_adapter_name
from moa.base_model import load_base_model, portable_name
from moa.config import FALLBACK, Fallback, MoaConfig
from moa.mixture import RouteState, install
from moa.prefix import default_layer, prompt_features
from moa.router import SequenceRouter
from moa.routing import Routing, RoutingMode, route_logits, route_names

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
    """

    moa_config: MoaConfig
    moa_router: SequenceRouter | None
    route_state: RouteState

    @classmethod
    def from_adapters(
        cls,
        base: PreTrainedModel | str | Path,
        adapters: Mapping[str, str | Path],
        *,
        router_layer: int | None = None,
        routing: RoutingMode = "hard",
        top_k: int = 2,
        check_base: bool = True,
    ) -> MoaModel:
        """Load LoRA adapters, of any ranks and target modules, as the experts of one base model.

        Args:
            base: the base model, which must hold no adapter yet, or its name or folder.
            adapters: name of each expert -> its folder or Hub repository.
            router_layer: the router reads the hidden state entering this layer; default a quarter of the depth.
            routing: `hard`, `top_k` or `soft`.
            top_k: how many experts `top_k` mixes.
            check_base: refuse adapters that name another base model.

        Raises:
            ValueError: no adapters, a name that PEFT cannot hold, adapters of different base models, a base that
                holds adapters already, or an adapter that is not plain LoRA on linear layers with finite factors.
        """
        if isinstance(base, str | Path):
            base = load_base_model(str(base))
        model = assemble(cls, base, adapters, check_base=check_base)
        model.moa_config = MoaConfig(
            base_model=portable_name(base),
            experts=list(adapters),
            router_layer=default_layer(base) if router_layer is None else router_layer,
            routing=routing,
            top_k=top_k,
            check_base=check_base,
        )
        model.moa_router = None
        model.route_state = RouteState(experts=tuple(adapters))
        install(model.get_base_model(), model.route_state)
        model.requires_grad_(False)
        return model.eval()

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the routing weights."""
        return self.route_state.experts

    # ---- routing

    def set_router(self, router: SequenceRouter) -> None:
        """Give the mixture a fitted router, whose outputs are the experts in their order.

        Raises:
            ValueError: the router has another number of outputs than there are experts, or reads another width.
        """
        if router.head.out_features != len(self.experts):
            raise ValueError(
                f"the router has {router.head.out_features} outputs, the mixture {len(self.experts)} experts "
                f"({', '.join(self.experts)}): fit a router for these experts"
            )
        width = self.get_base_model().config.get_text_config().hidden_size
        if router.head.in_features != width:
            raise ValueError(
                f"the router reads {router.head.in_features} features, this base model has {width}: "
                "fit a router on this base model"
            )
        self.moa_router = router.to(self.device).requires_grad_(False).eval()
        self.moa_config.hidden_size = width

    def features(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        prompt_mask: Tensor | None = None,
    ) -> Float[Tensor, "batch hidden"]:
        """What the router reads: the base model's pooled hidden state entering `moa_config.router_layer`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with self.route_state.set(off=True):
            return prompt_features(
                self.get_base_model(), self.moa_config.router_layer, input_ids, attention_mask, prompt_mask
            )

    @torch.no_grad()
    def route(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        *,
        prompt_mask: Tensor | None = None,
        routing: RoutingMode | None = None,
        top_k: int | None = None,
    ) -> Routing:
        """Weights of the experts for each prompt.

        Args:
            prompt_mask: which tokens are the prompt; default all that are not padding.
            routing, top_k: instead of the mixture's own.

        Raises:
            ValueError: the mixture has no fitted router.
        """
        if self.moa_router is None:
            raise ValueError(
                "this mixture has no router: fit one with training/train_moa.py, or choose the experts yourself "
                "with model.pinned([...]) or model.using(name)"
            )
        logits = self.moa_router(self.features(input_ids, attention_mask, prompt_mask))
        config = self.moa_config
        return route_logits(logits, routing or config.routing, config.top_k if top_k is None else top_k)

    @contextmanager
    def pinned(self, routing: Routing | Sequence[str]) -> Iterator[None]:
        """Keep one routing for everything inside the block.

        Args:
            routing: a `Routing`, whose one row serves a batch of any size, or a list of one expert's name a sequence.

        Raises:
            ValueError: no names, or a name that is no expert.
        """
        named = not isinstance(routing, Routing)
        weights = (route_names(routing, self.experts) if named else routing).weights
        with self.route_state.set(weights=weights, off=False, pinned=True, broadcast=not named, crossed=False):
            yield

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
        with self.route_state.set(weights=None, off=False, pinned=True):
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
        **kwargs: Any,
    ) -> Any:
        """As the base model's forward. Routes on the prompt (what `labels` marks -100) unless a routing is pinned.

        Args:
            adapter_names: one expert's name a sequence, instead of routing.

        Raises:
            ValueError: nothing is pinned and there are no `input_ids`, or a cache of earlier tokens is given.
        """
        if adapter_names is not None:
            with self._pinned_by_argument(adapter_names):
                return self.forward(input_ids, attention_mask, **kwargs)
        if not (self.route_state.pinned or self._adapters_disabled):
            cache = kwargs.get("past_key_values")
            if input_ids is None or (cache is not None and cache.get_seq_length() > 0):
                raise ValueError(
                    "a forward routes on the whole prompt as input_ids: got embeddings or a cache of earlier tokens; "
                    "call generate(), or pin the prompt's route: with model.pinned(model.route(prompt)): ..."
                )
            labels = kwargs.get("labels")
            prompt_mask = None if labels is None else labels.eq(-100)
            # left set afterwards: gradient checkpointing recomputes the layers with it
            self.route_state.weights = self.route(input_ids, attention_mask, prompt_mask=prompt_mask).weights
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def generate(
        self, inputs: Tensor | None = None, *, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """As `transformers`' generate: each prompt is routed once, and keeps its route to its last token.

        Args:
            adapter_names: one expert's name a prompt, instead of routing.
        """
        if adapter_names is not None:
            with self._pinned_by_argument(adapter_names):
                return self.generate(inputs, **kwargs)
        input_ids = kwargs.pop("input_ids", inputs)
        state = self.route_state
        if state.off or self._adapters_disabled or (state.pinned and state.weights is None):
            return super().generate(input_ids=input_ids, **kwargs)
        if not state.pinned and input_ids is None:
            raise ValueError("generate routes on input_ids: got none, pass the tokenised prompts")
        weights = state.weights if state.pinned else self.route(input_ids, kwargs.get("attention_mask")).weights
        if not (state.pinned and state.broadcast and len(weights) == 1):
            config = kwargs.get("generation_config") or self.generation_config
            weights = weights.repeat_interleave(_rows_of_a_prompt(config, kwargs), dim=0)
        with state.set(weights=weights, pinned=True):
            return super().generate(input_ids=input_ids, **kwargs)

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
        result = merge([from_model(self, name) for name in names], method, weights=weights, rank=rank, **options)
        if into is not None:
            self._add(into, result)
        return result

    def _add(self, name: str, merged: MergeResult) -> None:
        add_to_model(self, name, merged.modules)
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
        **kwargs: Any,
    ) -> MoaModel:
        """Load a saved mixture: adapters, router, settings; checks that no adapter changed since it was saved.

        Args:
            model: the base model, its name or folder, or None for the one that the mixture names.
            model_id: a folder, or a Hub repository.
            check_base: refuse another base model than the mixture was saved on.
            kwargs: `revision`, `token`, `cache_dir` for the Hub.

        Raises:
            FileNotFoundError: neither a folder nor a repository that can be reached.
            ValueError: not a saved mixture, or one of its files was changed.
        """
        from moa.saving import load_mixture

        return load_mixture(cls, model, model_id, check_base=check_base, **kwargs)

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


def _rows_of_a_prompt(config: GenerationConfig, asked: Mapping[str, Any]) -> int:
    """How many rows of a batch `generate` makes of one prompt: its beams, or the sequences to return."""
    return max(asked.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences"))

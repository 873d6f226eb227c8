"""What a mixture makes of a prompt: its routers, what they read, and the weights of the experts that follow."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

from jaxtyping import Float, Int
from peft import PeftModelForCausalLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moa.arrow import ArrowRouter
from moa.config import FALLBACK, MoaConfig, RouterConfig
from moa.depths import check_depths, check_others, router_of_layers, routers_of, spread
from moa.in_flight import reads_in_flight
from moa.mixture import RouteState
from moa.prefix import prompt_features, tokens_held
from moa.route_state import LayerRouter
from moa.router import SequenceRouter, mean_pool
from moa.router_checks import check_router, check_tokenizer, describe_router
from moa.routing import (
    Granularity,
    Routing,
    RoutingMode,
    TokenRouter,
    check_granularity,
    check_mode,
    fall_back,
    route_logits,
)
from moa.strangeness import strangeness
from moa.token_gates import TokenGates


class RoutingModel(PeftModelForCausalLM):
    """The deciding half of a mixture; `moa.routed_model.RoutedModel` runs what is decided.

    Attributes:
        moa_config: names of the experts, how to route, where the router reads.
        moa_router: the fitted `SequenceRouter`, or None.
        moa_gates: the `TokenGates`, or None.
        route_state: what the layers read.
    """

    moa_config: MoaConfig
    moa_router: SequenceRouter | None
    moa_gates: TokenGates | None
    route_state: RouteState

    @property
    def routes_in_flight(self) -> bool:
        """Whether routing costs no prefix pass: every expert leaves what the router reads as it is."""
        return reads_in_flight(self)

    @property
    def routes_by_gates(self) -> bool:
        """Whether each token chooses its experts by `moa_gates`."""
        return self.moa_gates is not None and self.route_state.layer_router is self.moa_gates

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts, in the order of the routing weights."""
        return self.route_state.experts

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
        check_others(router, self.moa_config.router.layer if fitted is None else fitted.layer)
        if fitted is None:
            fitted = describe_router(self, router, self.moa_config.router.layer)
        check_router(self, router, fitted, check_base=check_base)
        self.moa_router = router.to(self.device).requires_grad_(False).eval()
        self.moa_config.router = fitted

    def set_routing(self, routing: RoutingMode, top_k: int | None = None) -> None:
        """How weights follow from the router's scores: `hard`, `top_k`, `soft` or `conformal`, as `route_logits` says.

        Args:
            top_k: how many experts `top_k` mixes, and each token where Arrow routes tokens; None as before.

        Raises:
            ValueError: no such routing, or a `top_k` that the number of experts does not allow.
        """
        top_k = self.moa_config.top_k if top_k is None else top_k
        check_mode(routing, top_k, len(self.experts))
        self.moa_config.routing, self.moa_config.top_k = routing, top_k
        if self.moa_config.granularity == "token":
            self.set_granularity("token", by=self.moa_config.token_router)

    def set_granularity(self, granularity: Granularity, *, by: TokenRouter = "arrow") -> None:
        """Route each prompt, by the router (`sequence`) or by one at each of several depths (`layer`), or each token
        at each layer (`token`).

        Tokens need no router. `arrow` mixes the `moa_config.top_k` experts whose updates read a token most, takes the
        adapters as they are at this call, and has nothing to train (`moa.arrow`). `gates` mix all experts by a small
        gate in each layer (`moa.token_gates`): `moa_gates`, at first alike for all, to be trained with `MoaTrainer`.

        Raises:
            ValueError: another granularity, `layer` without routers at several depths, or `token` with a DoRA expert,
                which cannot be mixed.
        """
        check_granularity(granularity, by)
        if granularity == "layer":
            check_depths(self.moa_router)
        router = self._token_router(by) if granularity == "token" else None
        self.route_state.layer_router = router  # refuses experts that cannot be mixed
        if isinstance(router, TokenGates):
            self.moa_gates = router
        self.moa_config.granularity, self.moa_config.token_router = granularity, by

    def _token_router(self, by: TokenRouter) -> LayerRouter:
        base = self.get_base_model()
        if by == "arrow":
            return ArrowRouter(base, self.experts, top_k=self.moa_config.top_k)
        return self.moa_gates or TokenGates(base, self.experts).to(self.device).requires_grad_(False)

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
        *,
        layer: int | None = None,
    ) -> Float[Tensor, "batch hidden"]:
        """What the router reads: the base model's pooled hidden state entering `moa_config.router.layer`.

        Args:
            layer: instead, what the router at this other depth reads.
        """
        router = self.moa_router
        if layer not in (None, self.moa_config.router.layer):
            if router is None or str(layer) not in router.others:
                raise ValueError(f"no router of this mixture reads layer {layer}: leave it out for the mixture's own")
            router = router.others[str(layer)]
        layer, pool = layer or self.moa_config.router.layer, mean_pool if router is None else router.pool
        return self._read({layer: pool}, input_ids, attention_mask, prompt_mask)[layer]

    def _read(
        self,
        pools: Mapping[int, Callable[[Tensor, Tensor], Tensor]],
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_mask: Tensor | None,
    ) -> dict[int, Float[Tensor, "batch hidden"]]:
        """The base model's hidden states entering some layers, pooled: one prefix pass."""
        held = tokens_held(input_ids, attention_mask)
        with self.route_state.set(off=True):
            return prompt_features(self.get_base_model(), pools, input_ids, held.long(), prompt_mask)

    def route(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        *,
        prompt_mask: Tensor | None = None,
        routing: RoutingMode | None = None,
        top_k: int | None = None,
        granularity: Granularity | None = None,
        abstain: bool = True,
    ) -> Routing:
        """Weights of the experts for each prompt; they carry gradients where the router's parameters want them.

        A prompt that is stranger than `moa_config.router.abstention` allows runs the merged adapter (`set_fallback`)
        or the base model instead, but never in training mode, where it teaches its experts.

        Args:
            prompt_mask: which tokens are the prompt; default all that are not padding.
            routing, top_k: instead of the mixture's own.
            granularity: `sequence` or `layer`, instead of the mixture's own; tokens are routed in the forward.
            abstain: False trusts the experts with every prompt.

        Raises:
            ValueError: the mixture has no fitted router, or one without the conformal set that `routing`, or the other
                depths that `granularity` asks for.
        """
        if self.moa_router is None:
            raise ValueError(
                "this mixture has no router: fit one with training/train_moa.py, or choose the experts yourself "
                "with model.pinned([...]) or model.using(name)"
            )
        if granularity is not None:
            check_granularity(granularity)
        if granularity == "layer":
            check_depths(self.moa_router)
        routers = routers_of(self, granularity)
        pools = {layer: router.pool for layer, router in routers.items()}
        pooled = self._read(pools, input_ids, attention_mask, prompt_mask)
        decided = {"routing": routing, "top_k": top_k}
        routed = self.decide(pooled[self.moa_config.router.layer], **decided, abstain=abstain)
        if len(routers) == 1:
            return routed
        at_depths = {
            layer: self.decide(pooled[layer], router=router, **decided, abstain=False).weights
            for layer, router in routers.items()
        }
        followed = router_of_layers(self.get_base_model(), self.route_state.layers, list(routers))
        return spread(routed, at_depths, followed)

    def decide(
        self,
        pooled: Float[Tensor, "batch hidden"],
        *,
        router: SequenceRouter | None = None,
        routing: RoutingMode | None = None,
        top_k: int | None = None,
        abstain: bool = True,
    ) -> Routing:
        """Weights of the experts for prompts whose features are there; arguments and errors as for `route`."""
        config = self.moa_config
        logits = (router or self.moa_router)(pooled)
        top_k = config.top_k if top_k is None else top_k
        routed = route_logits(logits, routing or config.routing, top_k, config.router.floor)
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

"""MoaModel: several LoRA experts on one base model, and a router that picks or mixes them for each prompt.

    model = MoaModel.from_adapters(base, {"sst2": "outputs/sst2", "squad": "outputs/squad"})
    model = MoaModel.from_pretrained(base, "outputs/moa")      # with its router
    model.generate(**tokenizer(prompts, return_tensors="pt"))  # each prompt through its own expert
    model.merge_adapters(method="ties", into="merged")         # or one adapter for all of them

It is a `PeftModelForCausalLM` that holds ordinary LoRA adapters, so that everything which takes one takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moa.adapters import add_to_model, from_model
from moa.assembly import assemble, check_adapter_name
from moa.base_model import load_base_model, portable_name
from moa.config import CONFIG_NAME, FALLBACK, Fallback, MoaConfig, RouterConfig
from moa.growing import Growth, Prompts, add_expert, remove_expert
from moa.mixture import RouteState
from moa.prefix import default_layer
from moa.routed_model import RoutedModel
from moa.routing import Granularity, RoutingMode

if TYPE_CHECKING:
    from moa.merging import MergeResult


class MoaModel(RoutedModel):
    """A Mixture-of-LoRAs; make one with `from_adapters` or `from_pretrained`.

    `RoutingModel` has what it makes of a prompt (`route`, `set_router`, `set_granularity`; `moa_config`, `moa_router`,
    `route_state`), `RoutedModel` what it does with it (`forward`, `generate`, `pinned`, `using`).

    Attributes:
        expert_folders: where each expert was loaded from, if that is on this machine, to find its statistics there.
    """

    expert_folders: dict[str, Path]

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
        autocast_adapter_dtype: bool = True,
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
            autocast_adapter_dtype: as in PEFT: keep and compute adapters in float32 where the base model is in half
                precision. False computes them in the base model's dtype, which is faster on a GPU.

        Raises:
            ValueError: no adapters, a name that PEFT cannot hold, adapters of different base models, a base that
                holds adapters already, or an adapter that is more than LoRA or DoRA on linear layers, or not finite.
        """
        if isinstance(base, str | Path):
            base = load_base_model(str(base))
        options = {"check_base": check_base, "autocast_adapter_dtype": autocast_adapter_dtype}
        model = assemble(cls, base, adapters, **options)
        model.moa_config = MoaConfig(
            base_model=portable_name(base),
            experts=list(adapters),
            router=RouterConfig(layer=default_layer(base) if router_layer is None else router_layer),
            routing=routing,
            top_k=top_k,
            check_base=check_base,
        )
        model.moa_router = model.moa_gates = None
        model.expert_folders = {name: Path(path) for name, path in adapters.items() if Path(path).is_dir()}
        model.route_state = RouteState(tuple(adapters), model.peft_config)
        model.gate_layers()
        model.set_granularity(granularity)
        model.requires_grad_(False)
        return model.eval()

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
            options: options of the method, `scale` and `seed`. Statistics that a method needs are found where
                `moa statistics` wrote them, in the folders that the experts were loaded from.

        Raises:
            ValueError: an unknown adapter, method or option, or a name in `into` that is taken or not usable.
        """
        from moa.merging import find_method, merge

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
        if "statistics" in find_method(method).needs and (beside := self._statistics_of(names)):
            options.setdefault("statistics", beside)
        members = [from_model(self, name) for name in names]
        if any(member.extras for member in members):  # DoRA's merge depends on the base model's weights
            options.setdefault("base", self)
        result = merge(members, method, weights=weights, rank=rank, **options)
        if into is not None:
            self._add(into, result)
        return result

    def _statistics_of(self, names: Sequence[str]) -> list[Path]:
        """What `moa statistics` wrote into the folders of these experts; none unless all have it."""
        from moa.merging.statistics import STATISTICS_FILE

        files = [self.expert_folders[name] / STATISTICS_FILE for name in names if name in self.expert_folders]
        return files if len(files) == len(names) and all(file.is_file() for file in files) else []

    def _add(self, name: str, merged: MergeResult) -> None:
        add_to_model(self, name, merged.modules, kinds=merged.kinds, extras=merged.extras)
        self.gate_layers()

    def set_fallback(self, method: str = "svd", **options: Any) -> MergeResult:
        """Merge the experts into the adapter at the root of the saved folder, which plain PEFT and vLLM load.

        Args:
            options: as for `merge_adapters`.
        """
        result = self.merge_adapters(method, **options)
        if FALLBACK in self.peft_config:
            self.delete_adapter(FALLBACK)
        self._add(FALLBACK, result)
        report = result.report
        asked = {"rank": report.rank, "seed": report.seed, "restore_norm": report.restore_norm, **report.options}
        self.moa_config.fallback = Fallback(method, dict(report.weights), report.scale, asked)
        return result

    def merge_fallback_again(self, adapters: Sequence[str] | None = None) -> MergeResult:
        """Merge the experts as they are now, as the fallback that there is was merged; by `svd` where there is none.

        Args:
            adapters: merge these instead, with equal weights.

        Raises:
            ValueError: what the merge reads beside the experts, such as statistics or examples, is not at hand.
        """
        fallback = self.moa_config.fallback
        if fallback is None:
            return self.set_fallback(adapters=adapters)
        weights = list(fallback.weights.values()) if adapters is None else None
        adapters = list(fallback.weights) if adapters is None else adapters
        settings = {"scale": fallback.scale, **_settings(fallback)}
        return self.set_fallback(fallback.method, adapters=adapters, weights=weights, **settings)

    # ---- saving and loading

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's, by which a plain Trainer resumes: the merged adapter, each expert, and none of the rest.

        Raises:
            ValueError: the merged adapter, while more than the active expert learns, which a plain Trainer would go
                on with as if nothing had been learnt.
        """
        merged, active = adapter_name == FALLBACK, self.active_adapter
        learning = (name for name, parameter in self.named_parameters() if parameter.requires_grad)
        if merged and not all(active in name.split(".") for name in learning):
            raise ValueError(
                f"a plain Trainer restores the active expert alone, {active!r}, and more than that learns here: "
                "resume with MoaTrainer or MoaSFTTrainer (moa.training.moa_trainer), which take the same checkpoints"
            )
        loaded = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        described = Path(model_id) / CONFIG_NAME
        if merged and self.moa_config.fallback is None and described.is_file():
            self.moa_config.fallback = MoaConfig.from_json(described).fallback
        return loaded

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel | str | Path | None,
        model_id: str | Path,
        *,
        check_base: bool = True,
        router: bool = True,
        autocast_adapter_dtype: bool = True,
        dtype: str = "auto",
        attn_implementation: str = "auto",
        **kwargs: Any,
    ) -> MoaModel:
        """Load a saved mixture: adapters, router, settings; checks that no adapter changed since it was saved.

        Args:
            model: the base model, its name or folder, or None for the one that the mixture names.
            model_id: a folder, or a Hub repository.
            check_base: refuse another base model than the mixture was saved on.
            router: False leaves the fitted router out, to give it another one.
            autocast_adapter_dtype: as for `from_adapters`.
            dtype, attn_implementation: of a base model that is loaded here, as for `load_base_model`.
            kwargs: `revision`, `token`, `cache_dir` for the Hub.

        Raises:
            FileNotFoundError: neither a folder nor a repository that can be reached.
            ValueError: not a saved mixture, or one of its files was changed.
        """
        from moa.saving import load_mixture

        computing = {"dtype": dtype, "attn_implementation": attn_implementation}
        options = {"check_base": check_base, "router": router, "autocast_adapter_dtype": autocast_adapter_dtype}
        return load_mixture(cls, model, model_id, computing=computing, **options, **kwargs)

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


def _settings(fallback: Fallback) -> dict[str, Any]:
    """What a merge like it is asked for beside method, weights and scale."""
    from moa.merging.ranks import RankRule

    rank = fallback.settings.get("rank")
    return fallback.settings | {"rank": RankRule(**rank) if isinstance(rank, dict) else rank}

"""What PEFT needs to be told of an adapter: settings, names of tensors, and what cannot stand in one adapter."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from moa.extras import EMBEDDING, LINEAR, Extras, Kind
from moa.low_rank import LowRank
from moa.peft_checks import AdapterError


def lora_config(
    ranks: Mapping[str, int], kinds: Mapping[str, Kind] | None = None, extras: Extras | None = None
) -> dict[str, Any]:
    """PEFT's settings for a LoRA on exactly these modules, with a scale of 1 for each.

    Full module names, because a suffix such as "q_proj" also hits the layers that were left out. `r` is the
    largest rank, which is the one that servers compare with their limit. What is beside the factors is switched on
    only where there is any.
    """
    if not ranks or min(ranks.values()) < 1:
        raise AdapterError("an adapter needs at least one module, and at least rank 1 in each")
    extras = extras or Extras()
    check_storable(ranks, kinds or {}, [extras])
    largest = max(ranks.values())
    pattern = {_pattern_key(name, ranks): rank for name, rank in ranks.items() if rank != largest}
    config = {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": _bias(extras, ranks),
        "use_rslora": False,
        "use_dora": bool(extras.magnitude),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if extras.lora_bias:
        config["lora_bias"] = True
    if extras.saved:
        config["modules_to_save"] = _outermost(parent_of(name) for name in extras.saved)
    if extras.tokens:
        config["trainable_token_indices"] = {name: t.indices.tolist() for name, t in sorted(extras.tokens.items())}
    return config


def check_storable(modules: Collection[str], kinds: Mapping[str, Kind], extras: Sequence[Extras]) -> None:
    """Refuse what PEFT cannot hold in one adapter, before anything is computed for it.

    Args:
        modules: layers with factors.
        extras: what is to be stored together with them, of one adapter or of several that will be one.
    """
    held = {what: name for extra in extras for what, names in extra.names.items() for name in names[:1]}
    if "lora_bias" in held and "DoRA magnitudes" in held:
        raise AdapterError(
            f"lora_bias of {held['lora_bias']!r} and the DoRA magnitude of {held['DoRA magnitudes']!r} do not go "
            f"together: PEFT counts the bias into the row norms that a magnitude is divided by"
        )
    embedding = next((name for name in modules if kinds.get(name) == EMBEDDING), None)
    if "lora_bias" in held and embedding is not None:
        raise AdapterError(
            f"lora_bias of {held['lora_bias']!r} and the LoRA on the embedding {embedding!r} do not go together: "
            f"PEFT has no lora_bias for embeddings, and switches it on for all layers or none"
        )
    whole = {parent_of(name) for extra in extras for name in extra.saved}
    tokens = {name for extra in extras for name in extra.tokens}
    for some, what, others, how in (
        (whole, "trained as a whole (modules_to_save)", modules, "by a LoRA"),
        (whole, "trained as a whole (modules_to_save)", tokens, "for some tokens (trainable_token_indices)"),
        (tokens, "trained for some tokens (trainable_token_indices)", modules, "by a LoRA"),
    ):
        if both := sorted(some & set(others)):
            raise AdapterError(
                f"{both[0]!r} is {what} and also {how}, and one PEFT adapter cannot hold both: "
                f"merge without one of the two adapters"
            )


def stored_factors(
    name: str, update: LowRank, kind: Kind = LINEAR, magnitude: Tensor | None = None, bias: Tensor | None = None
) -> Iterator[tuple[str, Tensor]]:
    """One layer's tensors, in the shapes and under the names (within the layer) by which PEFT stores them."""
    lead = "lora_embedding_{}" if kind == EMBEDDING else "lora_{}.weight"
    spatial = (1,) * (len(kind.kernel) - 1)
    if kind.name == "convolution":
        yield "lora_A.weight", update.A.unflatten(1, kind.kernel)
        yield "lora_B.weight", update.B.reshape(*update.B.shape, *spatial)
    else:
        yield lead.format("A"), update.A
        yield lead.format("B"), update.B
    if magnitude is not None:
        convolution = kind.name == "convolution"
        yield "lora_magnitude_vector", magnitude.reshape(1, -1, *spatial) if convolution else magnitude
    if bias is not None:
        yield "lora_B.bias", bias


def parent_of(parameter: str) -> str:
    """The module that a parameter belongs to, by name."""
    return parameter.rpartition(".")[0]


def _outermost(modules: Iterable[str]) -> list[str]:
    """The modules that lie inside no other of them: PEFT wraps a module with all that is inside."""
    names = sorted(set(modules))
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _bias(extras: Extras, adapted: Collection[str]) -> str:
    if not extras.base_bias:
        return "none"
    return "lora_only" if all(parent_of(name) in adapted for name in extras.base_bias) else "all"


def _pattern_key(name: str, modules: Iterable[str]) -> str:
    """PEFT's keys are patterns for the end of a name; one that would hit a second module is anchored."""
    return f"^{re.escape(name)}" if any(other.endswith(f".{name}") for other in modules) else name

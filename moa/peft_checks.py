"""Can this adapter be read, and do its config and its tensors tell the same story?

PEFT's LoraConfig can switch on a dozen things that make an adapter more than `B @ A`. What extras.py can hold is
read; the rest would be read into a wrong adapter without complaint, so each is refused here, with its reason.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Set
from functools import reduce
from typing import Any, NamedTuple

import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

UNSUPPORTED = {
    "layer_replication": "it was trained on a base model with repeated layers",
    "target_parameters": "it adapts bare parameters (fused experts), not linear layers",
    "alora_invocation_tokens": "activated LoRA acts only after its invocation tokens",
    "use_qalora": "QA-LoRA pools the layer's input before A",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "arrow_config": "Arrow is a router over other adapters",
    "kasa_config": "KaSA puts a trained diagonal between the factors",
    "velora_config": "VeLoRA stores compressed activations beside the factors",
    "monteclora_config": "MonteCLoRA samples its factors",
}
# Initialisations that move part of the base weights into the factors: right on that changed base only.
MUTATING_INITS = ("pissa", "olora", "corda", "lora_ga")
# The rest of LoraConfig, which changes training or is read here.
HARMLESS = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "megatron_config",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "ensure_weight_tying",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "runtime_config",
}


class AdapterError(ValueError):
    """An adapter that cannot be read, written or combined as asked: one sentence for the user."""


class Shape(NamedTuple):
    """Sizes of one update: B is [o, r] and A is [r, n]."""

    o: int
    r: int
    n: int


def refuse_unsupported(config: Mapping[str, Any], where: str, *, initial: bool = False) -> None:
    """Raise AdapterError unless the config describes a LoRA that is read here, as what it is.

    Args:
        initial: the adapter as it was before training is known too, so that an initialisation which changed the
            base weights can be taken out again.
    """
    _check_values(config, where)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{where} is a {config.get('peft_type')} adapter, and only LORA adapters can be read")
    for option, reason in UNSUPPORTED.items():
        if config.get(option):
            raise AdapterError(f"{where} is no plain LoRA because of {option}={config[option]!r}: {reason}")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise AdapterError(f"{where}: bias in the config must be none, all or lora_only, got {config['bias']!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() == "loftq":
        raise AdapterError(
            f"{where} was initialised by 'loftq', which replaces the base weights by quantised ones that no adapter "
            f"holds, so it is wrong on the stock base"
        )
    if changes_the_base(config) and not initial:
        raise AdapterError(
            f"{where} was initialised by {init!r}, which changes the base weights, so it is wrong on the "
            f"stock base: save it with path_initial_model_for_weight_conversion to turn it into plain LoRA, or give "
            f"the adapter as it was before training (initial=..., --initial)"
        )
    known = HARMLESS | set(UNSUPPORTED)
    if unknown := sorted(k for k, v in config.items() if v and k not in known):
        warnings.warn(f"{where}: ignoring config entries that are not known here: {', '.join(unknown)}", stacklevel=3)


def _check_values(config: Mapping[str, Any], where: str) -> None:
    """Refuse values that PEFT could not have written, before anything is done with them."""
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        if isinstance(value, str):
            _check_pattern(value, key, where)
        elif value is not None and not _is_list_of_names(value):
            raise AdapterError(f"{where}: {key} in the config must be a pattern or a list of names, got {value!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, Mapping):
            raise AdapterError(f"{where}: {key} in the config must map patterns to numbers, got {value!r}")
        for pattern in value:
            _check_pattern(pattern, key, where)
            _number(value, pattern, f"{where}: {key}")
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None):
            raise AdapterError(f"{where}: {key} in the config must be text, got {config[key]!r}")
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if not isinstance(config.get(key), bool | None):
            raise AdapterError(f"{where}: {key} in the config must be true or false, got {config[key]!r}")


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, list | tuple | Set) and all(isinstance(name, str) for name in value)


def _check_pattern(pattern: str, key: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise AdapterError(
            f"{where}: {key} in the config has {pattern!r}, which is no regular expression ({error})"
        ) from error


def changes_the_base(config: Mapping[str, Any]) -> bool:
    """Whether the adapter was initialised by moving part of the base weights into its factors."""
    return str(config.get("init_lora_weights")).lower().startswith(MUTATING_INITS)


def scalings(config: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> dict[str, float]:
    """Module name to `alpha / r`, or `alpha / sqrt(r)` for rsLoRA, with ranks that agree with the tensors."""
    rank, alpha = _number(config, "r", where), _number(config, "lora_alpha", where)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    result = {}
    for module, shape in shapes.items():
        expected = _by_pattern(ranks, module, rank)
        if expected != shape.r:
            raise AdapterError(
                f"{where}: the config says rank {expected:g} for {module!r} and the tensors have rank "
                f"{shape.r}: config and weights are not of one adapter"
            )
        numerator = float(_by_pattern(alphas, module, alpha))
        result[module] = numerator / (math.sqrt(shape.r) if config.get("use_rslora") else shape.r)
    return result


def check_targets(config: Mapping[str, Any], modules: Iterable[str], where: str) -> None:
    """Every stored module must be one that the config targets; a target without a module is warned of.

    Such a target is legal, since PEFT passes over names that the base model lacks, but it is also what a file
    looks like from which layers were lost.
    """
    targets, excluded = (_patterns(config.get(key)) for key in ("target_modules", "exclude_modules"))
    modules = list(modules)
    if targets == "all-linear":
        targets = ".*"
    # PEFT strikes a head that it ties to the adapted embedding from the list, and stores its factors all the same.
    tied = [m for m in modules if config.get("ensure_weight_tying") and _matches(m, {"lm_head"})]
    if unexpected := sorted(
        m for m in modules if m not in tied and (not _matches(m, targets) or _matches(m, excluded))
    ):
        raise AdapterError(
            f"{where}: the weights hold {unexpected[0]!r} (and {len(unexpected) - 1} more), which the config's "
            f"target_modules and exclude_modules leave out: config and weights are not of one adapter"
        )
    named = [] if isinstance(targets, str) else [t for t in targets if not _matches(t, excluded)]
    held = {end for module in modules for end in _ends(module)}
    if lost := sorted(t for t in named if t not in held):
        warnings.warn(
            f"{where}: target_modules names {', '.join(lost[:3])}{' ...' * (len(lost) > 3)} and the weights hold "
            f"nothing for it: the file is incomplete, unless the base model has no such layer",
            stacklevel=3,
        )


def _patterns(given: str | Iterable[str] | None) -> str | frozenset[str]:
    return given if isinstance(given, str) else frozenset(given or ())


def _matches(module: str, patterns: str | Set[str]) -> bool:
    """Whether a module is one of PEFT's target_modules or exclude_modules: a pattern, or ends of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return not patterns.isdisjoint(_ends(module))


def _ends(module: str) -> list[str]:
    """`a.b.c`, `b.c` and `c` of `a.b.c`."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key  # seconds to import, and most adapters have no pattern

    return patterns.get(get_pattern_key(list(patterns), module), default)


def _number(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{where}: {key} in the config must be a number, got {value!r}")
    return value


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor an infinity: its sum tells both, unless finite entries overflow it."""
    return math.isfinite(tensor.sum()) or bool(tensor.isfinite().all())


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The smallest dtype that holds values of all of these (float16 with bfloat16 gives float32)."""
    return reduce(torch.promote_types, dtypes)

"""Is this a plain LoRA adapter, and do its config and its tensors tell the same story?

PEFT's LoraConfig can switch on a dozen things that make an adapter more than `B @ A`. Read as if it were
plain, such an adapter merges without complaint into a wrong one. So each is refused here, with its reason.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."
FACTOR_KEY = re.compile(re.escape(KEY_PREFIX) + r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")

UNSUPPORTED = {
    "use_dora": "DoRA also learns a magnitude for every output, so its update is not B @ A alone",
    "lora_bias": "it trains a bias on lora_B, which B @ A does not hold",
    "modules_to_save": "it carries whole trained modules, which are no low-rank updates",
    "trainable_token_indices": "it carries trained token embeddings, which are no low-rank updates",
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
MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
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
    "runtime_config",
}
BASE_COPY = re.compile(re.escape(KEY_PREFIX) + r"(?P<module>(.+\.)?lm_head)\.base_layer\.weight")
UNSUPPORTED_TENSORS = {
    "lora_embedding_": "LoRA on an embedding, and only linear layers are supported",
    "lora_magnitude_vector": "a DoRA magnitude, whose update is not B @ A alone",
    ".lora_B.bias": "a bias on lora_B, which B @ A does not hold",
    ".base_layer.": "a weight of the base model itself, which B @ A does not hold",
}


class AdapterError(ValueError):
    """An adapter that cannot be read, written or combined as asked: one sentence for the user."""


class Shape(NamedTuple):
    """Sizes of one update: B is [o, r] and A is [r, n]."""

    o: int
    r: int
    n: int


def refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError unless the config describes plain LoRA on linear layers."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{where} is a {config.get('peft_type')} adapter, and only LORA adapters can be read")
    for option, reason in UNSUPPORTED.items():
        if config.get(option):
            raise AdapterError(f"{where} is no plain LoRA because of {option}={config[option]!r}: {reason}")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{where} is no plain LoRA because of bias={config['bias']!r}: it also changed "
            f"the base model's biases, which B @ A does not hold"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(MUTATING_INITS):
        raise AdapterError(
            f"{where} was initialised by {init!r}, which changes the base weights, so it is wrong on the "
            f"stock base: save it with path_initial_model_for_weight_conversion to turn it into plain LoRA"
        )
    unknown = sorted(k for k, v in config.items() if v and k not in HARMLESS and k not in UNSUPPORTED)
    if unknown:
        warnings.warn(f"{where}: ignoring config entries that are not known here: {', '.join(unknown)}", stacklevel=3)


def without_base_copies(keys: Iterable[str], where: str) -> list[str]:
    """Names of the stored tensors, without the base model's head that PEFT stores beside a LoRA on it.

    PEFT freezes that head, so its copy says nothing new. Whether somebody trained it all the same cannot be seen
    without the base model, which is why the copy is not dropped in silence.
    """
    keys = list(keys)
    copies = [m[0] for m in map(BASE_COPY.fullmatch, keys) if m and f"{KEY_PREFIX}{m['module']}.lora_A.weight" in keys]
    if copies:
        warnings.warn(
            f"{where}: {copies[0]!r} is not read: PEFT stores the base model's own head beside a LoRA on it; if you "
            f"trained or replaced that head, save it in the base model first",
            stacklevel=3,
        )
    return [key for key in keys if key not in copies]


def factor_shapes(sizes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Shape]:
    """Module name to sizes, from the stored tensors' names and sizes; every tensor must be half of a pair."""
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, size in sizes.items():
        match = FACTOR_KEY.fullmatch(key)
        if match is None:
            known = (reason for part, reason in UNSUPPORTED_TENSORS.items() if part in key)
            raise AdapterError(f"{where} holds {key!r}: {next(known, 'not a LoRA factor as PEFT names it')}")
        factors.setdefault(match["module"], {})[match["factor"]] = tuple(size)
    if not factors:
        raise AdapterError(f"{where} holds no LoRA factors")
    return {module: factor_shape(module, pair, where) for module, pair in sorted(factors.items())}


def factor_shape(module: str, pair: Mapping[str, tuple[int, ...]], where: str) -> Shape:
    """Sizes of one module's pair of factors."""
    if missing := {"A", "B"} - set(pair):
        raise AdapterError(f"{where}: {module!r} has no lora_{missing.pop()}, so the adapter is incomplete")
    A, B = pair["A"], pair["B"]
    if len(A) != 2 or len(B) != 2:
        raise AdapterError(
            f"{where}: the factors of {module!r} have sizes {list(A)} and {list(B)} (a convolution?), and "
            f"only linear layers are supported"
        )
    if A[0] != B[1] or 0 in (*A, *B):
        raise AdapterError(
            f"{where}: lora_A {list(A)} and lora_B {list(B)} of {module!r} do not fit: A is [r, in] and B is [out, r]"
        )
    return Shape(B[0], A[0], A[1])


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
    targets, excluded, modules = config.get("target_modules"), config.get("exclude_modules"), list(modules)
    if targets == "all-linear":
        targets = ".*"
    if unexpected := sorted(m for m in modules if not _matches(m, targets) or _matches(m, excluded)):
        raise AdapterError(
            f"{where}: the weights hold {unexpected[0]!r} (and {len(unexpected) - 1} more), which the config's "
            f"target_modules and exclude_modules leave out: config and weights are not of one adapter"
        )
    named = [t for t in targets or () if not _matches(t, excluded)] if not isinstance(targets, str) else []
    if lost := sorted(t for t in named if not any(_matches(m, [t]) for m in modules)):
        warnings.warn(
            f"{where}: target_modules names {', '.join(lost[:3])}{' ...' * (len(lost) > 3)} and the weights hold "
            f"nothing for it: the file is incomplete, unless the base model has no such layer",
            stacklevel=3,
        )


def _matches(module: str, patterns: str | Iterable[str] | None) -> bool:
    """Whether a module is one of PEFT's target_modules or exclude_modules: a pattern, or ends of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(module == pattern or module.endswith(f".{pattern}") for pattern in patterns or ())


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


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The smallest dtype that holds values of all of these (float16 with bfloat16 gives float32)."""
    return reduce(torch.promote_types, dtypes)

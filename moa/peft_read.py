"""PEFT's stored tensors to updates and extras: which name means what, for folders and for live models alike."""

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa.extras import EMBEDDING, Extras, Kind, Lazy, Tokens
from moa.low_rank import LowRank
from moa.peft_checks import KEY_PREFIX, AdapterError, Shape, all_finite, check_targets, scalings, widest

TENSOR_NAMES = {
    "factor": r"(?P<module>.+)\.lora_(?P<which>[AB])\.weight",
    "embedding": r"(?P<module>.+)\.lora_embedding_(?P<which>[AB])",
    "lora_bias": r"(?P<module>.+)\.lora_B\.bias",
    "magnitude": r"(?P<module>.+)\.lora_magnitude_vector",
    "tokens": r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta",
    "base_copy": r"(?P<module>.+)\.base_layer\.weight",
    "base_bias": r"(?P<module>.+?)(\.base_layer)?\.bias",
}
OTHER_REASONS = {
    ".base_layer.": "a weight of the base model itself, which B @ A does not hold",
    r"(embed_tokens|lm_head)\.weight$": "a whole embedding that modules_to_save does not name, which PEFT stores "
    "after the vocabulary was resized, so that there is no one base model to merge on",
}


@dataclass(frozen=True, eq=False)
class Stored:
    """The tensors of one adapter under the names that PEFT stores them by, read when asked for."""

    where: str
    sizes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    tensor: Callable[[str], Tensor]

    def finite(self, key: str, what: str) -> Tensor:
        """A tensor without NaN; `what` names it in the error."""
        tensor = self.tensor(key)
        if not all_finite(tensor):
            raise AdapterError(
                f"{self.where}: the {what} hold NaN or infinite values, so the training "
                f"diverged or the file is damaged: use an earlier checkpoint"
            )
        return tensor


@dataclass(frozen=True, eq=False)
class LazyUpdates(Mapping[str, LowRank]):
    """Layer name to update, computed each time it is asked for, in one dtype."""

    compute: Callable[[str, torch.dtype], LowRank]
    shapes: Mapping[str, Shape]
    dtype: torch.dtype

    def __getitem__(self, module: str) -> LowRank:
        if module not in self.shapes:
            raise KeyError(module)
        return self.compute(module, self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Parts(NamedTuple):
    """What one adapter is made of; see `moa.adapters.Adapter`."""

    modules: LazyUpdates
    kinds: dict[str, Kind]
    extras: Extras
    dtype: torch.dtype


@dataclass
class _Keys:
    """The names of stored tensors by what they mean: module (and factor A or B) or parameter to key."""

    factor: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    embedding: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    magnitude: dict[str, str] = field(default_factory=dict)
    lora_bias: dict[str, str] = field(default_factory=dict)
    base_bias: dict[str, str] = field(default_factory=dict)
    saved: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, dict[str, str]]:
        """Of all kinds of layers, in order of their names."""
        return dict(sorted({**self.factor, **self.embedding}.items()))

    def matrices(self) -> Iterator[str]:
        """The keys of all that is more than a vector for each layer."""
        for pair in self.factors.values():
            yield from pair.values()
        yield from self.saved.values()
        yield from self.tokens.values()


def parts_of(
    stored: Stored,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    *,
    scaling: Mapping[str, float] | None = None,
    initial: Stored | None = None,
) -> Parts:
    """Updates and extras of an adapter; only names and sizes are looked at here.

    Args:
        scaling: of each layer, where it is known better than by the config.
        initial: the same adapter before training, whose product is taken out: delta = s (B A - B0 A0), rank 2 r.

    Raises:
        AdapterError: a tensor that is not understood, or config and tensors that disagree.
    """
    keys = _sorted_keys(stored.sizes, config, stored.where)
    shapes, kinds = _shapes(stored, keys)
    scaling = scaling or scalings(config, shapes, stored.where)
    check_targets(config, shapes, stored.where)
    _check_complete(config, keys, stored.where)
    read = _factor_reader(stored, keys.factors)
    if initial is not None:
        before = _sorted_keys(initial.sizes, config, initial.where)
        if _shapes(initial, before) != (shapes, kinds):
            raise AdapterError(
                f"{initial.where} has other layers or ranks than {stored.where}: give the same adapter, "
                f"saved before its training"
            )
        read = _difference(read, _factor_reader(initial, before.factors))
        shapes = {module: Shape(o, 2 * r, n) for module, (o, r, n) in shapes.items()}

    def update(module: str, dtype: torch.dtype) -> LowRank:
        B, A = read(module)
        return LowRank(B.to(dtype), A.to(dtype)).scaled(scaling[module])

    return Parts(
        modules=LazyUpdates(update, shapes, dtype),
        kinds=kinds,
        extras=_extras(stored, keys, config, scaling),
        dtype=widest(stored.dtypes[key] for key in keys.matrices()),
    )


def _sorted_keys(stored: Collection[str], config: Mapping[str, Any], where: str) -> _Keys:
    """What each stored tensor means; an AdapterError names the first that means nothing."""
    keys, copies = _Keys(), {}
    for key in stored:
        kind, match = _meaning(key, config)
        if kind == "base_copy":
            copies[match["module"]] = key
        elif kind in ("factor", "embedding"):
            getattr(keys, kind)[match["module"]][match["which"]] = key
        elif kind == "saved":
            keys.saved[key.removeprefix(KEY_PREFIX)] = key
        elif kind == "base_bias":
            keys.base_bias[f"{match['module']}.bias"] = key
        elif kind:
            getattr(keys, kind)[match["module"]] = key
        else:
            reasons = (reason for part, reason in OTHER_REASONS.items() if re.search(part, key))
            raise AdapterError(f"{where} holds {key!r}: {next(reasons, 'not a LoRA factor as PEFT names it')}")
    if not keys.factors:
        raise AdapterError(f"{where} holds no LoRA factors")
    _pass_over_copies(copies, keys, where)
    return keys


def _meaning(key: str, config: Mapping[str, Any]) -> tuple[str | None, re.Match | None]:
    for kind, pattern in TENSOR_NAMES.items():
        match = re.fullmatch(re.escape(KEY_PREFIX) + pattern, key)
        if kind == "base_copy" and _is_saved(key, config):  # from here on, names that a saved module can have too
            return "saved", None
        if match and (kind != "base_bias" or config.get("bias", "none") != "none"):
            return kind, match
    return None, None


def _is_saved(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a parameter belongs to a module of modules_to_save, which PEFT matches by the end of its name."""
    names = tuple(config.get("modules_to_save") or ())
    if names and config.get("ensure_weight_tying"):
        names += ("lm_head",)  # struck from the config's list, and stored all the same
    parts = key.removeprefix(KEY_PREFIX).split(".")
    return bool(names) and any(".".join(parts[:end]).endswith(names) for end in range(1, len(parts)))


def _pass_over_copies(copies: Mapping[str, str], keys: _Keys, where: str) -> None:
    """Leave out the base model's embedding or head that PEFT stores beside a LoRA on it.

    PEFT freezes it, so its copy says nothing new. Whether somebody trained it all the same cannot be seen
    without the base model, which is why the copy is not dropped in silence.
    """
    for module, key in copies.items():
        if module not in keys.embedding and not re.fullmatch(r"(.+\.)?lm_head", module) or module not in keys.factors:
            raise AdapterError(f"{where} holds {key!r}: {OTHER_REASONS['.base_layer.']}")
        warnings.warn(
            f"{where}: {key!r} is not read: PEFT stores the base model's own {module.rpartition('.')[2]} beside a "
            f"LoRA on it; if you trained or replaced it, save it in the base model first",
            stacklevel=5,
        )


def _shapes(stored: Stored, keys: _Keys) -> tuple[dict[str, Shape], dict[str, Kind]]:
    """Sizes of the updates as matrices, and the kind of each layer that is not linear."""
    shapes, kinds = {}, {}
    for module, pair in keys.factors.items():
        if missing := {"A", "B"} - set(pair):
            raise AdapterError(f"{stored.where}: {module!r} has no lora_{missing.pop()}, so the adapter is incomplete")
        A, B = (tuple(stored.sizes[pair[which]]) for which in "AB")
        convolution = len(A) == len(B) > 2 and set(B[2:]) == {1}
        if not (len(A) == len(B) == 2 or convolution) or A[0] != B[1] or 0 in (*A, *B):
            raise AdapterError(
                f"{stored.where}: lora_A {list(A)} and lora_B {list(B)} of {module!r} do not fit: A is [r, in] and B "
                f"is [out, r], for a convolution with its kernel sizes and without groups"
            )
        shapes[module] = Shape(B[0], A[0], math.prod(A[1:]))
        if module in keys.embedding:
            kinds[module] = EMBEDDING
        elif convolution:
            kinds[module] = Kind("convolution", A[1:])
    return shapes, kinds


def _check_complete(config: Mapping[str, Any], keys: _Keys, where: str) -> None:
    """What the config switches on is there, DoRA's and lora_bias' tensors for every layer, and nothing else is."""
    held = {
        "use_dora": keys.magnitude,
        "lora_bias": keys.lora_bias,
        "modules_to_save": keys.saved,
        "trainable_token_indices": keys.tokens,
    }
    for option, found in held.items():
        incomplete = option in ("use_dora", "lora_bias") and set(found) != set(keys.factors)
        if bool(found) != bool(config.get(option)) or (found and incomplete):
            raise AdapterError(
                f"{where}: the config says {option}={config.get(option)!r} and the weights hold {len(found)} tensors "
                f"that belong to it, beside {len(keys.factors)} layers: config and weights are not of one adapter"
            )


def _factor_reader(stored: Stored, factors: Mapping[str, dict[str, str]]) -> Callable[[str], tuple[Tensor, Tensor]]:
    """Layer name to its B [o, r] and A [r, n] as stored, a convolution's flattened."""

    def read(module: str) -> tuple[Tensor, Tensor]:
        B, A = (stored.finite(factors[module][which], f"factors of {module!r}") for which in "BA")
        return B.flatten(1), A.flatten(1)

    return read


def _difference(after: Callable, before: Callable) -> Callable[[str], tuple[Tensor, Tensor]]:
    """[B, -B0] and [A; A0], whose product is B A - B0 A0."""

    def read(module: str) -> tuple[Tensor, Tensor]:
        (B, A), (B0, A0) = after(module), before(module)
        return torch.cat([B, -B0], dim=1), torch.cat([A, A0])

    return read


def _extras(stored: Stored, keys: _Keys, config: Mapping[str, Any], scaling: Mapping[str, float]) -> Extras:
    def lazy(found: dict[str, str], value: Callable[[str, Tensor], Any]) -> Mapping[str, Any]:
        return Lazy(found, lambda name: value(name, stored.finite(found[name], f"values of {found[name]!r}")))

    for module, key in keys.tokens.items():
        if len(_indices(config, module, stored.where)) != stored.sizes[key][0]:
            raise AdapterError(
                f"{stored.where}: trainable_token_indices names another number of tokens than the "
                f"{stored.sizes[key][0]} that are stored for {module!r}: config and weights are not of one adapter"
            )
    return Extras(
        magnitude=lazy(keys.magnitude, lambda _, m: m.flatten()),
        lora_bias=lazy(keys.lora_bias, lambda module, bias: bias * scaling[module]),
        base_bias=lazy(keys.base_bias, lambda _, bias: bias),
        saved=lazy(keys.saved, lambda _, value: value),
        tokens=lazy(keys.tokens, lambda m, rows: Tokens(torch.tensor(_indices(config, m, stored.where)), rows)),
    )


def _indices(config: Mapping[str, Any], embedding: str, where: str) -> list[int]:
    """The trained tokens of one embedding: PEFT takes one list, or one by the end of each embedding's name."""
    named = config["trainable_token_indices"]
    lists = [t for end, t in named.items() if embedding.endswith(end)] if isinstance(named, Mapping) else [named]
    if len(lists) != 1:
        raise AdapterError(f"{where}: trainable_token_indices={named!r} does not say which tokens {embedding!r} has")
    return list(lists[0])

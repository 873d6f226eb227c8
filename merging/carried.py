"""What adapters hold beside their updates, merged: weighted sums of task vectors, whatever the method.

A merge method decides on low-rank updates. Biases, modules trained as a whole and trained tokens are dense, small or
few, and have no rank; they are merged as

    base + sum_i w_i (theirs_i - base),

an adapter without one counting as unchanged. A bias of lora_B is a difference already, and needs no base.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moa.adapters import Adapter, AdapterError, Extras, Kind, Tokens, check_storable
from moa.base_weights import BaseWeights, open_base
from moa.merging.dora import DoraMerge
from moa.merging.registry import MergeMethod

logger = logging.getLogger(__name__)
PART = 2**22
"""Values of a large parameter that are computed at once in float64."""


def check_carried(sources: Sequence[Adapter], method: MergeMethod, kinds: Mapping[str, Kind], base: object) -> None:
    """Refuse, before anything is computed, what cannot be merged together or without the base model.

    Raises:
        AdapterError: the names of what and of whom.
    """
    for adapter in sources:
        held = adapter.extras.names
        if held and "objective" in method.needs:
            raise AdapterError(
                f"{method.name} tries its weights on a model that adds B @ A alone, and adapter {adapter.name!r} also "
                f"holds {', '.join(held)}: choose a method that looks at the factors"
            )
        if base is None and (against_base := [what for what in held if what != "lora_bias"]):
            raise AdapterError(
                f"adapter {adapter.name!r} holds {', '.join(against_base)}, whose merge depends on the base model's "
                f"weights: pass base=..., a folder, Hub name or model (--base)"
            )
    modules = {module for adapter in sources for module in adapter.shapes}
    check_storable(modules, kinds, [adapter.extras for adapter in sources])


def check_nothing_beside(sources: Sequence[Adapter]) -> None:
    """Refuse to restore the norms of updates beside what is merged with them, but for magnitudes, which follow them.

    Raises:
        ValueError: naming what the adapters hold.
    """
    held = [what for adapter in sources for what in replace(adapter.extras, magnitude={}).names]
    if held:
        raise ValueError(
            f"restore_norm changes the updates alone, and these adapters hold {', '.join(dict.fromkeys(held))} too: "
            f"use scale"
        )


def linear_weights(weights: Float[Tensor, " n"], method: MergeMethod) -> Float[Tensor, " n"]:
    """What each task vector is multiplied by: the weights, divided by their sum where the method's degree is 0.

    Raises:
        ValueError: such a method, and weights that add up to zero.
    """
    if method.degree != 0:
        return weights
    total = weights.sum()
    if total.abs() < 1e-8 * weights.abs().sum():
        raise ValueError(f"{method.name} divides by the sum of the weights, and {weights.tolist()} add up to zero")
    return weights / total


class Beside(NamedTuple):
    """What stands beside the updates of one merge.

    Attributes:
        extras: merged, but for the magnitudes, which need the merged updates.
        dora: the way to those, None where no adapter has one.
        base: name of the base model that was read, None when none was needed.
    """

    extras: Extras
    dora: DoraMerge | None
    base: str | None


def beside_updates(
    adapters: Sequence[Adapter],
    weights: Float[Tensor, " n"],
    method: MergeMethod,
    *,
    scale: float,
    base: Any,
    kinds: Mapping[str, Kind],
    dtype: torch.dtype,
) -> Beside:
    """Merge what adapters hold beside their updates, after `check_carried`; nothing for plain LoRA."""
    if not any(adapter.extras for adapter in adapters):
        if base is not None:
            logger.info("the base model was not needed, and not read: the adapters hold nothing beside their updates")
        return Beside(Extras(), None, None)
    against = None if base is None else open_base(base)
    weights = linear_weights(weights, method)
    extras = merged_extras(adapters, scale * weights, against, dtype)
    dora = any(adapter.extras.magnitude for adapter in adapters)
    return Beside(
        extras, DoraMerge(adapters, weights, kinds, against) if dora else None, against.name if against else None
    )


def merged_extras(
    adapters: Sequence[Adapter], weights: Float[Tensor, " n"], base: BaseWeights | None, dtype: torch.dtype
) -> Extras:
    """All that the adapters hold beside updates and magnitudes, merged; biases in float32 at least, like magnitudes.

    Args:
        dtype: of whole modules and tokens.
        weights: what each adapter's task vectors are multiplied by, see `linear_weights`.
        base: not needed where there is nothing but biases of lora_B.

    Raises:
        AdapterError: a parameter that the base model lacks, or that is not of one size.
    """

    def shares(what: str) -> Iterator[tuple[str, list[Share]]]:
        """Each name, with the value and weight of every adapter that has one; read one name at a time."""
        held = [getattr(adapter.extras, what) for adapter in adapters]
        for name in sorted({name for values in held for name in values}):
            having = zip(adapters, weights.tolist(), held, strict=True)
            yield name, [Share(a.name, weight, values[name]) for a, weight, values in having if name in values]

    fine = torch.promote_types(dtype, torch.float32)
    return Extras(
        lora_bias={name: sum(s.weight * s.value.double() for s in had).to(fine) for name, had in shares("lora_bias")},
        base_bias={name: _parameter(name, had, base, fine) for name, had in shares("base_bias")},
        saved={name: _parameter(name, had, base, dtype) for name, had in shares("saved")},
        tokens={name: _tokens(name, had, base, dtype) for name, had in shares("tokens")},
    )


class Share(NamedTuple):
    """One adapter's part in a merged value."""

    adapter: str
    weight: float
    value: Any


def _parameter(name: str, shares: Sequence[Share], base: BaseWeights, dtype: torch.dtype) -> Tensor:
    """base + sum_i w_i (theirs_i - base), a part at a time so that float64 is never whole in memory."""
    first = shares[0]
    for other in shares[1:]:
        if other.value.shape != first.value.shape:
            raise AdapterError(
                f"{name!r} is {list(first.value.shape)} in adapter {first.adapter!r} and {list(other.value.shape)} in "
                f"{other.adapter!r}: they have other labels or another vocabulary, and no merge has both"
            )
    origin = base.tensor(name)
    if origin.shape != first.value.shape:
        raise AdapterError(
            f"{name!r} is {list(first.value.shape)} in adapter {first.adapter!r} and {list(origin.shape)} in the base "
            f"model {base.name}: it has other labels or another vocabulary, and no difference to the base"
        )
    parts = zip(*(t.flatten().split(PART) for t in (origin, *(s.value for s in shares))), strict=True)
    merged = [_weighted(start.double(), theirs, shares).to(dtype) for start, *theirs in parts]
    return torch.cat(merged).view(origin.shape)


def _weighted(origin: Tensor, theirs: Sequence[Tensor], shares: Sequence[Share]) -> Tensor:
    return origin + sum(s.weight * (value.double() - origin) for s, value in zip(shares, theirs, strict=True))


def _tokens(name: str, shares: Sequence[Share], base: BaseWeights, dtype: torch.dtype) -> Tokens:
    """The same for the rows of all tokens that any adapter has trained."""
    weight = base.tensor(f"{name}.weight")
    indices = torch.cat([s.value.indices for s in shares]).unique()
    for adapter, _, tokens in shares:
        if tokens.indices.max() >= len(weight) or tokens.rows.shape[1] != weight.shape[1]:
            raise AdapterError(
                f"adapter {adapter!r} trained token {int(tokens.indices.max())} of {name!r} with "
                f"{tokens.rows.shape[1]} values, and the base model {base.name} has {len(weight)} tokens of "
                f"{weight.shape[1]}: pass the model with the vocabulary that it was trained with as base"
            )
    origin = weight[indices].double()
    merged = origin.clone()
    for _, w, tokens in shares:
        at = torch.searchsorted(indices, tokens.indices)
        merged[at] += w * (tokens.rows.double() - origin[at])
    return Tokens(indices, merged.to(dtype))

"""What an adapter can hold beside the factors of linear layers: other kinds of layers, and tensors that are no B @ A.

Nothing here knows a library: peft_read.py fills these types from PEFT's names, peft_export.py writes them back.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """What layer an update is of, which decides how its factors are stored.

    An embedding [vocabulary, dim] is adapted by its transpose: B is [dim, r] and A is [r, vocabulary]. A
    convolution's A is [r, in, *kernel], here flattened to a matrix.

    Attributes:
        kernel: sizes [in, *kernel] of what a row of a convolution's A stands for.
    """

    name: Literal["linear", "embedding", "convolution"]
    kernel: tuple[int, ...] = ()


LINEAR = Kind("linear")
EMBEDDING = Kind("embedding")


class Tokens(NamedTuple):
    """Rows of an embedding that were trained: `weight[indices] = rows`."""

    indices: Int[Tensor, " k"]
    rows: Float[Tensor, "k dim"]


@dataclass(frozen=True, eq=False)
class Extras:
    """Everything an adapter holds beside its updates; empty for plain LoRA. Mappings may be lazy.

    Attributes:
        magnitude: layer name to DoRA's m [o]; the layer's weight is `diag(m / ||W0 + B A||_row) (W0 + B A)`.
        lora_bias: layer name to the bias [o] that its update adds, scaling folded in.
        base_bias: parameter name to the base model's own bias after training (`bias="all"` or `"lora_only"`).
        saved: parameter name to its value after training (`modules_to_save`).
        tokens: embedding's name to its trained rows (`trainable_token_indices`).
    """

    magnitude: Mapping[str, Float[Tensor, " o"]] = field(default_factory=dict)
    lora_bias: Mapping[str, Float[Tensor, " o"]] = field(default_factory=dict)
    base_bias: Mapping[str, Float[Tensor, " o"]] = field(default_factory=dict)
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, Tokens] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.names)

    @property
    def names(self) -> dict[str, list[str]]:
        """What is held, in PEFT's words, to the names of the layers or parameters that have it."""
        held = {
            "DoRA magnitudes": self.magnitude,
            "lora_bias": self.lora_bias,
            "trained biases": self.base_bias,
            "modules_to_save": self.saved,
            "trainable tokens": self.tokens,
        }
        return {what: sorted(having) for what, having in held.items() if having}


@dataclass(frozen=True, eq=False)
class Lazy(Mapping[str, T]):
    """Name to value, read each time it is asked for, so that nothing large is held."""

    keys_: Collection[str]
    read: Callable[[str], T]

    def __getitem__(self, name: str) -> T:
        if name not in self.keys_:
            raise KeyError(name)
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)

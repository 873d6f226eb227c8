"""The list of merge methods: what each is called, where it comes from, what it takes and which laws it obeys.

A method is one function on the updates of one layer:

    @merge_method("svd", paper="https://arxiv.org/abs/...")
    def svd(updates, weights, *, rank=None) -> Merged: ...

`updates` are `LowRank`, float64; an adapter without this layer is there as an update of rank 0, and adapters
of weight 0 are not there at all. Keyword-only parameters are the method's options, described in the
docstring's Args, except for those in `GIVEN`: a method that has one of these is given it. The decorator
returns the function unchanged.
"""

import inspect
import math
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Union, get_args, get_origin

from moa.errors import nearest
from moa.low_rank import LowRank

LAWS = {
    "adapter_order": "the order of the adapters does not matter",
    "rank_order": "the order of the ranks inside an adapter does not matter",
    "gauge": "writing an adapter as (B G^-1, G A) changes nothing",
    "scale_split": "doubling alpha and halving B changes nothing",
    "identity": "one adapter of weight 1 gives itself back",
    "zero_weight": "an adapter of weight 0 might as well be absent",
    "zero_adapter": "an adapter that changes nothing has no influence",
    "duplicates": "an adapter given twice, with half its weight each time, counts once",
    "sign": "negated adapters give the negated result",
    "rotation": "turning the layer's inputs and outputs turns the result",
    "span": "the result writes and reads no direction that no adapter writes or reads",
}
GIVEN = {
    "rank": "the rank that the user wants, or None",
    "run_seed": "the seed that the user gave, for what is drawn once for the whole model",
    "seed": "a number of this layer's own",
    "seeds": "a number for each adapter, of this layer's and that adapter's own",
    "module": "the layer's name",
    "layers": "all layers of the merge, a `Layers`, for what is decided over the whole model",
    "statistics": "what each adapter's data looks like at this layer, a `LayerStatistics` each",
    "objective": "an `Objective` that judges weights by examples, for what is searched or learned",
}
NEEDS = ("statistics", "objective")
"""Those of `GIVEN` that a user has to bring along."""


@dataclass(frozen=True)
class Merged:
    """What a method makes of one layer.

    Attributes:
        update: the merged update.
        dropped: energy ||exact - update||^2 that fitting into the rank has cost.
        facts: what else the report should say, such as the share of cross terms.
    """

    update: LowRank
    dropped: float = 0.0
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeMethod:
    """A registered method and the facts about it.

    Attributes:
        name: what users call it.
        function: `(updates, weights, *, options) -> Merged`, for one layer.
        paper: address of the paper, None for folklore.
        degree: the result is homogeneous of this degree in the weights (2: doubled weights, fourfold result).
        breaks: law of `LAWS` to the reason why the method, by design, does not obey it.
        aliases: other names that users know it by.
        check: refuses values that its options cannot have. It is called with those of them that it has parameters
            for, before an adapter is read, so that the function itself can rely on them.
        computes_in: dtype of its arithmetic on entries, whatever the result is stored in.
    """

    name: str
    function: Callable[..., Merged]
    paper: str | None
    degree: int
    breaks: Mapping[str, str]
    aliases: tuple[str, ...] = ()
    check: Callable[..., None] | None = None
    computes_in: Literal["float64", "float32"] = "float64"

    @cached_property
    def doc(self) -> str:
        """The docstring: what the method does, its equation, its Args and its errors."""
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.doc.partition("\n")[0]

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """All keyword-only parameters of the function."""
        found = inspect.signature(self.function).parameters
        return {n: p for n, p in found.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @cached_property
    def options(self) -> dict[str, inspect.Parameter]:
        """The parameters that a user sets by name."""
        return {name: p for name, p in self.parameters.items() if name not in GIVEN}

    @property
    def needs(self) -> tuple[str, ...]:
        """What of `NEEDS` the method cannot do without."""
        return tuple(name for name in NEEDS if name in self.parameters)

    @property
    def fills_the_layer(self) -> bool:
        """Whether the result leaves the span of the updates, so that it may have any rank up to the layer's own."""
        return "span" in self.breaks

    def given(self, **values: Any) -> dict[str, Any]:
        """Those of the values that the function asks for by having a parameter of that name."""
        return {name: value for name, value in values.items() if name in self.parameters}

    def describe(self, option: str) -> str:
        """What the docstring's Args say about an option."""
        return described(self.function, option)

    def check_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their defaults.

        Raises:
            ValueError: an option that the method does not have, or a value that it cannot have.
            TypeError: a value of another type.
        """
        for name in options:
            if name not in self.options:
                takes = f"it takes {', '.join(self.options)}" if self.options else "it takes none"
                hint = nearest(name, self.options) or _others_take(name)
                raise ValueError(f"{self.name} has no option {name!r}: {takes}{hint}")
        given = {n: _checked(self.name, n, v, self.options[n].annotation) for n, v in options.items()}
        options = {name: given.get(name, p.default) for name, p in self.options.items()}
        if self.check:
            looked_at = inspect.signature(self.check).parameters
            self.check(**{name: value for name, value in options.items() if name in looked_at})
        return options


_METHODS: dict[str, MergeMethod] = {}
_ALIASES: dict[str, str] = {}


def _others_take(option: str) -> str:
    """The end of a sentence: which methods have the option."""
    others = [method.name for method in _METHODS.values() if option in method.options]
    return f"; it is an option of {', '.join(others)}" if others else ""


def merge_method(
    name: str,
    *,
    paper: str | None = None,
    degree: int = 1,
    breaks: Mapping[str, str] | None = None,
    aliases: Sequence[str] = (),
    check: Callable[..., None] | None = None,
    computes_in: Literal["float64", "float32"] = "float64",
) -> Callable[[Callable[..., Merged]], Callable[..., Merged]]:
    """Register a function as a merge method; see `MergeMethod` for the facts it states.

    Raises:
        ValueError: a name that is taken, a law that does not exist, or a function without a docstring.
    """
    for taken in {name, *aliases} & {*_METHODS, *_ALIASES}:
        raise ValueError(f"a merge method {taken!r} is registered already: choose another name")
    for law in breaks or {}:
        if law not in LAWS:
            raise ValueError(f"{name} breaks an unknown law {law!r}: the laws are {', '.join(LAWS)}")

    def register(function: Callable[..., Merged]) -> Callable[..., Merged]:
        if not inspect.getdoc(function):
            raise ValueError(f"{name} needs a docstring, which is all that `moa methods` can say about it")
        facts = (paper, degree, dict(breaks or {}), tuple(aliases), check, computes_in)
        _METHODS[name] = MergeMethod(name, function, *facts)
        _ALIASES.update(dict.fromkeys(aliases, name))
        return function

    return register


def methods() -> dict[str, MergeMethod]:
    """Every registered method by name, in alphabetical order."""
    return dict(sorted(_METHODS.items()))


def find_method(name: str) -> MergeMethod:
    """The method of that name.

    Raises:
        ValueError: no such method; the message has the nearest name and the list.
    """
    name = _ALIASES.get(name, name)
    if name not in _METHODS:
        known = methods()
        hint = nearest(name, [*known, *_ALIASES])
        raise ValueError(f"there is no merge method {name!r}: the methods are {', '.join(known)}{hint}")
    return _METHODS[name]


def described(documented: Any, name: str) -> str:
    """What the Args or Attributes of a docstring say about a name."""
    match = re.search(rf"^ +{name}: (.+(?:\n {{8,}}.+)*)", inspect.getdoc(documented) or "", re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


def optional(annotation: Any) -> tuple[Any, bool]:
    """The annotation without `| None`, and whether it had one."""
    if get_origin(annotation) in (Union, types.UnionType):
        (inner,) = (a for a in get_args(annotation) if a is not type(None))
        return inner, True
    return annotation, False


def option_from_text(method: MergeMethod, option: str, text: str) -> Any:
    """The value that a text such as "0.4", "model" or "true" stands for; an unknown option keeps its text."""
    if option not in method.options:
        return text
    annotation, may_be_none = optional(method.options[option].annotation)
    if may_be_none and text.lower() == "none":
        return None
    if annotation is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return annotation(text) if annotation in (int, float) else text
    except ValueError:
        return text


def _checked(method: str, option: str, value: Any, annotation: Any) -> Any:
    annotation, may_be_none = optional(annotation)
    if value is None and may_be_none:
        return None
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            choices = ", ".join(map(str, get_args(annotation)))
            raise ValueError(f"{option} of {method} must be one of {choices}, got {value!r}")
    elif annotation is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{option} of {method} must be a number, got {value!r}")
        if math.isinf(value):
            raise ValueError(f"{option} of {method} must be a finite number, got {value!r}")
        return float(value)
    elif not isinstance(value, annotation) or (annotation is int and isinstance(value, bool)):
        raise TypeError(f"{option} of {method} must be of type {annotation.__name__}, got {value!r}")
    return value

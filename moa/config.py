"""What a saved mixture says about itself: `moa_config.json`."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from moa.calibration import Calibration, ConformalSet
from moa.errors import nearest
from moa.peft_checks import CONFIG_FILE, WEIGHTS_FILE
from moa.peft_export import check_name
from moa.router import Head, Pooling, check_architecture
from moa.routing import Granularity, RoutingMode, TokenRouter, check_granularity, check_mode
from moa.strangeness import Abstention

CONFIG_NAME = "moa_config.json"
ROUTER_NAME = "moa_router.safetensors"
GATES_NAME = "moa_gates.safetensors"
FALLBACK = "default"  # PEFT's name for the adapter at the root of a saved folder


Objective = Literal["task", "utility", "language_model"]


@dataclass
class RouterConfig:
    """What the router reads, how it decides, and what it was fitted for; None where nobody said.

    Attributes:
        layer: it reads the hidden state entering this layer; None means a quarter of the depth.
        depths: other layers that routers of their own read, where each layer follows the nearest before it.
        pooling: over the prompt's tokens: `mean`, `last` or `attention`.
        head: `centroid`, `linear` or `mlp`.
        hidden_units: width of the hidden layer of `mlp`.
        hidden_size: width of the hidden state that it was fitted on; None while there is no router.
        objective: what it was fitted to: the prompt's `task`, the `utility` of each expert's answer, or the
            `language_model` loss through soft weights.
        plain_prompts: whether it was fitted to prompts without their templates too.
        experts: names of the experts, in the order of its outputs.
        clusters: expert of each output of its head, where several share one; None: each has its own.
        base_sha256: of the base model's weights, see `moa.fingerprint.weights_sha256`.
        tokenizer_sha256: of how the tokenizer reads text, see `moa.fingerprint.tokenizer_sha256`.
        chat_template_sha256: of its chat template.
        calibration: how its confidence fits its accuracy.
        abstention: when it trusts no expert; None always trusts one.
        conformal: the set of experts that `conformal` routing mixes.
    """

    layer: int | None = None
    depths: list[int] = field(default_factory=list)
    pooling: Pooling = "mean"
    head: Head = "linear"
    hidden_units: int | None = None
    hidden_size: int | None = None
    objective: Objective = "task"
    plain_prompts: bool = False
    experts: list[str] | None = None
    clusters: list[int] | None = None
    base_sha256: str | None = None
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None
    calibration: Calibration | None = None
    abstention: Abstention | None = None
    conformal: ConformalSet | None = None

    def __post_init__(self) -> None:
        check_architecture(self.pooling, self.head, self.hidden_units)
        given = [*([] if self.layer is None else [self.layer]), *self.depths]
        if not all(isinstance(layer, int) for layer in given):
            raise ValueError(f"layers that routers read are whole numbers, got {given}: fit the router again")
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"the router's objective {self.objective!r} does not exist: "
                f"choose one of {', '.join(get_args(Objective))}"
            )

    @property
    def floor(self) -> float | None:
        """The probability from which experts are in the conformal set; None where there is no set."""
        return None if self.conformal is None else self.conformal.floor


@dataclass
class Fallback:
    """The merge at the root of the saved folder, so that it can be made again when the experts change.

    Attributes:
        method: of the merge.
        weights: of each expert.
        scale: of the whole.
        settings: what else was asked for: `rank`, `seed`, `restore_norm`, and the method's own options.
    """

    method: str
    weights: dict[str, float]
    scale: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.weights, dict) or not isinstance(self.settings, dict):
            raise TypeError("weights and settings are JSON objects")


@dataclass
class MoaConfig:
    """A mixture of LoRA experts over one base model.

    Attributes:
        base_model: name or folder of the base model.
        experts: names of the experts; their order is that of the router's outputs.
        router: what the router reads, how it decides, and what it was fitted for.
        routing: `hard` (the best expert), `top_k` (the `top_k` best, mixed), `soft` (all, mixed), or `conformal` (the
            likely ones, mixed; see `RouterConfig.conformal`).
        top_k: how many experts `top_k` mixes, and each token at each layer where granularity is `token`.
        granularity: `sequence`, by the router; `layer`, by routers at several depths; or `token`, see
            `MoaModel.set_granularity`.
        token_router: what routes tokens: `arrow`, or trained `gates`.
        fallback: how the adapter at the root of the saved folder was made; None until it is.
        check_base: False where the adapters name other base models than this one, and that was accepted.
        sha256: checksum of each saved file, by its path in the folder.
        scores: measured results to show on the model card, such as the router's held-out accuracy.
        versions: the packages that wrote the folder.
    """

    base_model: str
    experts: list[str]
    router: RouterConfig = field(default_factory=RouterConfig)
    routing: RoutingMode = "hard"
    top_k: int = 2
    granularity: Granularity = "sequence"
    token_router: TokenRouter = "arrow"
    fallback: Fallback | None = None
    check_base: bool = True
    sha256: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.experts:
            raise ValueError("a mixture needs at least one expert: got an empty list")
        for name in self.experts:
            check_name(name, "expert")
        if len(set(self.experts)) < len(self.experts):
            raise ValueError(f"expert names must differ: got {', '.join(self.experts)}")
        check_mode(self.routing, self.top_k, len(self.experts))
        check_granularity(self.granularity, self.token_router)

    def adapter_files(self) -> list[str]:
        """Paths of the experts' files and of the root adapter's, in the saved folder."""
        folders = [*(f"{name}/" for name in self.experts), ""]
        return [f"{folder}{file}" for folder in folders for file in (WEIGHTS_FILE, CONFIG_FILE)]

    def expert_sha256(self, name: str) -> str:
        """All that a saved expert is, its weights' digest and its config's: another alpha is another expert."""
        return f"{self.sha256[f'{name}/{WEIGHTS_FILE}']} {self.sha256[f'{name}/{CONFIG_FILE}']}"

    def forget_routed_scores(self) -> None:
        """Drop what the mixture scored as it routed before; merges and adapters keep theirs."""
        self.scores = {name: score for name, score in self.scores.items() if not name.startswith("moa")}

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> MoaConfig:
        """Read `moa_config.json`.

        Raises:
            ValueError: the file is no JSON object, lacks a field or has one that this version does not know.
        """
        try:
            read = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): save or download the mixture again") from error
        if isinstance(read, dict) and "router_layer" in read:
            read["router"] = _earlier_router(read)
        _check_fields(read, cls, {"base_model", "experts"}, str(path))
        if "router" in read:
            read["router"] = _router(read["router"], f"{path}, router")
        read["fallback"] = _part(read, "fallback", Fallback, str(path))
        return cls(**read)


def _router(read: object, where: str) -> RouterConfig:
    _check_fields(read, RouterConfig, set(), where)
    parts = {"calibration": Calibration, "abstention": Abstention, "conformal": ConformalSet}
    return RouterConfig(**read | {name: _part(read, name, kind, where) for name, kind in parts.items()})


def _part(read: dict[str, object], name: str, kind: type, where: str) -> object | None:
    """What stands under a name that a file may leave out."""
    if read.get(name) is None:
        return None
    needed = {one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}
    _check_fields(read[name], kind, needed, f"{where}, {name}")
    try:
        return kind(**read[name])
    except TypeError as error:  # numbers that are none
        raise ValueError(f"{where}, {name} cannot be read ({error}): save or download the mixture again") from error


def _earlier_router(read: dict[str, object]) -> dict[str, object]:
    """The router of a file from before routers could differ: linear, over the mean of a layer."""
    return {"layer": read.pop("router_layer"), "hidden_size": read.pop("hidden_size", None)}


def _check_fields(read: object, kind: type, needed: set[str], where: str) -> None:
    if not isinstance(read, dict):
        raise ValueError(f"{where} must be a JSON object, got a {type(read).__name__}: save or download it again")
    known = {one.name for one in fields(kind)}
    for key in sorted(set(read) - known):
        hint = nearest(key, known)
        raise ValueError(f"{where} has the unknown key {key!r} (a newer version of moa may have written it){hint}")
    missing = sorted(needed - set(read))
    if missing:
        raise ValueError(f"{where} lacks {missing[0]!r}: it is no saved mixture, save it again")

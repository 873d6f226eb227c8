"""What a saved mixture says about itself: `moa_config.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from moa.errors import nearest
from moa.peft_checks import CONFIG_FILE, WEIGHTS_FILE
from moa.peft_export import check_name
from moa.routing import RoutingMode, check_mode

CONFIG_NAME = "moa_config.json"
ROUTER_NAME = "moa_router.safetensors"
FALLBACK = "default"  # PEFT's name for the adapter at the root of a saved folder


@dataclass
class Fallback:
    """The merge at the root of the saved folder: its method, each expert's weight, the scale of the whole."""

    method: str
    weights: dict[str, float]
    scale: float = 1.0


@dataclass
class MoaConfig:
    """A mixture of LoRA experts over one base model.

    Attributes:
        base_model: name or folder of the base model.
        experts: names of the experts; their order is that of the router's outputs.
        router_layer: the router reads the hidden state entering this layer; None means a quarter of the depth.
        hidden_size: width of the hidden state that the router was fitted on; None while it is not fitted.
        routing: `hard` (the best expert), `top_k` (the `top_k` best, mixed), or `soft` (all, mixed).
        top_k: how many experts `top_k` mixes.
        fallback: how the adapter at the root of the saved folder was made; None until it is.
        check_base: False where the adapters name other base models than this one, and that was accepted.
        sha256: checksum of each saved file, by its path in the folder.
        scores: measured results to show on the model card, such as the router's held-out accuracy.
        versions: the packages that wrote the folder.
    """

    base_model: str
    experts: list[str]
    router_layer: int | None = None
    hidden_size: int | None = None
    routing: RoutingMode = "hard"
    top_k: int = 2
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

    def adapter_files(self) -> list[str]:
        """Paths of the experts' files and of the root adapter's, in the saved folder."""
        folders = [*(f"{name}/" for name in self.experts), ""]
        return [f"{folder}{file}" for folder in folders for file in (WEIGHTS_FILE, CONFIG_FILE)]

    def expert_sha256(self, name: str) -> str:
        """All that a saved expert is, its weights' digest and its config's: another alpha is another expert."""
        return f"{self.sha256[f'{name}/{WEIGHTS_FILE}']} {self.sha256[f'{name}/{CONFIG_FILE}']}"

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
        _check_fields(read, cls, {"base_model", "experts"}, str(path))
        if read.get("fallback") is not None:
            _check_fields(read["fallback"], Fallback, {"method", "weights"}, f"{path}, fallback")
            read["fallback"] = Fallback(**read["fallback"])
        return cls(**read)


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

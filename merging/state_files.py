"""A merge state on disk: one JSON file that says what is there, beside one safetensors file that it names.

    merge_state.json              format, kind, members with weights and hashes, name and hash of the tensors
    state-<hash>.safetensors      bases and coordinates, float64

A new version is complete when its JSON file has replaced the old one; a crash before leaves the old version whole.
"""

import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moa.adapters import Adapter, Kind, file_sha256
from moa.merging.report import Source

FORMAT = 1
MANIFEST = "merge_state.json"


@dataclass(frozen=True)
class Member:
    """What a state knows of an adapter beside its updates.

    Attributes:
        weight: its weight, None where every member has 1/N.
        path: the folder it was read from, None for an adapter of a live model.
        sha256, config_sha256: hashes of its weights file and its config's meaning when it was added.
        ranks: layer name to rank.
        kinds: of the layers that are not linear.
    """

    name: str
    weight: float | None
    path: str | None
    sha256: str | None
    config_sha256: str | None
    initial_sha256: str | None
    base_model: str | None
    revision: str | None
    task_type: str | None
    dtype: str
    ranks: dict[str, int]
    kinds: dict[str, Kind]

    @classmethod
    def of(cls, adapter: Adapter, weight: float | None) -> "Member":
        """What is to be known of an adapter."""
        return cls(
            name=adapter.name,
            weight=weight,
            path=str(adapter.path.resolve()) if adapter.path else None,
            sha256=adapter.sha256,
            config_sha256=adapter.config_sha256,
            initial_sha256=adapter.initial_sha256,
            base_model=adapter.base_model,
            revision=adapter.config.get("revision"),
            task_type=adapter.config.get("task_type"),
            dtype=str(adapter.dtype).removeprefix("torch."),
            ranks={module: shape.r for module, shape in adapter.shapes.items()},
            kinds=dict(adapter.kinds),
        )

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Member":
        """A member as `dataclasses.asdict` wrote it."""
        kinds = {module: Kind(kind["name"], tuple(kind["kernel"])) for module, kind in stored["kinds"].items()}
        return cls(**{**stored, "kinds": kinds})

    def source(self, weight: float, layers: Mapping[str, Any]) -> Source:
        """The member as a merge report names it; `layers` are those of the merge."""
        return Source(
            name=self.name,
            weight=weight,
            path=self.path,
            sha256=self.sha256,
            base_model=self.base_model,
            dtype=self.dtype,
            modules=len(self.ranks),
            ranks=(min(self.ranks.values()), max(self.ranks.values())),
            missing=[module for module in layers if module not in self.ranks],
            config_sha256=self.config_sha256,
            initial_sha256=self.initial_sha256,
        )


@dataclass(frozen=True, eq=False)
class KeptAdapter(Adapter):
    """A member as an adapter whose updates are in a state: its folder may be gone, its hashes are known."""

    member: Member = field(kw_only=True)

    @property
    def sha256(self) -> str | None:
        """Hash of its weights file when it was added."""
        return self.member.sha256

    @property
    def config_sha256(self) -> str | None:
        """Hash of what its config said when it was added."""
        return self.member.config_sha256

    @property
    def initial_sha256(self) -> str | None:
        """Hash of its weights before training, where their product was taken out."""
        return self.member.initial_sha256


def write_state(directory: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Make a folder hold this state instead of an earlier one, if there is one.

    Raises:
        ValueError: the folder is a file, or holds other things than a state.
    """
    from safetensors.torch import save_file

    check_ours(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{uuid.uuid4().hex[:8]}.partial"
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        sha256 = file_sha256(partial)
        file = directory / f"state-{sha256[:16]}.safetensors"
        partial.replace(file)
        stored = {"format": FORMAT, **facts, "tensors": {"file": file.name, "sha256": sha256}}
        partial.write_text(json.dumps(stored, indent=1, default=asdict) + "\n")
        partial.replace(directory / MANIFEST)
    finally:
        partial.unlink(missing_ok=True)
    for earlier in directory.glob("state-*.safetensors"):
        if earlier != file:
            earlier.unlink()


def read_state(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_state` wrote: facts and tensors.

    Raises:
        FileNotFoundError: no state there.
        ValueError: a format that this version does not know, or files that are damaged.
    """
    from safetensors.torch import load_file

    if not (directory / MANIFEST).is_file():
        raise FileNotFoundError(f"there is no merge state in {directory} (no {MANIFEST}): create one first")
    try:
        facts = json.loads((directory / MANIFEST).read_text())
        known, tensors = facts["format"], facts["tensors"]
        file, sha256 = directory / tensors["file"], tensors["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        what = f"{directory / MANIFEST} is damaged ({error!r})"
        raise ValueError(f"{what}: restore it, or create the state anew") from error
    if known != FORMAT:
        what = f"{directory} holds a merge state of format {known}, this version reads {FORMAT}"
        raise ValueError(f"{what}: update moa-peft, or create the state anew")
    if not file.is_file() or file_sha256(file) != sha256:
        raise ValueError(f"{file} is missing or damaged: restore it, or create the state anew")
    return facts, load_file(file)


def check_ours(directory: Path) -> None:
    """A ValueError where the folder is a file, or holds other things than a state."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"cannot save the merge state to {directory}: it is a file, give a folder")
    if directory.is_dir() and not (directory / MANIFEST).is_file() and (held := sorted(directory.iterdir())):
        raise ValueError(f"cannot save the merge state to {directory}: it holds {held[0].name!r}, give a new folder")

"""The statistics of a kept merge's members: only what its method reads, one file each, in the format of `statistics`.

    statistics-<hash>.safetensors     one Gram of n^2 numbers for each distinct input of n features (RegMean), or a
                                      Fisher vector of o numbers for each layer (Fisher)

A layer's tensors are mapped into memory when a merge comes to it. A file is written when its adapter is first stored,
and left as it is whatever becomes of the others.
"""

import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moa.adapters import Adapter, file_sha256
from moa.base_model import same_base
from moa.merging.activations import READS
from moa.merging.ranks import RankRule
from moa.merging.registry import MergeMethod
from moa.merging.statistics import (
    Given,
    LayerStatistics,
    Statistics,
    fisher_key,
    gram_key,
    read_statistics,
    statistics_of,
    write_statistics,
)

CALLED = {"gram": "Gram matrices of inputs", "fisher": "Fisher vectors"}
"""What a merge can read of `LayerStatistics`, and how to say so."""


def read_by(method: MergeMethod, rank: Any) -> frozenset[str]:
    """Which of `CALLED` a merge by this method, at this rank or by this rule for ranks, reads."""
    reads = READS[method.name] if "statistics" in method.needs else ()
    by_loss = isinstance(rank, RankRule) and rank.by == "loss"
    return frozenset([*reads, "gram"] if by_loss else reads)


@dataclass(frozen=True, eq=False)
class KeptStatistics:
    """The statistics of one member.

    Attributes:
        statistics: what is kept of them.
        given: the file or folder that was named for them, None for the file beside the adapter.
        file, sha256: where a state has stored them; until then they are read from where they were found.
    """

    statistics: Statistics
    given: str | None
    file: Path | None = None
    sha256: str | None = None

    @classmethod
    def of(
        cls, adapter: Adapter, given: Given | None, parts: Collection[str], *, check_base: bool
    ) -> "KeptStatistics":
        """These parts of an adapter's statistics.

        Raises:
            ValueError: none, those of another adapter, base or set of layers, or without one of the parts.
            FileNotFoundError: no such file.
        """
        (found,) = statistics_of([adapter], None if given is None else [given])
        if check_base:
            _check_base(adapter, found)
        _check_layers(adapter, found, parts)
        return cls(_only(found, parts), str(Path(given).resolve()) if isinstance(given, str | Path) else None)

    def stored_in(self, directory: Path) -> "KeptStatistics":
        """The same, read from a file in this folder, which is written unless it is there."""
        if self.file is not None and self.file.parent.resolve() == directory.resolve():
            return self
        partial = directory / f"{uuid.uuid4().hex[:8]}.partial"
        try:
            write_statistics(partial, self.statistics, self.statistics.about)
            sha256 = file_sha256(partial)
            file = directory / f"statistics-{sha256[:16]}.safetensors"
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        return replace(self, statistics=read_statistics(file), file=file, sha256=sha256)

    def to_json(self) -> dict[str, str | None]:
        """Where they are stored, and where they came from."""
        return {"file": self.file.name, "sha256": self.sha256, "given": self.given}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], directory: Path) -> "KeptStatistics":
        """What `to_json` tells of.

        Raises:
            ValueError: the file is missing or damaged.
        """
        file = directory / stored["file"]
        if not file.is_file() or file_sha256(file) != stored["sha256"]:
            raise ValueError(f"{file} is missing or damaged: restore it, or create the state anew")
        return cls(read_statistics(file), stored["given"], file, stored["sha256"])


def _check_base(adapter: Adapter, found: Mapping[str, LayerStatistics]) -> None:
    theirs = found.about.get("base_model") if isinstance(found, Statistics) else None
    if theirs and adapter.base_model and not same_base(adapter.base_model, theirs):
        raise ValueError(
            f"the statistics of adapter {adapter.name!r} were collected on {theirs!r} and it was trained on "
            f"{adapter.base_model!r}: run 'moa statistics' again with --overwrite, or pass check_base=False "
            f"(--no-check-base) if these share their weights"
        )


def _check_layers(adapter: Adapter, found: Mapping[str, LayerStatistics], parts: Collection[str]) -> None:
    for module, shape in adapter.shapes.items():
        known, where = found[module], f"the statistics of adapter {adapter.name!r} at its layer {module!r}"
        for part, size in (("gram", (shape.n, shape.n)), ("fisher", (shape.o,))):
            if part not in parts:
                continue
            if (tensor := getattr(known, part)) is None:
                how = " and --fisher true" if part == "fisher" else ""
                raise ValueError(f"{where} have no {CALLED[part]}: run 'moa statistics' again with --overwrite{how}")
            if tuple(tensor.shape) != size:
                raise ValueError(
                    f"{where} are of another base model: the layer needs {list(size)} numbers, they have "
                    f"{list(tensor.shape)}; run 'moa statistics' again with --overwrite"
                )


def _only(found: Mapping[str, LayerStatistics], parts: Collection[str]) -> Statistics:
    """These parts, of all layers: an adapter that lacks a layer of others may have statistics there, which count."""
    if isinstance(found, Statistics):
        layers = {
            module: {
                **stored,
                "gram": stored["gram"] if "gram" in parts else None,
                "fisher": stored["fisher"] and "fisher" in parts,
            }
            for module, stored in found.layers.items()
        }
        return replace(found, layers=layers)
    tensors: dict[str, Tensor] = {}
    layers = {}
    for module, known in found.items():
        layers[module] = {"gram": None, "tokens": known.tokens, "fisher": False}
        if "gram" in parts and known.gram is not None:
            tensors[gram_key(module)] = known.gram.clone()
            layers[module]["gram"] = gram_key(module)
        if "fisher" in parts and known.fisher is not None:
            tensors[fisher_key(module)] = known.fisher.clone()
            layers[module]["fisher"] = True
    return Statistics(tensors.__getitem__, layers)

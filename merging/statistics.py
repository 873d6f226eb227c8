"""What an adapter's data looks like to each layer: collected once, stored beside the adapter, used by many merges.

    merge_statistics.safetensors     one Gram matrix for all layers that read the same input, a Fisher vector a layer
      metadata                       which layer reads which Gram, how many tokens, which adapter and which text

With them, an adapter can be merged by its inputs after its data has gone. `collecting` makes them.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from moa.adapters import Adapter
from moa.peft_checks import all_finite

STATISTICS_FILE = "merge_statistics.safetensors"
HEADER = "moa_statistics"  # the only entry of the metadata: safetensors writes several in any order
FORMAT = 1


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """One adapter's data at one layer.

    Attributes:
        gram: [n, n], mean over tokens of x x^T for the layer's inputs x; symmetric. None where a kept merge has no
            use for it.
        tokens: how many tokens that is the mean of.
        fisher: [o], mean over tokens of g_j^2 ||x||^2, with g the gradient of the answers' negative
            log-likelihood by the layer's output: the diagonal Fisher information, summed over each row of
            the layer's matrix. None where gradients were not collected.
    """

    gram: Float[Tensor, "n n"] | None
    tokens: int
    fisher: Float[Tensor, " o"] | None = None


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, LayerStatistics]):
    """Layer name to `LayerStatistics`. From a file, each is mapped into memory anew when it is asked for.

    Attributes:
        read: gives a stored tensor by its key.
        layers: layer name to the key of its Gram or None, its number of tokens, and whether it has a Fisher vector.
        about: where they come from: adapter_sha256, base_model, rows, text_sha256, ...
    """

    read: Callable[[str], Tensor]
    layers: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, module: str) -> LayerStatistics:
        stored = self.layers[module]
        fisher = self.read(fisher_key(module)) if stored["fisher"] else None
        gram = None if stored["gram"] is None else self.read(stored["gram"])
        return LayerStatistics(gram, stored["tokens"], fisher)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def gram_key(module: str) -> str:
    """The key of the Gram of a layer, and of those that read the same input."""
    return f"gram.{module}"


def fisher_key(module: str) -> str:
    """The key of a layer's Fisher vector."""
    return f"fisher.{module}"


def write_statistics(path: str | Path, statistics: Statistics, about: Mapping[str, Any]) -> Path:
    """Store statistics and where they come from; the file appears complete or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    keys = {stored["gram"] for stored in statistics.layers.values() if stored["gram"] is not None}
    keys |= {fisher_key(module) for module, stored in statistics.layers.items() if stored["fisher"]}
    header = {"format": FORMAT, "about": dict(about), "layers": {k: dict(v) for k, v in statistics.layers.items()}}
    tensors = {key: statistics.read(key).contiguous() for key in sorted(keys)}
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, scratch, {HEADER: json.dumps(header)})
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def read_statistics(path: str | Path) -> Statistics:
    """Statistics from a file, or from the folder of the adapter beside which they were stored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is damaged, or that holds no statistics this version can read.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path) / STATISTICS_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there are no statistics at {file}: collect them with 'moa statistics'")
    try:
        with safe_open(file, framework="pt") as stored:
            header = json.loads((stored.metadata() or {}).get(HEADER, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is damaged or incomplete ({error}): collect it again with --overwrite") from error
    if not header:
        raise ValueError(
            f"{file} holds no statistics: give what 'moa statistics' wrote, {STATISTICS_FILE} in the adapter's folder"
        )
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {header.get('format')}, and statistics of format {FORMAT} can be read: "
            "collect them again with 'moa statistics' and --overwrite"
        )

    def read(key: str) -> Tensor:
        with safe_open(file, framework="pt") as stored:  # opened anew, or its pages would all stay in memory
            tensor = stored.get_tensor(key)
        if not all_finite(tensor):
            raise ValueError(f"{file} holds NaN or infinite values ({key}): collect it again with --overwrite")
        return tensor

    return Statistics(read, header["layers"], header["about"])


Given = str | Path | Mapping[str, LayerStatistics]


def statistics_of(
    adapters: Sequence[Adapter], given: Sequence[Given] | None = None
) -> list[Mapping[str, LayerStatistics]]:
    """The statistics of each adapter: those given, else the file in its folder.

    Args:
        given: a file, an adapter's folder, or a mapping in memory, one for each adapter.

    Raises:
        ValueError: an adapter without statistics, with those of another adapter, or of other layers than it has.
        FileNotFoundError: a file that does not exist.
    """
    if given is None:
        found: list[Mapping[str, LayerStatistics]] = [_beside(adapter) for adapter in adapters]
    elif len(given) != len(adapters):
        raise ValueError(f"statistics must be one for each adapter: got {len(given)} for {len(adapters)} adapters")
    else:
        found = [one if isinstance(one, Mapping) else read_statistics(one) for one in given]
        _check_order(adapters, found)
    for adapter, statistics in zip(adapters, found, strict=True):
        _check_belongs(adapter, statistics)
    return found


def _beside(adapter: Adapter) -> Statistics:
    if adapter.path is None:
        raise ValueError(
            f"adapter {adapter.name!r} is in memory, with no file of statistics beside it: pass statistics=[...]"
        )
    if not (adapter.path / STATISTICS_FILE).is_file():
        raise ValueError(
            f"adapter {adapter.name!r} has no statistics: run "
            f"'moa statistics --adapters {adapter.path} --tasks TASK' with the task it was trained on"
        )
    return read_statistics(adapter.path)


def _check_order(adapters: Sequence[Adapter], found: Sequence[Mapping[str, LayerStatistics]]) -> None:
    names = {adapter.sha256: adapter.name for adapter in adapters if adapter.sha256}
    for adapter, statistics in zip(adapters, found, strict=True):
        collected = _collected_with(statistics)
        if collected in names and adapter.sha256 and collected != adapter.sha256:
            raise ValueError(
                f"adapter {adapter.name!r} was given the statistics of {names[collected]!r}: "
                "statistics are given in the order of the adapters"
            )


def _collected_with(statistics: Mapping[str, LayerStatistics]) -> str | None:
    """The sha256 of the adapter that they were collected with, where that is known."""
    return statistics.about.get("adapter_sha256") if isinstance(statistics, Statistics) else None


def _check_belongs(adapter: Adapter, statistics: Mapping[str, LayerStatistics]) -> None:
    collected, ours = _collected_with(statistics), adapter.sha256
    if collected and ours and collected != ours:
        raise ValueError(
            f"the statistics of adapter {adapter.name!r} were collected with other weights than it has now "
            f"({collected[:12]}, not {ours[:12]}): run 'moa statistics' again with --overwrite"
        )
    if lacking := [module for module in adapter.shapes if module not in statistics]:
        raise ValueError(
            f"adapter {adapter.name!r} has no statistics for its layer {lacking[0]!r} (and {len(lacking) - 1} more): "
            "run 'moa statistics' again with --overwrite"
        )

"""Rows from the Hub: public data sets under their own names and columns, with splits where none are public.

Many benchmarks publish their test split without labels. Then the public validation split is tested on,
and a validation split is carved out of train: the same rows every time, and never among the rows that are
trained on. The catalog's YAML files say where this is done.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moa.errors import first_line

CARVE_SEED = 0  # fixed: what is held out must not depend on the seed of a run


@dataclass(frozen=True)
class Carve:
    """A split cut from the publisher's split `split`: `rows` rows of it, which no other split then has."""

    split: str
    rows: int


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hub: arguments of `datasets.load_dataset`, and our splits in terms of its own."""

    path: str
    splits: Mapping[str, str | Carve]
    name: str | None = None
    revision: str | None = None


class HubRows:
    """Rows of one split, each with its place; a row is decoded when it is asked for.

    Raises:
        ValueError: the source has no such split, or it is too small to carve from.
        FileNotFoundError: the data set cannot be had.
    """

    def __init__(self, source: HubSource, split: str):
        if split not in source.splits:
            raise ValueError(f"{source.path} has no {split} split, only {', '.join(source.splits)}: add it to `hub`")
        wanted = source.splits[split]
        publisher_split = wanted.split if isinstance(wanted, Carve) else wanted
        self.place = f"{source.path} {publisher_split}"
        self.rows = _download(source.path, source.name, publisher_split, source.revision)
        self.indices = _indices(source, wanted, len(self.rows))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[dict[str, Any], str]:
        return self.rows[self.indices[i]], f"{self.place}, row {self.indices[i]}"


def _indices(source: HubSource, wanted: str | Carve, count: int) -> Sequence[int]:
    """Which of the publisher's `count` rows a split has: the carved ones, or those that no carving took."""
    own = wanted.split if isinstance(wanted, Carve) else wanted
    carvings = [s for s in source.splits.values() if isinstance(s, Carve) and s.split == own]
    held_out = sum(carving.rows for carving in carvings)
    if held_out > count:
        raise ValueError(f"{source.path} {own} has {count} rows, too few to carve {held_out} from: lower `rows`")
    order = list(range(count))
    if carvings:
        random.Random(CARVE_SEED).shuffle(order)
    start = 0
    for carving in carvings:
        if carving is wanted:
            return sorted(order[start : start + carving.rows])
        start += carving.rows
    return sorted(order[start:])


def _download(path: str, name: str | None, split: str, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, name, split=split, revision=revision)
    # no network or no file, an unknown name or split, a data set that needs a script, a broken build of it
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"cannot get the data set {path!r} from the Hub ({type(error).__name__}: {first_line(error)}): "
            "check the network, or use --source pocket, or your own rows with --data_dir"
        ) from error

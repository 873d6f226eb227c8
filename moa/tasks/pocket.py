"""Pocket tasks: seven families of tasks in miniature, generated here, so that a run needs no network.

A generator draws one row from a random stream; this module turns it into a data set with a train, a
validation and a test split. The rows have the columns of the public data set that the task is named
after, so prompts and metrics are shared with it. The data set is fixed, like a downloaded one: the
only randomness a caller has is which of its rows are sampled.
"""

import hashlib
import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from moa.tasks.names import unknown
from moa.tasks.pocket_commonsense import draw_commonsense
from moa.tasks.pocket_nli import draw_nli
from moa.tasks.pocket_paraphrase import draw_paraphrase
from moa.tasks.pocket_qa import draw_qa
from moa.tasks.pocket_sentiment import draw_sentiment
from moa.tasks.pocket_summarization import draw_summarization
from moa.tasks.pocket_translation import draw_translation

Row = dict[str, Any]

GENERATORS: dict[str, Callable[[random.Random], Row]] = {
    "commonsense": draw_commonsense,
    "nli": draw_nli,
    "paraphrase": draw_paraphrase,
    "qa": draw_qa,
    "sentiment": draw_sentiment,
    "summarization": draw_summarization,
    "translation": draw_translation,
}
SPLIT_SIZES = {"train": 4000, "validation": 600, "test": 600}


@lru_cache(maxsize=32)
def pocket_rows(generator: str, split: str) -> tuple[Row, ...]:
    """Rows of one split of the pocket data set that `generator` makes.

    No row occurs twice, and no first column (the premise, the context, the goal) occurs in two splits.

    Raises:
        ValueError: `generator` or `split` is unknown.
    """
    if generator not in GENERATORS:
        raise ValueError(unknown("pocket generator", generator, GENERATORS))
    if split not in SPLIT_SIZES:
        raise ValueError(unknown("split", split, SPLIT_SIZES))
    rng = random.Random(f"{generator}/{split}")
    rows: dict[str, Row] = {}
    while len(rows) < SPLIT_SIZES[split]:
        row = GENERATORS[generator](rng)
        if _split_of(row) == split:
            rows.setdefault(repr(row), row)
    return tuple(rows.values())


def _split_of(row: Row) -> str:
    """The split a row belongs to, from the content of its first column: one tenth each for the held out."""
    first = next(iter(row.values()))
    bucket = hashlib.sha256(repr(first).encode()).digest()[0] % 10
    return {0: "test", 1: "validation"}.get(bucket, "train")

"""What was computed is kept in a folder, and read again only as the answer to the very same question."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moa.attention import attention_of
from moa.evaluation.files import write_whole
from moa.fingerprint import fingerprint
from moa.model import MoaModel

PACKAGES = ("torch", "transformers", "peft", "moa-peft")


class Kept:
    """The kept answers of one base model, one JSON file each.

    Attributes:
        directory: where the files are.
        answerer: fingerprint and attention of the base model, and versions of the packages; with others everything is
            asked anew.
    """

    def __init__(self, directory: Path, model: MoaModel):
        self.directory = directory
        base = model.get_base_model()
        self.answerer = [fingerprint(base), attention_of(base), *(version(package) for package in PACKAGES)]

    def get(self, name: str, asked: Sequence[Any], compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What `name` holds, if it was computed for just this; else it is computed, and kept.

        Args:
            asked: everything else that the answer depends on, as JSON can hold it.
        """
        key = hashlib.sha256(json.dumps([self.answerer, asked]).encode()).hexdigest()
        file = self.directory / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.json"
        found = _read(file)
        if found.get("key") != key:
            found = {"key": key, **compute()}
            write_whole(json.dumps(found), file)
        return found


def _read(file: Path) -> dict[str, Any]:
    """The object in the file; nothing where it is absent, cut short or somebody else's."""
    try:
        read = json.loads(file.read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # ValueError: neither UTF-8 nor JSON
        return {}
    return read if isinstance(read, dict) else {}

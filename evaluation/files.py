"""A file is there as a whole or not at all."""

import os
import tempfile
from pathlib import Path


def write_whole(text: str, path: Path) -> Path:
    """Through a temporary sibling, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path

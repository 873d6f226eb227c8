"""What a long search has found so far, kept in a file that the same search goes on from."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """A JSON file that is rewritten as a whole after every step; without a path, nothing is kept.

    Attributes:
        content: what the last run had written, None where there was none.
    """

    def __init__(self, path: str | None, recipe: Mapping[str, Any]):
        """Open the file, or prepare to create it.

        Args:
            recipe: all that the search depends on, as plain data: a file is only gone on from if it has the same.

        Raises:
            ValueError: the file holds something else, or another search.
        """
        self.path = Path(path) if path else None
        self.recipe = json.loads(json.dumps(recipe))
        self.content = self._read() if self.path and self.path.exists() else None

    def write(self, content: Any) -> None:
        """Replace what the file holds; a killed process leaves the old file or the new one, never half of it."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        scratch.write_text(json.dumps({"recipe": self.recipe, "content": content}) + "\n")
        scratch.replace(self.path)

    def _read(self) -> Any:
        try:
            found = json.loads(self.path.read_text())
            theirs, content = found["recipe"], found["content"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"journal {str(self.path)!r} holds no search to go on with: name another file") from error
        for name, value in self.recipe.items():
            if theirs.get(name) != value:
                raise ValueError(
                    f"journal {str(self.path)!r} is of a search with another {name} ({theirs.get(name)!r:.100}, "
                    f"this one has {value!r:.100}): name another file, or remove it"
                )
        return content

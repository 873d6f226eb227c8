"""A data folder and a task file of one's own, to read from and to spoil."""

import json
from pathlib import Path

import pytest

OWN_TASK = """
name: tickets
metric: accuracy
prompt: |
  Urgency: high or low?
  Ticket: {text}
  Answer:
choices: {low: [0], high: [1]}
"""


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows (or raw lines) as DIR/<folder>/<split>.jsonl and returns DIR."""

    def write(folder: str, rows: list, split: str = "test") -> Path:
        path = tmp_path / "data" / folder / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return tmp_path / "data"

    return write


@pytest.fixture
def write_task(tmp_path):
    """Writes a task file: the one above, or the text given; returns its path."""

    def write(text: str = OWN_TASK) -> Path:
        path = tmp_path / "own.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write

"""Rows from a folder of the user's own: `DIR/<task>/<split>.jsonl`, one JSON object a line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Located = tuple[dict[str, Any], str]  # a row, and where it was found


def local_rows(data_dir: str | Path, folders: Sequence[str], split: str) -> list[Located]:
    """Every row of a split, with its file and line; the first of `folders` that exists is read.

    Raises:
        FileNotFoundError: the folder or the split's file is not there (the message lists what is).
        ValueError: a line is not a JSON object in UTF-8 (a byte-order mark at its start is passed over).
    """
    path = _task_folder(Path(data_dir), folders) / f"{split}.jsonl"
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in path.parent.glob("*.jsonl"))) or "no .jsonl file"
        raise FileNotFoundError(f"no file {path}: the folder has {found}; add {path.name}")
    rows = []
    with path.open("rb") as lines:  # bytes, since a text file does not say which line it could not decode
        for number, raw in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if line := _text(raw, where).strip():
                rows.append(_row(line, where))
    return rows


def _task_folder(data_dir: Path, folders: Sequence[str]) -> Path:
    if not data_dir.is_dir():
        raise FileNotFoundError(f"no data folder {data_dir}: pass --data_dir a folder that holds <task>/<split>.jsonl")
    for folder in folders:
        if (data_dir / folder).is_dir():
            return data_dir / folder
    wanted = " or ".join(repr(folder) for folder in folders)
    found = ", ".join(sorted(p.name for p in data_dir.iterdir() if p.is_dir())) or "no folders"
    raise FileNotFoundError(f"{data_dir} has no folder {wanted}, only {found}: add it, or leave the task out")


def _text(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.object[error.start]:#04x} is not UTF-8: save the file in UTF-8"
        ) from error


def _row(line: str, where: str) -> Located:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error}): write one JSON object a line") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}, not an object: write {{...}} on every line")
    return row, where

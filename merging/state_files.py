"""A merge state on disk: one JSON file that says what is there, beside one safetensors file that it names.

    merge_state.json                  format, kind, members with weights and hashes, name and hash of the other files
    state-<hash>.safetensors          bases and coordinates, float64
    statistics-<hash>.safetensors     of each member, where the state keeps them
    merge_state.lock                  empty, locked while `merge_kept` creates or changes the state

A new version is complete when its JSON file has replaced the old one; a crash before leaves the old version whole.
"""

import json
import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from moa.adapters import file_sha256
from moa.merging.kept_statistics import KeptStatistics

FORMAT = 1
MANIFEST, LOCK = "merge_state.json", "merge_state.lock"
logger = logging.getLogger(__name__)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Let nobody else create or change the state of this folder; waits for one who does.

    A new folder is there from now on, for the lock, and goes again where no state comes to be in it.
    """
    made: set[Path] = set()
    lock = FileLock(directory / LOCK)
    try:
        _acquire(lock, directory, made)
        try:
            yield
        finally:
            if not (directory / MANIFEST).is_file():
                (directory / LOCK).unlink(missing_ok=True)
            lock.release()
    finally:
        for folder in sorted(made, reverse=True):  # those inside before those around
            with suppress(OSError):  # something is in it
                folder.rmdir()


def _acquire(lock: FileLock, directory: Path, made: set[Path]) -> None:
    """Take the lock, in a folder that is made for it; what was not there is added to `made`."""
    timeout = 0
    while not lock.is_locked:
        made.update(folder for folder in (directory, *directory.parents) if not folder.exists())
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout)
        except FileNotFoundError:
            continue  # one who gave up has taken the folder away
        except Timeout:
            logger.info("waiting for another merge, which creates or changes %s", directory)
            timeout = -1


def write_state(
    directory: Path,
    facts: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    statistics: Mapping[str, KeptStatistics],
) -> dict[str, KeptStatistics]:
    """Make a folder hold this state instead of an earlier one, if there is one.

    Returns:
        The statistics, where they are now stored.

    Raises:
        ValueError: the folder is a file, or holds other things than a state.
    """
    from safetensors.torch import save_file

    check_ours(directory)
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    before = set(directory.iterdir())
    partial = directory / f"{uuid.uuid4().hex[:8]}.partial"
    try:
        kept = {name: known.stored_in(directory) for name, known in statistics.items()}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        sha256 = file_sha256(partial)
        file = directory / f"state-{sha256[:16]}.safetensors"
        partial.replace(file)
        stored = {"format": FORMAT, **facts, "tensors": {"file": file.name, "sha256": sha256}}
        stored["statistics"] = {name: known.to_json() for name, known in kept.items()}
        partial.write_text(json.dumps(stored, indent=1, default=asdict) + "\n")
        (directory / LOCK).touch()  # now, so that a change which is refused adds nothing to the folder
        partial.replace(directory / MANIFEST)
    except BaseException:
        if new and not (directory / MANIFEST).exists():
            shutil.rmtree(directory, ignore_errors=True)
        elif not (directory / MANIFEST).exists():
            for written in filter(_is_ours, set(directory.iterdir()) - before):
                written.unlink()
        raise
    finally:
        partial.unlink(missing_ok=True)
    for earlier in filter(_is_ours, directory.iterdir()):
        if earlier.name not in (file.name, *(known.file.name for known in kept.values())):
            earlier.unlink()
    return kept


def read_state(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, KeptStatistics]]:
    """What `write_state` wrote: facts, tensors and statistics.

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
    statistics = facts.get("statistics", {}).items()
    return facts, load_file(file), {name: KeptStatistics.from_json(stored, directory) for name, stored in statistics}


def check_ours(directory: Path) -> None:
    """A ValueError where the folder is a file, or holds other things than a state."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"cannot save the merge state to {directory}: it is a file, give a folder")
    if not directory.is_dir() or (directory / MANIFEST).is_file():
        return
    if others := sorted(path.name for path in directory.iterdir() if not _is_ours(path) and path.name != LOCK):
        raise ValueError(f"cannot save the merge state to {directory}: it holds {others[0]!r}, give a new folder")


def _is_ours(path: Path) -> bool:
    """Whether a file holds tensors of a state, perhaps one of which the writing was interrupted."""
    return path.suffix == ".safetensors" and path.name.startswith(("state-", "statistics-"))

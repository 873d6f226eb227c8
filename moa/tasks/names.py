"""What to tell a person who wrote a name nobody knows."""

from collections.abc import Iterable

from moa.errors import nearest


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """One sentence: the name that was asked for, the nearest one that exists, and all that exist."""
    names = sorted(known)
    choices = ", ".join(names) or "none, there are none"
    return f"unknown {kind} {name!r}: choose from {choices}{nearest(str(name), names)}"

"""What to tell a person who wrote a name nobody knows."""

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """One sentence: the name that was asked for, the nearest one that exists, and all that exist."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    guess = f" (did you mean {near[0]!r}?)" if near else ""
    return f"unknown {kind} {name!r}{guess}: choose from {', '.join(names) or 'none, there are none'}"

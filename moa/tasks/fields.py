"""Reading a row: where a field is, what its answers are, what its label means."""

import string
from collections.abc import Mapping, Sequence
from typing import Any


def template_fields(template: str) -> tuple[str, ...]:
    """Names of the fields that a prompt template shows, in order, each once.

    Raises:
        ValueError: a brace is not closed, or a field is not a plain name ("{}", "{0}", "{a.b}").
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(
            f"the prompt's braces do not match ({error}): write {{{{ or }}}} for a plain brace"
        ) from error
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"the prompt has a field {{{name}}}: a field is a plain name like {{sentence}}")
    return tuple(dict.fromkeys(names))


def find_field(row: Mapping[str, Any], columns: Sequence[str], where: str) -> Any:
    """The value of the first of `columns` that the row has; "answers.text" goes into a nested value.

    Raises:
        ValueError: the row has none of them, or nothing in them.
    """
    for column in columns:
        value = row.get(column)
        if value is None and "." in column:
            value = _nested(row, column)
        if value is not None:
            return value
    if empty := [column for column in columns if column in row]:
        raise ValueError(f"{where}: the row's {empty[0]!r} is null: give it a value, or leave the row out")
    wanted = " or ".join(repr(column) for column in columns)
    raise ValueError(f"{where}: the row has no {wanted}, only {', '.join(map(repr, row))}: add the field")


def _nested(row: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path through mappings and lists, or None."""
    value: Any = row
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def acceptable_answers(value: Any, where: str) -> tuple[str, ...]:
    """Every distinct answer in a text or a list of texts, stripped.

    Raises:
        ValueError: there is no answer, or one is blank.
    """
    texts = [str(item).strip() for item in (value if isinstance(value, list | tuple) else [value])]
    if not texts or not all(texts):
        raise ValueError(f"{where}: the answer is empty ({value!r}): give the row at least one answer text")
    return tuple(dict.fromkeys(texts))


def as_answer(text: str) -> str:
    """An answer as it follows a prompt: one space, then one line (generation stops at a line's end)."""
    return " " + " ".join(text.split())


def normalised(value: Any) -> str:
    """A label as text, so that 1, 1.0, "1" and " 1" are one label, and "Entailment" is "entailment"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return " ".join(str(value).lower().split())

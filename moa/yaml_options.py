"""A YAML file of options, read strictly: the text of each value is kept until the field's type is known.

`yaml.safe_load` guesses types before anybody can say what is wanted: `1e-3` becomes a string, an unquoted
`no` becomes False, and of two equal keys the last one wins in silence.
"""

import argparse
import re
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml

from moa.errors import nearest, one_line
from moa.yaml_nodes import composed

NULL = "tag:yaml.org,2002:null"


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number inside lists and mappings; YAML 1.1 asks for 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_options(file: str) -> list[tuple[str, yaml.Node, str]]:
    """The top-level `key: value` pairs of a file as (key, value node, "file, line n").

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is no YAML, is empty, is no mapping, sets a key twice, or has aliases that cannot be
            written out.
    """
    path = Path(file)
    if not path.is_file():
        siblings = [str(p) for pattern in ("*.yaml", "*.yml") for p in path.parent.glob(pattern)]
        raise FileNotFoundError(f"--config {file}: there is no such file{nearest(file, siblings)}")
    try:
        root = composed(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {one_line(error)}") from None
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if root is None:
        raise ValueError(f"{file} is empty: write one `name: value` a line, or leave --config out")
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file} must hold `name: value` lines, got {_kind(root)}")
    _refuse_duplicate_keys(root, file)
    return [(str(key.value), value, f"{file}, line {_line(key)}") for key, value in root.value]


def read_mapping(file: str) -> dict[str, Any]:
    """The whole file as plain values, as strictly as `read_options`.

    Raises:
        FileNotFoundError, ValueError: as `read_options`.
    """
    return {key: _plain(node, where) for key, node, where in read_options(file)}


def environment_of(node: yaml.Node, where: str) -> dict[str, str]:
    """The variables of the `env:` block, their values as written."""
    if isinstance(node, yaml.MappingNode) and all(isinstance(v, yaml.ScalarNode) for _, v in node.value):
        return {str(name.value): value.value for name, value in node.value}
    raise ValueError(f"{where}: env takes a mapping of variable names to plain values, got {_kind(node)}")


def value_of(node: yaml.Node, action: argparse.Action, hint: Any, where: str) -> Any:
    """What a node means for a field: text as the command line reads it, lists and mappings as they are.

    Args:
        action: the field's option, whose `type`, `choices` and `nargs` read the text.
        hint: the field's annotation, which alone says whether None, a list or a mapping is allowed.
        where: the start of an error's sentence, "file, line n: name".

    Raises:
        ValueError: when the node is not what the field takes.
    """
    allowed = _alternatives(hint)
    if isinstance(node, yaml.ScalarNode):
        if node.tag == NULL and types.NoneType in allowed:
            return None
        value = _scalar(node, action, where)
        return [value] if action.nargs == "+" else value
    if isinstance(node, yaml.SequenceNode) and list in allowed:
        if action.nargs == "+" and all(isinstance(item, yaml.ScalarNode) for item in node.value):
            return [_scalar(item, action, where) for item in node.value]
        return _plain(node, where)
    if isinstance(node, yaml.MappingNode) and dict in allowed:
        return _plain(node, where)
    raise ValueError(f"{where} takes {_expected(action)}, got {_kind(node)}")


def _scalar(node: yaml.ScalarNode, action: argparse.Action, where: str) -> Any:
    refusal = f"{where} takes {_expected(action)}, got {_kind(node)}"
    if node.tag == NULL:
        raise ValueError(refusal)
    try:
        value = action.type(node.value)  # type: ignore[operator, misc]
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise ValueError(refusal) from None
    if action.choices is not None and value not in action.choices:
        raise ValueError(refusal + nearest(node.value, map(str, action.choices)))
    return value


def _plain(node: yaml.Node, where: str) -> Any:
    try:
        return _Loader("").construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} cannot be read: {one_line(error)}") from None


def _alternatives(hint: Any) -> set[Any]:
    """`list[str] | None` -> {list, NoneType}."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(member) or member for member in members}


def _refuse_duplicate_keys(node: yaml.Node, file: str) -> None:
    """YAML forbids a key twice in a mapping, but PyYAML keeps the last."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicate_keys(item, file)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), _line(key)
            if name in first:
                raise ValueError(f"{file}, line {line}: {name!r} is already on line {first[name]}: keep one")
            first[name] = line
            _refuse_duplicate_keys(value, file)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _expected(action: argparse.Action) -> str:
    if action.choices is not None:
        return "one of " + ", ".join(map(str, action.choices))
    name = getattr(action.type, "__name__", "value")
    words = {"string_to_bool": "true or false", "float": "a number", "int": "a whole number", "str": "text"}
    return words.get(name, f"a {name}")


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "nothing" if node.tag == NULL else repr(node.value)
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"

"""A YAML text as nodes, without the aliases that blow up when they are written out: "billion laughs"."""

from itertools import chain

import yaml

LARGEST = 1_000_000
"""Characters that a text may have with its aliases written out, where that is more than twice the text."""
DEEPEST = 100
"""Lists and mappings inside each other. Far more of them, as keys of mappings, exhaust Python's stack in PyYAML."""
TOO_DEEP = "it is nested too deeply: write fewer lists and mappings inside each other"


def composed(text: str, loader: type[yaml.SafeLoader]) -> yaml.Node | None:
    """The root node of a text, None for an empty one.

    Raises:
        yaml.YAMLError: it is no YAML.
        ValueError: it is nested too deeply, or has an alias of what it is itself part of, or aliases that stand for
            far more than the text.
    """
    try:
        root = yaml.compose(text, Loader=loader)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if root is not None and _size(root, {}) > max(LARGEST, 2 * len(text)):
        raise ValueError(f"its aliases (*name) stand for more than {LARGEST:,} characters: write out what is meant")
    return root


def _size(node: yaml.Node, known: dict[int, int], around: int = 0) -> int:
    """Characters of a node with its aliases written out; `known` holds the sizes of others, 0 of those around it."""
    if around > DEEPEST:
        raise ValueError(TOO_DEEP)
    if known.get(id(node)) == 0:
        raise ValueError("it holds an alias (*name) of what it is itself part of: write it out")
    if id(node) not in known:
        known[id(node)] = 0
        if isinstance(node, yaml.ScalarNode):
            known[id(node)] = 1 + len(node.value)
        else:
            inside = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
            known[id(node)] = 1 + sum(_size(item, known, around + 1) for item in inside)
    return known[id(node)]

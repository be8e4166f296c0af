"""Read one YAML document by the 1.2 core schema, within bounds: no document hangs, and no fault is a traceback.

A config needs mappings with text as keys, lists, text, numbers, true, false and null; every other type is refused by
its name. Aliases and merge keys are read, but what they expand to counts, so that a few lines cannot fill the memory.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_TEXT = 1_000_000
"""characters of a document"""
MAX_DEPTH = 50
"""mappings and lists within each other"""
MAX_VALUES = 100_000
"""values of a document, with every alias replaced by what it stands for"""
MAX_DIGITS = 100
"""characters of a number"""

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
"""type -> the plain texts that are of this type, and their first characters"""
_PATTERNS = {f"{_TAG}{name}": re.compile(rf"^(?:{pattern})$") for name, (pattern, _) in _SCALARS.items()}
_STR, _MERGE = f"{_TAG}str", f"{_TAG}merge"
_KINDS = {
    yaml.ScalarNode: {*_PATTERNS, _STR} - {_MERGE},
    yaml.SequenceNode: {f"{_TAG}seq"},
    yaml.MappingNode: {f"{_TAG}map"},
}


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars and no duplicate keys; its nodes are checked by `compose` first."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = node.value.lower()
    return int(text, 0) if text.startswith(("0x", "0o")) else int(text)


for _name, (_, _first) in _SCALARS.items():
    Loader.add_implicit_resolver(f"{_TAG}{_name}", _PATTERNS[f"{_TAG}{_name}"], _first)
Loader.add_constructor(f"{_TAG}int", _construct_int)


def read_document(text: str) -> tuple[Any, yaml.Node | None]:
    """Return the value of a YAML text, and its node with the places in the text; None and None for an empty text.

    Raises:
        yaml.YAMLError: the text is not YAML, has a type that no config has, or is beyond the bounds above.
    """
    if len(text) > MAX_TEXT:
        raise yaml.YAMLError(f"{len(text):,} characters; a config has at most {MAX_TEXT:,}")
    try:
        _check_depth(text)
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _check_node(node, {})
        return loader.construct_document(node), node
    except (ValueError, OverflowError) as error:  # such as the escape \UFFFFFFFF, which is no character
        raise yaml.YAMLError(str(error)) from None


def explain(error: yaml.YAMLError) -> str:
    """Return the place and the problem of an error, in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


def _problem(problem: str, node: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check_depth(text: str) -> None:
    """Bound the nesting before the nodes are made, which takes one call of a function for each level."""
    depth = 0
    for event in yaml.parse(text, Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _problem(f"more than {MAX_DEPTH} lists and mappings within each other", event)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_node(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Check a node and what it holds, and return the number of its values, with every alias expanded.

    `sizes` holds the counts of finished nodes by identity, and 0 for the nodes around this one.
    """
    known = sizes.get(id(node))
    if known == 0:
        raise _problem("an anchor that holds itself", node)
    if known:
        return known
    if node.tag not in _KINDS[type(node)]:
        raise _problem(f"a value of the type {_short(node.tag)}, which no config has", node)
    sizes[id(node)] = 0
    size = 1
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node)
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
        for key, value in node.value:
            size += _size_of_merge(value, sizes) if key.tag == _MERGE else _check_node(value, sizes)
    else:
        for item in node.value:
            size += _check_node(item, sizes)
    if size > MAX_VALUES:
        raise _problem(f"more than {MAX_VALUES:,} values, with its aliases expanded", node)
    sizes[id(node)] = size
    return size


def _size_of_merge(node: yaml.Node, sizes: dict[int, int]) -> int:
    merged = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(one, yaml.MappingNode) for one in merged):
        raise _problem("<< takes a mapping or a list of mappings", node)
    return sum(_check_node(one, sizes) for one in merged)


def _check_scalar(node: yaml.ScalarNode) -> None:
    pattern = _PATTERNS.get(node.tag)
    if pattern and not pattern.match(node.value):
        raise _problem(f"'{node.value[:40]}' is no {_short(node.tag)}", node)
    if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
        raise _problem(f"a number of {len(node.value):,} characters; at most {MAX_DIGITS} are read", node)
    if node.tag == _STR and any(0xD800 <= ord(character) <= 0xDFFF for character in node.value):
        raise _problem("text with half of a surrogate pair, which is no character", node)


def _check_keys(node: yaml.MappingNode) -> None:
    """Make every key text (`on`, `1` and `null` too); refuse other keys and keys that are given twice."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem("a key that is a list or a mapping; a key is text", key)
        if key.tag == _MERGE:
            continue
        if key.tag not in _KINDS[yaml.ScalarNode]:
            raise _problem(f"a key of the type {_short(key.tag)}; a key is text", key)
        if key.value in seen:
            raise _problem(f"key '{key.value}' is given twice, first in line {seen[key.value]}; keep one", key)
        key.tag = _STR
        _check_scalar(key)
        seen[key.value] = key.start_mark.line + 1


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")

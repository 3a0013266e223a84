"""YAML in which no name has two values. Torch-free."""

from __future__ import annotations

from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


class TwiceError(ValueError):
    """A key stands twice in one mapping."""


def read_yaml(text: str) -> tuple[object, dict[str, list[int]]]:
    """Reads one document, with YAML's own rule that PyYAML does not keep: the keys of a mapping are unique.

    A key beside a merge (`<<`) is no second one, for that is how a merged value is replaced.

    Returns:
        the value; and dotted key → the lines where it stands, from 1.

    Raises:
        TwiceError: a key stands twice in a mapping, at any depth; names both lines.
        yaml.YAMLError: no YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        lines: dict[str, list[int]] = {}
        _note_lines(node, "", loader, lines, set())
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


def _note_lines(
    node: yaml.Node, prefix: str, loader: yaml.SafeLoader, lines: dict[str, list[int]], seen: set[int]
) -> None:
    if id(node) in seen:  # an alias of what was read already
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _note_lines(child, f"{prefix}[].", loader, lines, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[Any, int] = {}
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        scalar = isinstance(key_node, yaml.ScalarNode)
        if scalar:  # what is no scalar can be no key of a Python mapping, which PyYAML says
            key = key_node.value if key_node.tag == MERGE else loader.construct_object(key_node)
            if key in first:
                places = f"lines {first[key]} and {line}" if line != first[key] else f"line {line}"
                raise TwiceError(f"{prefix}{key} stands twice, in {places}; keep one")
            first[key] = line
            lines.setdefault(f"{prefix}{key}", []).append(line)
        _note_lines(child, f"{prefix}{key_node.value}." if scalar else prefix, loader, lines, seen)

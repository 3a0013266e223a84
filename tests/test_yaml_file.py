"""YAML in which no name has two values."""

from __future__ import annotations

import pytest
import yaml

from qalora.yaml_file import TwiceError, read_yaml


def test_values_and_their_lines():
    value, lines = read_yaml("a: 1\nb:\n  c: [x, y]\n  d: yes\n")
    assert value == {"a": 1, "b": {"c": ["x", "y"], "d": True}}
    assert lines == {"a": [1], "b": [2], "b.c": [3], "b.d": [4]}
    assert read_yaml("# nothing\n") == (None, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "a stands twice, in lines 1 and 2; keep one"),
        ("b:\n  c: 1\n  d: 2\n  c: 1\n", "b.c stands twice, in lines 2 and 4; keep one"),
        ("{a: 1, a: 2}", "a stands twice, in line 1; keep one"),
        ("l:\n- {x: 1, x: 2}\n", "l.[].x stands twice, in line 2; keep one"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(text, message):
    with pytest.raises(TwiceError, match=f"^{message.replace('[', chr(92) + '[').replace(']', chr(92) + ']')}$"):
        read_yaml(text)


def test_a_key_beside_a_merge_replaces_it():
    value, _ = read_yaml("base: &b {x: 1, y: 2}\nmine: {<<: *b, y: 3}\n")
    assert value["mine"] == {"x": 1, "y": 3} == yaml.safe_load("{x: 1, y: 3}")

from __future__ import annotations

import argparse
from importlib import import_module

import pytest

from qalora.__main__ import COMMANDS
from qalora.paths import PATH_FLAGS, expanded, with_expanded_flags


@pytest.fixture(autouse=True)
def places(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("where", "path"),
    [
        ("~/rows.jsonl", "/home/me/rows.jsonl"),
        ("$HOME/rows", "/home/me/rows"),
        ("${DATA}/a/*.jsonl", "/data/a/*.jsonl"),
        ("$DATA", "/data"),
        ("owner/name", "owner/name"),
        ("qalora:quickstart", "qalora:quickstart"),
        ("-", "-"),
        ("~/a.jsonl,$DATA/b", "/home/me/a.jsonl,/data/b"),
        (["~/a", "b"], ["/home/me/a", "b"]),
        (None, None),
    ],
)
def test_home_and_variables(where, path):
    assert expanded(where) == path


@pytest.mark.parametrize("where", ["$NOWHERE/rows", "a/${NOWHERE}/b", "~/$NOWHERE"])
def test_a_variable_that_is_not_set_is_named(where):
    with pytest.raises(ValueError, match=r"\$\{?NOWHERE\}? is not set in the environment"):
        expanded(where)


def test_a_name_with_a_dollar_that_is_there_is_itself(tmp_path):
    (tmp_path / "$NOWHERE").mkdir()
    assert expanded("$NOWHERE") == "$NOWHERE"


def test_the_flags_that_name_paths_and_no_others():
    words = [
        "--data",
        "~/a",
        "--adapter=$DATA/b",
        "--prompt",
        "$HOME ~/c",
        "--output",
        "--rows",
        "data.train=~/d",
        "--system=$DATA",
    ]
    found = [
        "--data",
        "/home/me/a",
        "--adapter=/data/b",
        "--prompt",
        "$HOME ~/c",
        "--output",
        "--rows",
        "data.train=~/d",
        "--system=$DATA",
    ]
    assert with_expanded_flags(words) == found


def test_every_flag_that_names_a_path_is_known():
    for command in COMMANDS:
        module = import_module(f"qalora.{command}") if command != "recipes" else None
        for action in module.parser()._actions if module else ():
            if isinstance(action, argparse._StoreAction) and action.metavar in (
                "DIR",
                "FILE",
                "PATH",
                "PATH|auto",
                "FILE|-",
            ):
                assert set(action.option_strings) <= set(PATH_FLAGS), (command, action.option_strings)

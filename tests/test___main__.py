"""One table of commands drives `qalora` and `python -m qalora`."""

from __future__ import annotations

import sys

import pytest

from qalora import __version__
from qalora.__main__ import main


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--version"], 0, __version__),
        ([], 0, "usage: qalora COMMAND"),
        (["recipes"], 0, "quickstart"),
        (["recipes", "show", "sst2"], 0, "The sentiment of the given sentence is:"),
        (["recipes", "show"], 2, "usage: qalora recipes"),
        (["tune"], 2, "tune: unknown command"),
        (["plan", "--model", "llama-7b", "--gpu-memory", "1GiB"], 1, "does not fit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_commands(monkeypatch, capsys, words, code, text):
    monkeypatch.setattr(sys, "argv", ["qalora", *words])
    assert main() == code
    assert text in "".join(capsys.readouterr())

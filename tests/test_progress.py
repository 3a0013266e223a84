"""Bars on a terminal, and nothing elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from qalora import progress
from qalora.progress import Bar, in_place_of_transformers, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """open() → standard error as a terminal that keeps what is written; within the test, for pytest captures anew for
    each phase."""

    def opened(stream=None):
        stream = Terminal() if stream is None else stream
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress, "console", type(progress.console)(stderr=True, width=100))
        return stream

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_wanted", True)  # a quiet run of another test may have said no
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    yield opened
    assert progress._drawn is None


def test_a_bar_counts_its_items_and_goes(terminal):
    stream, seen = terminal(), []
    for item in track([3, 4, 5], "merging"):
        seen.append(item)
        progress._drawn.refresh()
    assert seen == [3, 4, 5]
    drawn = stream.getvalue()
    assert "merging" in drawn and "0/3" in drawn and "2/3" in drawn
    assert "merging" not in drawn.rpartition("\x1b[2K")[2]  # the line is erased at the end


def test_bars_within_bars_share_the_terminal(terminal):
    stream = terminal()
    with Bar("training", total=10, done=4) as outer:
        progress._drawn.refresh()
        for _ in track("ab", "ablating"):
            progress._drawn.refresh()
            outer.advance()
        outer.reach(9)
        progress._drawn.refresh()
    drawn = stream.getvalue()
    assert "4/10" in drawn and "0/2" in drawn and "9/10" in drawn
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h") == 1  # the cursor is hidden once, and shown again


def test_an_error_takes_the_bar_away(terminal):
    terminal()

    def broken():
        for item in track([1, 2], "loading"):
            raise RuntimeError(item)

    try:
        broken()
    except RuntimeError:
        assert progress._drawn is None
    with pytest.raises(ValueError, match="in the block"), Bar("verifying", 3):
        raise ValueError("in the block")


@pytest.mark.parametrize("how", ["a file", "dumb", "not wanted", "FORCE_COLOR"])
def test_elsewhere_nothing_is_written(terminal, monkeypatch, how):
    monkeypatch.setenv("TERM", "dumb" if how == "dumb" else "xterm")
    if how == "FORCE_COLOR":
        monkeypatch.setenv("FORCE_COLOR", "1")
    stream = terminal(io.StringIO() if how in ("a file", "FORCE_COLOR") else Terminal())
    progress.show(how != "not wanted")
    try:
        with Bar("loading", 2) as bar:
            bar.advance()
            bar.reach(2)
        assert list(track([1], "merging")) == [1]
    finally:
        progress.show(True)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("what", ["loading", None])
def test_bars_of_transformers_become_ours(terminal, what):
    from transformers.utils import logging

    stream = terminal()
    with in_place_of_transformers(what):
        assert list(logging.tqdm({"a": 1, "b": 2}.items(), desc="Loading weights")) == [("a", 1), ("b", 2)]
    assert ("loading" in stream.getvalue()) == (what is not None)
    assert "Loading weights" not in stream.getvalue()
    assert list(logging.tqdm([1], desc="Loading weights", file=stream)) == [1]
    assert "Loading weights" in stream.getvalue()  # afterwards theirs again

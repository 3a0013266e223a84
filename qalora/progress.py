"""Progress bars in one style, on a terminal alone; several at a time share it, as a round of allocation does with its
training."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Ctrl-C ends the reader of a pipe too (`| tee log`), and the run still has its checkpoint to write.
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for the rest of the process)

    def print(self, *objects: Any, **options: Any) -> None:
        """A line stays a line where there is no terminal whose width it should fit, and brackets in it are no
        markup."""
        settings = {"soft_wrap": not self.is_terminal, "markup": False, "highlight": False, **options}
        with suppress(OSError):  # a log on a full disk is no reason to end a run
            super().print(*objects, **settings)


console = _Console(stderr=True)
_wanted = True
_drawn: Progress | None = None  # the bars on the terminal


def show(wanted: bool) -> None:
    """Whether bars are drawn from here on, where there is a terminal (default: yes)."""
    global _wanted
    _wanted = wanted


def is_shown() -> bool:
    """Whether a bar would be drawn. FORCE_COLOR makes no terminal of a file, and a dumb one cannot take a bar back."""
    return _wanted and bool(getattr(sys.stderr, "isatty", bool)()) and not console.is_dumb_terminal


class Bar:
    """A bar, taken away at its end. Where none is shown, it does nothing.

    Args:
        what: the word before it, such as "merging".
        total: steps; None: it is not known how many, and the bar only moves.
        done: steps that are behind it already.
    """

    def __init__(self, what: str, total: int | None = None, done: int = 0):
        self._task: Any = None
        if not is_shown():
            return
        global _drawn
        if _drawn is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            _drawn = Progress(*columns, console=console, transient=True)
            _drawn.start()
        self._task = _drawn.add_task(what, total=total, completed=done)

    def advance(self, steps: int = 1) -> None:
        if self._task is not None and _drawn is not None:
            _drawn.advance(self._task, steps)

    def expect(self, total: int) -> None:
        """Says how many steps there are."""
        if self._task is not None and _drawn is not None:
            _drawn.update(self._task, total=total)

    def reach(self, done: int) -> None:
        """Sets how many steps are behind it."""
        if self._task is not None and _drawn is not None:
            _drawn.update(self._task, completed=done)

    def close(self) -> None:
        """Takes it away, and with the last of them shows the cursor again. A second call does nothing."""
        global _drawn
        if self._task is None or _drawn is None:
            return
        _drawn.remove_task(self._task)
        self._task = None
        if not _drawn.tasks:
            _drawn.stop()
            _drawn = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Track(Protocol):
    """How a long work goes through its batches: `track`, or `untracked`."""

    def __call__(self, items: Collection[T], what: str) -> Iterable[T]: ...


def untracked(items: Collection[T], what: str) -> Collection[T]:
    """The items, without a bar."""
    return items


def track(items: Collection[T], what: str) -> Iterator[T]:
    """The items one after the other, with a bar while they last."""
    with Bar(what, len(items)) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def in_place_of_transformers(what: str | None) -> Iterator[None]:
    """While it lasts, a bar of transformers' is one of ours.

    Args:
        what: the word before it; None: there is none.
    """
    from transformers.utils import logging

    def hook(bar: Any, args: tuple[Any, ...], options: dict[str, Any]) -> object:
        # Theirs is made all the same, and draws nothing: it is an object that their code calls.
        if what is not None and args and hasattr(args[0], "__len__"):
            args = (track(args[0], what), *args[1:])
        return bar(*args, **{**options, "disable": True})

    before = logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)

"""How every command ends: results in the exit code, failures in one sentence on stderr."""

from __future__ import annotations

import argparse
import codecs
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from io import UnsupportedOperation
from types import ModuleType
from typing import Any

import qalora
from qalora.errors import AnswerNo, InputError
from qalora.paths import with_expanded_flags
from qalora.quiet import hide_noise

DONE, NO, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
UNREAD = 141  # as shells say of a program that SIGPIPE ended


def run(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a command's `main` on the arguments; 0 done, 1 the answer is no, 2 bad input, 130 interrupted, 141 its
    reader left."""
    hide_noise(verbose="--verbose" in (sys.argv[1:] if argv is None else argv))
    print_in_any_encoding()
    try:
        return _ended(main, argv)
    except BrokenPipeError:
        return UNREAD
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # of rich, which ends a program so
            return UNREAD
        raise
    finally:
        _leave_unread()


def _ended(main: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    try:
        return main(_words(sys.argv[1:] if argv is None else argv))
    except InputError as error:
        say(f"error: {error.as_typed}")
        return BAD_INPUT
    except AnswerNo as error:
        say(f"error: {error}")
        return NO
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this file does without
            raise
        say(
            f"error: out of memory ({' '.join(str(error).split())[:160]}); `qalora plan` says what fits. Use a smaller "
            "model, or shorter rows, or fewer of them a forward (data.max_seq_len, training.micro_batch_size, "
            "evaluation.batch_size)."
        )
        return NO


class _Callable(ModuleType):
    """A command's module that is called like the function of the same name in the API: `qalora.merge(…)`."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(qalora._HOMES[name]), name)(*args, **kwargs)


def make_callable(name: str) -> None:
    """Importing a command's module puts it in the place of the function of the API that has its name."""
    sys.modules[name].__class__ = _Callable


def say(text: str) -> None:
    """To standard error, or to nobody: Ctrl-C ends the reader of a pipe too (`| tee log`), and the command has still
    work to do."""
    with suppress(BrokenPipeError):
        print(text, file=sys.stderr)


def _leave_unread() -> None:
    """What nobody reads any more (`| head`) goes nowhere, so that Python's own last flush does not fail."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _words(argv: Sequence[str]) -> list[str]:
    """The command's words as text, with the paths that flags name expanded.

    Raises:
        InputError: bytes that are no UTF-8, or a path with a variable that is not set.
    """
    try:
        return with_expanded_flags([_decoded(word) for word in argv])
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{error}.") from None


def _decoded(word: str) -> str:
    """A word of the command line, of which Python keeps what the locale cannot decode as surrogates."""
    if not any("\udc80" <= character <= "\udcff" for character in word) or os.path.exists(word):
        return word
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{word}: not UTF-8; write it in UTF-8.") from None


def print_in_any_encoding() -> None:
    """A character that the encoding of an output lacks is escaped, so that no answer is lost for it; ASCII input is
    read as UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, UnsupportedOperation):  # a stream that a program put in their place
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    with suppress(AttributeError, UnsupportedOperation):
        if codecs.lookup(sys.stdin.encoding).name == "ascii":
            sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]


class Parser(argparse.ArgumentParser):
    """argparse's, but a flag is not abbreviated, and not given twice with two values, of which argparse takes the last.
    Every command takes --verbose, which `run` looks for."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)
        self.register("action", None, _Once)
        self.register("action", "store", _Once)
        self.add_argument("--verbose", action="store_true", help="show the libraries' own notes and deprecations too")


class _Once(argparse.Action):
    _given: tuple[str, Any] | None = None

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: object, option_string: str | None = None
    ) -> None:
        flag, value = self._given or (option_string, values)
        if value != values and values == values:  # not a number is no other than itself
            raise InputError(
                f"command line: two values for {option_string}, {flag} {value} and {option_string} {values}; keep one."
            )
        self._given = (str(option_string), values)
        setattr(namespace, self.dest, values)

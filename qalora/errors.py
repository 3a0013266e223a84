"""The ways in which a command ends without its result; `qalora.cli.run` turns them into exit codes."""

from __future__ import annotations

import re
from collections.abc import Sequence

_QUOTED = re.compile(r"(`[^`]*`)")  # commands, which stay as they are typed
_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]*)")


class InputError(ValueError):
    """Bad input (exit code 2): one sentence that says which value, in which file, and what to do about it.

    A command prints it with its flags (`as_typed`); in Python it names parameters (--max-rank 8 becomes max_rank 8).
    """

    def __str__(self) -> str:
        parts = _QUOTED.split(self.as_typed)
        return "".join(
            part if part.startswith("`") else _FLAG.sub(lambda m: m[1].replace("-", "_"), part) for part in parts
        )

    @property
    def as_typed(self) -> str:
        """The sentence with the flags of a command."""
        return super().__str__()


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """
    Args:
        name: of the parameter.

    Raises:
        InputError: the value is none of the choices.
    """
    if value not in choices:
        raise InputError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}.")


class AnswerNo(Exception):
    """The command ran and the answer is no (exit code 1): does not fit, over tolerance, never allocated."""


class EndedElsewhere(Exception):
    """Another process of the run ended it, and has said why.

    Attributes:
        code: its exit code.
    """

    def __init__(self, code: int):
        super().__init__(f"another process ended the run with exit code {code}")
        self.code = code


def short(error: object) -> str:
    """What an error says in one line of 200 characters at most."""
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else f"{text[:198].rstrip()} …"

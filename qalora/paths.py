"""Paths as people write them: `~` and variables of the environment stand for what they name. Torch-free."""

from __future__ import annotations

import os
import re
from typing import TypeVar

T = TypeVar("T", bound=str | list[str] | None)

# The flags of all commands that name a file or a folder.
PATH_FLAGS = (
    "--model", "--recipe", "--output-dir", "--resume-from-checkpoint", "--adapter", "--data", "--output",
    "--predictions", "--prompt-file", "--original",
)  # fmt: skip


def expanded(where: T) -> T:
    """A path, or several, also in one text with commas, with `~`, $NAME and ${NAME} replaced; what is no path has none
    of them and stays as it is.

    Raises:
        ValueError: a variable that is not set.
    """
    if where is None:
        return where
    return _expanded(where) if isinstance(where, str) else [_expanded(path) for path in where]  # type: ignore[return-value]


def _expanded(where: str) -> str:
    if os.path.exists(where):
        return where
    if "," in where:  # several, as some flags take them
        return ",".join(_expanded(path) for path in where.split(","))
    path = os.path.expandvars(os.path.expanduser(where))
    if unset := re.search(r"\$(\w+|\{[^}]*\})", path):
        raise ValueError(f"{unset[0]} is not set in the environment; set it, or write the path out")
    return path


def with_expanded_flags(words: list[str]) -> list[str]:
    """A command's words, with the paths that its flags name expanded: `--data ~/rows` and `--data=$HOME/rows` alike.

    Raises:
        ValueError: a variable that is not set.
    """
    found = []
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, path = word.partition("=")
        if before in PATH_FLAGS and not word.startswith("--"):
            found.append(expanded(word))
        else:
            found.append(f"{flag}={expanded(path)}" if equals and flag in PATH_FLAGS else word)
    return found

"""The two ways in which a command ends without its result; `qalora.cli.run` turns them into exit codes."""

from __future__ import annotations


class InputError(Exception):
    """Bad input (exit code 2): one sentence that says which value, in which file, and what to do about it."""


class AnswerNo(Exception):
    """The command ran and the answer is no (exit code 1): does not fit, over tolerance, never allocated."""

"""`qalora` itself: its commands, and the exit codes that scripts depend on."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest
import torch

from qalora import __version__
from qalora.__main__ import main
from qalora.cli import Parser, run
from qalora.errors import AnswerNo, InputError


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


@pytest.mark.parametrize(("error", "code"), [(AnswerNo("no"), 1), (InputError("bad"), 2), (KeyboardInterrupt(), 130)])
def test_exit_codes(capsys, error, code):
    def command(argv: list[str]) -> int:
        raise error

    assert run(command, []) == code
    assert (str(error) or "interrupted") in capsys.readouterr().err


def test_a_lack_of_memory_is_one_sentence_and_other_errors_are_not(capsys):
    def command(argv: list[str]) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20.00 MiB.")

    assert run(command, []) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "error: out of memory (CUDA out of memory. Tried to allocate 20.00 MiB.); `qalora plan` says"
    )
    assert said.count("\n") == 1

    def broken(argv: list[str]) -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run(broken, [])


def test_a_flag_with_two_values_is_refused_and_twice_the_same_is_not():
    def parsed(*words):
        parser = Parser()
        parser.add_argument("--rows", "-n", type=int, default=3)
        parser.add_argument("--quiet", action="store_true")
        return parser.parse_known_args(words)[0]

    assert parsed().rows == 3
    assert parsed("--rows", "4", "--quiet", "--quiet", "-n", "4").rows == 4
    for words in (["--rows", "3", "--rows=4"], ["--rows", "3", "-n4"]):
        with pytest.raises(
            InputError, match="^command line: two values for (--rows|-n), --rows 3 and (--rows|-n) 4; keep one.$"
        ):
            parsed(*words)


@pytest.mark.parametrize("command", ["finetune", "plan", "score", "merge", "evaluate", "generate"])
def test_every_command_refuses_two_models(command, capsys):
    words = ["--model", "a", "--adapter", "x", "--output", "y", "--data", "z", "--recipe", "alpaca", "--model", "b"]
    assert run(import_module(f"qalora.{command}").main, words) == 2
    assert (
        capsys.readouterr().err == "error: command line: two values for --model, --model a and --model b; keep one.\n"
    )

"""`qalora` itself: its commands, and the exit codes that scripts depend on."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch

from qalora.adapter.callback import console
from qalora.cli import Parser, run
from qalora.errors import AnswerNo, InputError
from qalora.memory import MemoryPlan
from qalora.plan import print_plan


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
            InputError, match="^command line: two values for (rows|-n), rows 3 and (rows|-n) 4; keep one.$"
        ):
            parsed(*words)


def test_not_a_number_given_once_is_one_value():
    parser = Parser()
    parser.add_argument("--temperature", type=float)
    assert math.isnan(parser.parse_args(["--temperature", "nan"]).temperature)


@pytest.mark.parametrize("command", ["finetune", "plan", "preview", "score", "merge", "evaluate", "generate"])
def test_every_command_refuses_two_models(command, capsys):
    words = ["--model", "a", "--adapter", "x", "--output", "y", "--data", "z", "--recipe", "alpaca", "--model", "b"]
    assert run(import_module(f"qalora.{command}").main, words) == 2
    assert (
        capsys.readouterr().err == "error: command line: two values for --model, --model a and --model b; keep one.\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_lacks_is_escaped(monkeypatch, encoding):
    """An answer with an emoji, a table of rich, an error."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(
        sys,
        "stdin",
        io.TextIOWrapper(io.BytesIO("grüß\n".encode(encoding if encoding != "ascii" else "utf-8")), encoding=encoding),
    )

    def command(argv: list[str]) -> int:
        assert sys.stdin.readline() == "grüß\n"
        print("ja 🙂 → ü")
        print_plan(MemoryPlan({"4-bit weights": 2**20}))
        raise InputError("– no")

    assert run(command, []) == 2
    out, err = (stream.buffer.getvalue().decode(encoding) if not stream.flush() else "" for stream in streams)
    said = {"ascii": "ja \\U0001f642 \\u2192 \\xfc", "latin-1": "ja \\U0001f642 \\u2192 ü", "utf-8": "ja 🙂 → ü"}
    assert said[encoding] in out and "4-bit weights" in out
    assert ("error: – no" if encoding == "utf-8" else "error: \\u2013 no") in err


def test_words_that_the_locale_cannot_decode_are_utf_8(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    raw = "grüß".encode().decode("ascii", "surrogateescape")
    assert run(lambda argv: seen.extend(argv) or 0, ["--prompt", raw]) == 0
    assert seen == ["--prompt", "grüß"]
    assert run(lambda argv: 0, ["--prompt", b"gr\xfc\xdf".decode("ascii", "surrogateescape")]) == 2
    assert "not UTF-8; write it in UTF-8." in capsys.readouterr().err


def test_a_path_with_a_variable_that_is_not_set_is_one_sentence(monkeypatch, capsys):
    monkeypatch.delenv("NOWHERE", raising=False)
    assert run(lambda argv: 0, ["--data", "$NOWHERE/rows"]) == 2
    assert capsys.readouterr().err == (
        "error: $NOWHERE is not set in the environment; set it, or write the path out.\n"
    )


def test_lines_of_a_run_stay_lines_in_a_file(monkeypatch, tmp_path):
    """And brackets are no markup."""
    line = "step 1/2  [/data/rows] " + 40 * "loss 1.0  "
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        monkeypatch.setattr(sys, "stderr", log)
        console.print(line)
    assert (tmp_path / "log").read_text(encoding="utf-8") == line + "\n"


@pytest.mark.parametrize(
    "words",
    [
        ["recipes", "show", "sst2"],
        ["--help"],
        ["plan", "--help"],
        ["plan", "--model", "llama-7b"],
    ],
)
def test_a_reader_that_leaves_early_meets_no_traceback(words):
    """As `| head -0`: the pipe is closed before anything is written to it."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-m", "qalora", *words], stdout=write, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode in (0, 141)

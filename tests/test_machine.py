"""The facts of a machine: found where they are, and nothing secret among them."""

from __future__ import annotations

import sys

import pytest
import torch

from qalora import machine
from qalora.__main__ import main


@pytest.fixture
def doctor(monkeypatch, capsys):
    """run(*flags) → exit code, standard output."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["qalora", "doctor", *flags])
        return main(), capsys.readouterr().out

    return run


def test_a_package_that_does_not_load_is_a_line(doctor, monkeypatch, tmp_path):
    (tmp_path / "breaks.py").write_text("raise OSError('libcudart.so.13: cannot open\\nshared object file')")
    (tmp_path / "complains.py").write_text(
        "import logging\nprint('hello')\nlogging.getLogger('complains').error('library load error: none for CUDA 13')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        machine, "REQUIRED", {**machine.REQUIRED, "bitsandbytes": "complains", "peft": "breaks", "nowhere": "no_such"}
    )
    code, out = doctor()
    assert code == 1 and "Traceback" not in out and "hello" not in out
    failing = [line for line in out.splitlines() if line.startswith("fails:")]
    assert len(failing) == 3
    assert "peft" in failing[0] and "OSError: libcudart.so.13: cannot open shared object file" in failing[0]
    assert "bitsandbytes" in failing[1] and "library load error: none for CUDA 13" in failing[1]
    assert failing[2] == "fails: nowhere is not installed"
    assert "pip install nowhere" in out


def test_four_bits_that_compute_something_else_are_found(monkeypatch):
    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", lambda packed, state: torch.zeros(state.shape))
    assert "NF4 errs by 1 of a random matrix" in machine.compute()["error"]

    def broken(*args, **options):
        raise RuntimeError("Configured CUDA binary not found")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    assert machine.compute()["error"] == "RuntimeError: Configured CUDA binary not found"


def test_a_token_in_a_file_is_found_and_an_unset_one_is_not(tmp_path):
    assert not machine.has_token({"HF_HOME": str(tmp_path)})
    (tmp_path / "token").write_text("hf_x\n")
    assert machine.has_token({"HF_HOME": str(tmp_path)})
    assert machine.hub_cache({"HF_HOME": str(tmp_path)}) == tmp_path / "hub"

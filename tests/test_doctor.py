"""`qalora doctor`: what is said of machines that are not this one, and that a broken package is a line."""

from __future__ import annotations

import copy
import json
import sys

import psutil
import pytest
import torch

from qalora.__main__ import main
from qalora.doctor import GIB, of_devices, of_environment, of_packages, of_room

CUDA = {
    "device": "cuda:0", "kind": "CUDA", "name": "a card", "free": 23 * GIB, "total": 24 * GIB, "capability": [8, 9],
}  # fmt: skip
PLACE = {"path": "/home/me", "free": 100 * GIB, "writable": True}
GOOD = {
    "versions": {"qalora": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2", "bitsandbytes": None},
    "broken": {},
    "unsatisfied": [],
    "qalora_error": None,
    "platform": {"system": "Linux-6", "machine": "x86_64", "wsl": False, "cores": 8, "cpu": "a CPU",
    "cpu_flags": ["avx2"]}, "devices": [CUDA],
    "driver_without_torch": None,
    "compute": {"device": "cuda", "dtype": "bfloat16", "error": None},
    "memory": {"total": 64 * GIB, "available": 60 * GIB},
    "disk": {"working folder": PLACE, "Hugging Face cache": PLACE, "temporary files": PLACE},
    "hub": {"token": "set", "offline": False},
    "environment": {},
}  # fmt: skip
NO_GPU = {"devices": [], "compute": {"device": "cpu", "dtype": "float32", "error": None}}


def findings(**changed):
    """[(level, what and what to do)] of the good machine with facts changed; a dotted name reaches into them."""
    facts = copy.deepcopy(GOOD)
    for name, value in changed.items():
        *path, last = name.split("__")
        place = facts
        for part in path:
            place = place[part.replace("_", " ")] if part.replace("_", " ") in place else place[part]
        place[last] = value
    found = [*of_packages(facts), *of_devices(facts), *of_room(facts), *of_environment(facts)]
    return [(finding.level, f"{finding.what} → {finding.do}") for finding in found]


def test_a_good_machine_has_no_findings():
    assert findings() == []


@pytest.mark.parametrize(
    ("changed", "level", "text"),
    [
        ({"broken": {"peft": "ImportError: no x"}}, "fails", "peft 0.21.2 cannot be imported: ImportError: no x"),
        ({"broken": {"bitsandbytes": "ModuleNotFoundError"}}, "fails", "bitsandbytes is not installed → pip install "
            "bits"),
        ({"unsatisfied": ["peft>=0.21 (0.17.0 is installed)"]}, "fails", 'needs peft>=0.21 (0.17.0 is installed) → pip '
            'install "peft>=0.21"'),
        ({"qalora_error": "ImportError: cannot import name"}, "fails", "qalora cannot be loaded with these packages"),
        ({"compute__error": "no library"}, "fails", "4 bits do not work on cuda: no library"),
        ({"devices": [{"device": "cuda:0", "kind": "CUDA", "error": "busy"}]}, "fails", "cuda:0 cannot be used: busy"),
        ({"devices": [{**CUDA, "free": 2 * GIB}]}, "note", "2.0 of 24.0 GiB are free"),
        ({"devices": [CUDA, CUDA]}, "note", "2 GPUs, and a run uses one"),
        ({"devices": [{**CUDA, "capability": [7, 5]}], "compute__dtype": "float16"}, "slow", "no bf16 arithmetic"),
        (NO_GPU, "slow", "there is no fast 4-bit path"),
        (NO_GPU, "slow", "no AVX-512"),
        (NO_GPU, "slow", "no bf16 arithmetic (AVX512_BF16, AMX)"),
        ({**NO_GPU, "driver_without_torch": "torch 2.13.0+cpu is built for the CPU alone"}, "slow", "built for the CPU "
            "alone"),
        ({"disk__working folder": {**PLACE, "free": GIB // 2}}, "fails", "0.5 GiB free for working folder"),
        ({"disk__working folder": {**PLACE, "writable": False}}, "fails", "cannot be written to"),
        ({"disk__Hugging Face cache": {**PLACE, "free": 5 * GIB}}, "note", "set HF_HOME to a larger disk"),
        ({"disk__Hugging Face cache": {**PLACE, "writable": False}}, "fails", "the Hugging Face cache"),
        ({"hub__offline": True}, "note", "nothing is downloaded"),
        ({"memory__available": GIB}, "slow", "1.0 GiB of memory"),
        ({"platform__wsl": True, "disk__working folder": {**PLACE, "path": "/mnt/c/work"}}, "slow", "a Windows disk "
            "under WSL"),
        ({"environment": {"WORLD_SIZE": "2"}}, "fails", "WORLD_SIZE=2"),
        ({"environment": {"ACCELERATE_MIXED_PRECISION": "fp8"}}, "note", "ACCELERATE_MIXED_PRECISION=fp8 is not "
            "followed"),
        ({"environment": {"CUDA_VISIBLE_DEVICES": ""}, **NO_GPU}, "note", "hides every GPU"),
        ({"environment": {"OMP_NUM_THREADS": "1"}, **NO_GPU}, "slow", "OMP_NUM_THREADS=1, of 8 cores"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_machine(changed, level, text):
    assert [found for found, said in findings(**changed) if text in said] == [level]


def test_a_cpu_with_bf16_arithmetic_is_not_told_that_it_has_none():
    said = findings(**NO_GPU, platform__cpu_flags=["avx2", "avx512f", "avx512_bf16"])
    assert [level for level, _ in said] == ["slow"] and "fast 4-bit path" in said[0][1]
    assert len(findings(**NO_GPU, platform__cpu_flags=None)) == 1  # nothing says what it has


def test_a_broken_torch_is_one_finding_and_not_one_for_each_package_that_needs_it():
    said = findings(broken={"torch": "OSError: libcudart.so.13", "peft": "OSError: libcudart.so.13"}, compute=None)
    assert [text for _, text in said] == [
        "torch 2.13.0 cannot be imported: OSError: libcudart.so.13 → pip install --force-reinstall torch"
    ]


@pytest.fixture
def doctor(monkeypatch, capsys):
    """run(*flags) → exit code, standard output."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["qalora", "doctor", *flags])
        return main(), capsys.readouterr().out

    return run


def test_this_machine(doctor, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_mine")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:password@hub.example")
    code, out = doctor("--json")
    facts = json.loads(out)
    assert code == (1 if any(finding["level"] == "fails" for finding in facts["findings"]) else 0)
    assert facts["versions"]["torch"] == torch.__version__ and facts["broken"] == {} and facts["qalora_error"] is None
    assert facts["memory"]["total"] <= psutil.virtual_memory().total
    assert facts["compute"]["error"] is None and facts["compute"]["dtype"] in ("bfloat16", "float16", "float32")
    assert facts["hub"]["token"] == "set" and facts["environment"]["HF_TOKEN"] == "set"
    assert facts["environment"]["HF_ENDPOINT"] == "https://hub.example"
    assert "hf_secret_of_mine" not in out and "password" not in out
    _, text = doctor()
    assert f"torch {torch.__version__}" in text and "4 bits      work on" in text and "hf_secret_of_mine" not in text


def test_it_runs_without_any_package(run_python, tmp_path):
    """As a first command in a broken environment: nothing but the standard library can be imported."""
    code = (
        "import sys\n"
        "class Nothing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] not in sys.stdlib_module_names and not name.startswith('qalora'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Nothing())\n"
        "from qalora.cli import run\n"
        "from qalora.doctor import main\n"
        "print('exit code', run(main, []))"
    )
    out = run_python(code)
    assert "exit code 1" in out and out.count("fails: torch") == 1

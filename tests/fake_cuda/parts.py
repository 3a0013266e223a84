"""Tests on the CUDA device without hardware (fake_cuda.py), in a process of their own: the device has to be there
before torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from build import built

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
LARGE = "tests/gpu/test_cuda.py::test_the_ladder_gives_the_same_gradients_after_a_real_out_of_memory"
MAY_BE_SKIPPED = {"test_two_gpus_make_the_run_of_one", "test_liger_computes_our_loss"}


def outcomes_of(files: Sequence[str], found: Path) -> list[tuple[str, str, str]]:
    """(file, test, what went wrong; "" where nothing did) of all files, which share the time that imports take.

    Args:
        found: where pytest's report goes.
    """
    paths = [str(REPOSITORY), str(REPOSITORY / "bench"), str(HERE), os.environ.get("PYTHONPATH", "")]
    options = ["-p", "fake_cuda", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", f"--junitxml={found}"]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "FAKE_CUDA_SHIM": str(built())}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--deselect", LARGE, *files],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=1500,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.exists(), done.stdout[-6000:] + done.stderr[-2000:]
    return [
        (case.get("classname", "").replace(".", "/") + ".py", case.get("name", ""), wrong_with(case))
        for case in ElementTree.parse(found).iter("testcase")
    ]


def wrong_with(case: ElementTree.Element) -> str:
    if case.find("skipped") is not None and case.get("name") not in MAY_BE_SKIPPED:
        return "skipped"
    return "".join(part.text or "" for part in case if part.tag in ("failure", "error"))

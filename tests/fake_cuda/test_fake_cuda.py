"""The tests on the CUDA device without hardware (fake_cuda.py), in a process of their own: the device has to be there
before torch. All files share it, and the time that imports take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from build import built, missing

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PARTS = {
    "training": "tests/fake_cuda/on_training.py",
    "kernels": "tests/fake_cuda/on_kernels.py",
    "plans": "tests/fake_cuda/on_plans.py",
    "bench": "tests/fake_cuda/on_bench.py",
    "tests-gpu": "tests/gpu/test_cuda.py",
}
# More values than a CPU computes in time; on_training.py has a small one.
LARGE = "tests/gpu/test_cuda.py::test_the_ladder_gives_the_same_gradients_after_a_real_out_of_memory"
NEEDS_MORE = "needs two CUDA devices", "could not import 'liger_kernel"
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[tuple[str, str, str]]:
    """(file, test, what went wrong; "" where nothing did)."""
    found = tmp_path_factory.mktemp("fake_cuda") / "found.xml"
    paths = [str(REPOSITORY), str(REPOSITORY / "bench"), str(HERE), os.environ.get("PYTHONPATH", "")]
    options = ["-p", "fake_cuda", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", f"--junitxml={found}"]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "FAKE_CUDA_SHIM": str(built())}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--deselect", LARGE, *PARTS.values()],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=1500,
        env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert found.exists(), done.stdout[-6000:] + done.stderr[-2000:]
    return [
        (case.get("classname", "").replace(".", "/") + ".py", case.get("name", ""), wrong_with(case))
        for case in ElementTree.parse(found).iter("testcase")
    ]


def wrong_with(case: ElementTree.Element) -> str:
    skipped = case.find("skipped")
    if skipped is not None and not skipped.get("message", "").startswith(NEEDS_MORE):
        return f"skipped: {skipped.get('message')}"
    return "".join(part.text or "" for part in case if part.tag in ("failure", "error"))


@pytest.mark.parametrize("file", PARTS.values(), ids=PARTS)
def test_on_the_device_without_hardware(outcomes, file):
    here = {name: wrong for place, name, wrong in outcomes if place == file}
    assert here
    assert not [f"{name}: {wrong}" for name, wrong in here.items() if wrong]

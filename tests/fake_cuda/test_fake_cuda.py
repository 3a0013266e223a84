"""What runs on the CUDA device without hardware (fake_cuda.py), each file in a process of its own: the device has to
be there before torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
PINNED = {"torch": "2.13", "bitsandbytes": "0.50", "transformers": "5.23"}  # the device leans on private names of these
LARGE = "tests/gpu/test_cuda.py::test_the_ladder_gives_the_same_gradients_after_a_real_out_of_memory"


def missing() -> str | None:
    """Why the device cannot be had here."""
    if shutil.which("g++") is None:
        return "needs g++"
    if not (Path(torch.__file__).parent / "include" / "ATen").is_dir():
        return "needs torch's headers"
    if torch.version.cuda is not None or torch.cuda.is_available():
        return "needs torch's CPU build"
    other = [f"{name} {version(name)}" for name, wanted in PINNED.items() if not version(name).startswith(wanted + ".")]
    return f"made for {PINNED}, here is {', '.join(other)}" if other else None


pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="session")
def shim() -> Path:
    """shim.cpp, built once for this torch."""
    source, folder = HERE / "shim.cpp", Path(torch.__file__).parent
    digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"qalora-fake-cuda-{os.getuid()}" / f"{digest}.so"
    if not built.exists():
        built.parent.mkdir(mode=0o700, exist_ok=True)
        part = built.with_suffix(f".{os.getpid()}")
        libraries = [f"-L{folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}/lib"]
        command = [
            "g++",
            "-O0",
            "-std=c++20",
            "-shared",
            "-fPIC",
            str(source),
            f"-I{folder}/include",
            *libraries,
            "-o",
            str(part),
        ]
        subprocess.run(command, check=True, capture_output=True)
        part.replace(built)
    return built


@pytest.mark.parametrize(
    "files",
    [["tests/fake_cuda/on_plans.py"], ["tests/fake_cuda/on_training.py"], ["tests/fake_cuda/on_bench.py"],
    ["tests/gpu", "--deselect", LARGE]],
    ids=["plans", "training", "bench", "tests/gpu"],
)  # fmt: skip
def test_on_the_device_without_hardware(shim, files):
    paths = [str(REPOSITORY), str(REPOSITORY / "bench"), str(HERE), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "fake_cuda", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short",
        *files],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "FAKE_CUDA_SHIM": str(shim),
        "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout, done.stdout[-2000:]

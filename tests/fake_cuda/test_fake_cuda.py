"""Plans, runs and kernels on the CUDA device without hardware; test_bench_and_gpu.py has the rest, so that two workers
share the time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from build import missing
from parts import outcomes_of

PARTS = {
    "training": "tests/fake_cuda/on_training.py",
    "kernels": "tests/fake_cuda/on_kernels.py",
    "plans": "tests/fake_cuda/on_plans.py",
}
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[tuple[str, str, str]]:
    return outcomes_of(list(PARTS.values()), tmp_path_factory.mktemp("fake_cuda") / "found.xml")


@pytest.mark.parametrize("file", PARTS.values(), ids=PARTS)
def test_on_the_device_without_hardware(outcomes, file):
    here = {name: wrong for place, name, wrong in outcomes if place == file}
    assert here
    assert not [f"{name}: {wrong}" for name, wrong in here.items() if wrong]

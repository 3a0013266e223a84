"""What memory there is, by what the system says."""

from __future__ import annotations

import resource

import psutil
import pytest
import torch

from qalora.base import device

MIB = 2**20


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU")
def test_on_a_cpu_it_is_the_process_and_the_machine():
    assert device.device_kind() == "cpu"
    assert device.available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert device.peak_memory() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, rel=0.01)
    assert (device.spare_memory(), device.memory_to_score()) == (0, 0)


def test_on_a_gpu_it_is_what_is_free_or_what_the_process_may_have_if_that_is_less(monkeypatch):
    cuda = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (600 * MIB, 1000 * MIB))
    monkeypatch.setattr(cuda, "get_per_process_memory_fraction", lambda: 0.5)
    monkeypatch.setattr(cuda, "memory_reserved", lambda: 100 * MIB)
    monkeypatch.setattr(cuda, "memory_allocated", lambda: 40 * MIB)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: 70 * MIB)
    assert device.available_memory() == 400 * MIB  # half of the card, less what is reserved
    assert (device.peak_memory(), device.spare_memory()) == (70 * MIB, 30 * MIB)
    assert device.memory_to_score() == 480 * MIB

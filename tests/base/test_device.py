"""Which device is computed on, and what memory it has."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from qalora.base import device


@pytest.mark.parametrize(
    ("found", "expected"), [("xpu", "xpu:0"), ("mps", "mps:0"), ("cuda", "cuda:0"), ("mtia", "cpu"), (None, "cpu")]
)
def test_the_device_is_the_accelerator_that_bitsandbytes_computes_on(monkeypatch, found, expected):
    accelerator = None if found is None else torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    assert device.best_device() == torch.device(expected)


def test_an_xpus_memory_is_its_own_and_that_of_mps_is_the_machines(monkeypatch):
    xpu = SimpleNamespace(mem_get_info=lambda: (70, 100), memory_reserved=lambda: 10, max_memory_allocated=lambda: 8)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: xpu if torch.device(kind).type == "xpu" else object())
    monkeypatch.setattr(device, "best_device", lambda: torch.device("xpu", 0))
    assert (device.device_kind(), device.available_memory(), device.peak_memory()) == ("cuda", 70, 8)
    monkeypatch.setattr(device, "best_device", lambda: torch.device("mps", 0))
    monkeypatch.setattr(device, "host_memory", lambda: 123)
    assert (device.device_kind(), device.available_memory()) == ("cpu", 123)


def test_the_memory_of_a_container_is_what_it_may_have(monkeypatch):
    files = {"max": "1000\n", "current": "700\n", "stat": "anon 400\ninactive_file 300\n"}  # the cache can go
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    monkeypatch.setattr(device.Path, "read_text", lambda path: files[path.suffix[1:]])
    assert device.host_memory() == 600
    files["max"] = "max\n"
    assert device.host_memory() == 5000

"""The device that is computed on, and what memory it has.

Tried on a CPU, and as CUDA without hardware (tests/fake_cuda). XPU and MPS are asked for as torch names them,
and were not tried.
"""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def best_device() -> torch.device:
    """The accelerator that torch has and bitsandbytes computes on, with its index; else the CPU."""
    from bitsandbytes import supported_torch_devices

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or kind.type not in supported_torch_devices:
        return torch.device("cpu")
    return torch.device(kind.type, torch.accelerator.current_device_index())


def device_module(device: torch.device | None = None) -> Any:
    """torch.cuda, torch.xpu …: what counts a device's memory and makes its streams. None where memory is the
    machine's (CPU, MPS).

    Args:
        device: default: `best_device()`.
    """
    device = device or best_device()
    module = None if device.type == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "mem_get_info") else None


def device_kind() -> str:
    """cuda where a run trains on a device with memory of its own, which a plan counts like CUDA's; else cpu."""
    return "cpu" if device_module() is None else "cuda"


def available_memory() -> int:
    """Bytes of the device's memory that this process may still allocate, or of the machine's available memory on a
    CPU."""
    module = device_module()
    if module is None:
        return host_memory()
    free, total = module.mem_get_info()
    share = module.get_per_process_memory_fraction() if hasattr(module, "get_per_process_memory_fraction") else 1.0
    return int(min(free, share * total - module.memory_reserved()))


def host_memory() -> int:
    """Bytes of the machine's available memory, or of its container's where that has less."""
    available = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):  # no such limit
        return available
    return min(available, limit - used + int(cached))


def peak_memory() -> int:
    """Bytes of the device's memory allocated at the peak, or the peak resident set of the process on a CPU."""
    module = device_module()
    if module is not None:
        return int(module.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def spare_memory() -> int:
    """Bytes between what is allocated now and the peak so far, which is a training step's; 0 on a CPU, where a
    larger forward is no faster."""
    module = device_module()
    return 0 if module is None else int(module.max_memory_allocated() - module.memory_allocated())


def memory_to_score() -> int:
    """Bytes that a command which only scores may use for stacked variants: four fifths of what the device has free."""
    module = device_module()
    return 0 if module is None else int(0.8 * module.mem_get_info()[0])


def free_unused() -> None:
    """Gives memory that nobody holds back to the device, after an error that held it is over."""
    gc.collect()
    if (module := device_module()) is not None:
        module.empty_cache()

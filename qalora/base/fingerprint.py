"""Which weights a base has, told from the files and not from their place: a copied or renamed model is the same. Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qalora.base.registry import ModelSource
from qalora.errors import InputError

WHOLE = 1 << 20  # bytes of a tensor, or a file, up to which all of it counts
SAMPLES, SAMPLE = 16, 1 << 16  # what counts of a larger one: so many stretches of so many bytes
# Of config.json: what says nothing about the function that the weights compute.
WORDS = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "architectures")


def fingerprint(source: ModelSource) -> str | None:
    """Hexadecimal digest of a base's config and of samples of all its weights; None: a model that is not on this machine yet.

    Tensors of safetensors files count by name, in whatever shards they lie.
    """
    folder = _snapshot(source) if source.kind == "hub" else Path(source.location)
    if folder is None:
        return None
    digest = hashlib.sha256()
    if source.gguf_file:
        _add_file(digest, folder / source.gguf_file)
        return digest.hexdigest()
    digest.update(_config(folder / "config.json"))
    safetensors = sorted(folder.glob("*.safetensors"))
    for _, file, start, size, header in sorted(_tensors(safetensors)):
        digest.update(header.encode())
        _add(digest, file, start, size)
    if not safetensors:
        for file in sorted(folder.glob("pytorch_model*.bin")):
            _add_file(digest, file)
    return digest.hexdigest()


def tensor_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name → dtype, shape and data_offsets (from the start of the file) of each tensor of a safetensors file; nothing else is read.

    Raises:
        InputError: not such a file, or one that was cut.
    """
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            size = file.stat().st_size
            if not 2 <= length <= size - 8:
                raise ValueError("its header is cut")
            header = json.loads(handle.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            start, end = entry["data_offsets"]
            entry["data_offsets"] = (8 + length + start, 8 + length + end)
            if not (isinstance(entry["dtype"], str) and isinstance(entry["shape"], list)):
                raise ValueError("a tensor without dtype or shape")
        if size != max((entry["data_offsets"][1] for entry in header.values()), default=8 + length):
            raise ValueError("its data are cut")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not a safetensors file ({error}).") from None
    return dict(header)


def _tensors(files: list[Path]) -> Iterator[tuple[str, Path, int, int, str]]:
    for file in files:
        for name, entry in tensor_header(file).items():
            start, end = entry["data_offsets"]
            yield name, file, start, end - start, f"{name} {entry['dtype']} {entry['shape']};"


def _config(file: Path) -> bytes:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return b""
    kept = {key: value for key, value in config.items() if key not in WORDS} if isinstance(config, Mapping) else {}
    return json.dumps(kept, sort_keys=True).encode()


def _add_file(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{size};".encode())
    # A GGUF file has no tensor that stands for itself, so it is sampled as densely as the tensors of a model would be.
    parts = max(1, min(256, size // WHOLE))
    for part in range(parts):
        start, end = size * part // parts, size * (part + 1) // parts
        _add(digest, file, start, end - start)


def _add(digest: Any, file: Path, start: int, size: int) -> None:
    with file.open("rb") as handle:
        if size <= WHOLE:
            handle.seek(start)
            digest.update(handle.read(size))
            return
        for sample in range(SAMPLES):
            handle.seek(start + (size - SAMPLE) * sample // (SAMPLES - 1))
            digest.update(handle.read(SAMPLE))


def _snapshot(source: ModelSource) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.location, "config.json")
    return Path(found).parent if isinstance(found, str) else None

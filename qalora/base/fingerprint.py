"""Which weights a base has, told from the files and not from their place: a copied or renamed model is the same.
Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from qalora.base.families import text_fields
from qalora.base.registry import ModelSource, read_fields
from qalora.base.weight_files import WeightFiles, weight_files
from qalora.errors import InputError

WHOLE = 1 << 20  # bytes of a tensor, or a file, up to which all of it counts
SAMPLES, SAMPLE = 16, 1 << 16  # what counts of a larger one: so many stretches of so many bytes


class Digest(Protocol):
    """One of hashlib's."""

    def update(self, data: bytes, /) -> None: ...


# Numbers of config.json that a family multiplies by, divides by, or caps at.
FACTORS = (
    "attention_multiplier", "attn_logit_softcapping", "embedding_multiplier", "final_logit_softcapping", "logit_scale",
    "logits_scaling", "query_pre_attn_scalar", "residual_multiplier",
)  # fmt: skip


def fingerprint(source: ModelSource) -> str | None:
    """Hexadecimal digest of the function that a base computes: samples of all weights that are read, and what its
    config says of heads, norms and positions. None: a model that is not on this machine yet.

    Tensors of safetensors and GGUF files count by name, in whatever files they lie.

    Raises:
        InputError: weights that are missing or damaged.
    """
    found = _files(source)
    if found is None:
        return None
    folder, weights = found
    digest = hashlib.sha256(_function(folder, source.gguf_file))
    if weights.kind == "torch":
        for file in weights.files:
            _add_file(digest, file)
        return digest.hexdigest()
    tensors = _gguf_tensors(weights) if weights.kind == "gguf" else _tensors(weights)
    for _, file, start, size, header in sorted(tensors):
        digest.update(header.encode())
        _add(digest, file, start, size)
    return digest.hexdigest()


def stored_as(source: ModelSource) -> str | None:
    """The form in which a base has its weights, such as BF16, F32, BF16 + U8 (4-bit codes), GGUF or torch; two of
    different forms have different fingerprints, though they may be one model. None: not on this machine yet."""
    found = _files(source)
    if found is None:
        return None
    _, weights = found
    if weights.kind != "safetensors":
        return "GGUF" if weights.kind == "gguf" else weights.kind
    sizes: dict[str, int] = {}
    for file in weights.files:
        for entry in tensor_header(file).values():
            start, end = entry["data_offsets"]
            sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - start
    weighty = [dtype for dtype, size in sizes.items() if size * 100 >= sum(sizes.values())]  # not a few norms in fp32
    return " + ".join(sorted(weighty))


def tensor_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name → dtype, shape and data_offsets (from the start of the file) of each tensor of a safetensors file; nothing
    else is read.

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


def _files(source: ModelSource) -> tuple[Path, WeightFiles] | None:
    if source.kind != "hub":
        folder = Path(source.location)
        return folder, weight_files(folder, source.gguf_file, name=source.name)
    snapshot = _snapshot(source)
    try:
        return None if snapshot is None else (snapshot, weight_files(snapshot, name=source.name))
    except InputError:  # its config was downloaded for its shape, and no weights yet
        return None


def _tensors(weights: WeightFiles) -> Iterator[tuple[str, Path, int, int, str]]:
    for file in weights.files:
        for name, entry in tensor_header(file).items():
            start, end = entry["data_offsets"]
            yield name, file, start, end - start, f"{name} {entry['dtype']} {entry['shape']};"


def _gguf_tensors(weights: WeightFiles) -> Iterator[tuple[str, Path, int, int, str]]:
    from qalora.base.gguf_reader import open_shards

    for reader in open_shards(weights.files[0]):
        for tensor in reader.tensors:
            header = f"{tensor.name} {tensor.tensor_type.name} {list(map(int, tensor.shape))};"
            yield tensor.name, reader.path, int(tensor.data_offset), int(tensor.n_bytes), header


def _function(folder: Path, gguf_file: str | None) -> bytes:
    """What makes another function of the same weights, in one form whichever version of transformers wrote it."""
    if gguf_file:
        from qalora.base.gguf_reader import open_shards

        kept: Any = {
            key: field.contents()
            for key, field in open_shards(folder / gguf_file)[0].fields.items()
            if key.partition(".")[0] not in ("general", "tokenizer", "split", "GGUF", "quantize")
        }
        return json.dumps(kept, sort_keys=True, default=str).encode()
    config = text_fields(read_fields(folder / "config.json"))
    heads = config.get("num_attention_heads")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kinds = [rope.pop(name, None) for name in ("rope_type", "type")]
    kept = [
        config.get("model_type"),
        [heads, config.get("num_key_value_heads") or heads],
        [config.get("rms_norm_eps") or 1e-6, config.get("hidden_act") or "silu"],
        [float(theta), next(filter(None, kinds), "default")],
        sorted((name, value) for name, value in rope.items() if value is not None),
    ]
    if factors := {name: config[name] for name in FACTORS if config.get(name) is not None}:
        kept.append(factors)
    return json.dumps(kept).encode()


def _add_file(digest: Digest, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{size};".encode())
    # A pickle has no tensor that stands for itself, so it is sampled as densely as the tensors of a model would be.
    parts = max(1, min(256, size // WHOLE))
    for part in range(parts):
        start, end = size * part // parts, size * (part + 1) // parts
        _add(digest, file, start, end - start)


def _add(digest: Digest, file: Path, start: int, size: int) -> None:
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

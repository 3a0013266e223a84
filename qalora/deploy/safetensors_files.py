"""Safetensors shards with their index, written piece by piece: the library's own writer wants a shard in memory.

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from qalora.base.checkpoint import Checkpoint
from qalora.errors import InputError
from qalora.progress import Bar

NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A tensor of a file.

    Attributes:
        pieces: gives its consecutive blocks of rows, in its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]


def copied(checkpoint: Checkpoint, name: str) -> Written:
    """A tensor of a checkpoint, bit for bit."""
    shape = checkpoint.shapes[name]

    def pieces() -> Iterator[Tensor]:
        if shape and 0 not in shape:
            yield from checkpoint.pieces(name)
        else:
            yield checkpoint.tensor(name)

    return Written(shape, next(pieces()).dtype, pieces)


def rounded(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """
    Raises:
        InputError: a value that `dtype` cannot hold.
    """
    result = value.to(dtype)
    if not torch.isfinite(result).all():
        raise InputError(f"{name}: a merged value is beyond the range of {dtype}; use bfloat16.")
    return result


def write_safetensors(folder: Path, tensors: Mapping[str, Written], max_shard_size: int) -> None:
    """Writes tensors by their names.

    Raises:
        InputError: a value beyond the range of its dtype.
    """
    layout = split_torch_state_dict_into_shards(
        {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in sorted(tensors.items())},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    with Bar("merging", len(tensors)) as bar:
        for file, names in layout.filename_to_tensors.items():
            _write_shard(folder / file, {name: tensors[name] for name in names}, bar)
    if layout.is_sharded:
        index = {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(file: Path, tensors: Mapping[str, Written], bar: Bar) -> None:
    """A safetensors file: header size (8 bytes), JSON header, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, one in tensors.items():
        start, end = end, end + torch.Size(one.shape).numel() * one.dtype.itemsize
        header[name] = {"dtype": NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for one in tensors.values():
            for piece in one.pieces():
                handle.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            bar.advance()
        if handle.tell() != 8 + len(text) + end:
            raise RuntimeError(f"{file.name}: {handle.tell()} bytes written of {8 + len(text) + end}")

"""Tensors in the files of a base, under the names that transformers gives, each read when it is asked for.

    *.safetensors, 16-, 32- or 4-bit ┐
    pytorch_model*.bin ──────────────┼─ Checkpoint ─ pieces(name): blocks of rows │ tensor(name): the whole
    *.gguf, one file or several ─────┘

No more than what is asked for is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from zipfile import is_zipfile

import numpy as np
import torch
from bitsandbytes.functional import QuantState
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from qalora.base.families import in_decoder
from qalora.base.gguf_names import constant, from_gguf, gguf_names, is_convolution, is_permuted
from qalora.base.structure import HEAD, UNKNOWN, Structure, structure_of
from qalora.base.weight_files import WeightFiles
from qalora.errors import InputError, short

PIECE = 64 << 20  # bytes of a piece, in the dtype of the file


class Checkpoint(Protocol):
    """Shapes and values of a model's tensors; `packed` holds those that are stored in 4 bits already.

    Attributes:
        files: what is read.
        stored: name → what it is called in the files. A tied model may have its one matrix under the head's name only.
        structure: of the model that the files are read for (`open_checkpoint`).
    """

    files: tuple[Path, ...]
    stored: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    packed: frozenset[str]
    is_gguf: bool
    structure: Structure

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Consecutive blocks of rows, in the dtype of the file (GGUF types: in fp32)."""

    def tensor(self, name: str) -> Tensor: ...

    def in_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        """A packed weight as bitsandbytes holds it."""


def open_files(found: WeightFiles, config: PreTrainedConfig) -> Checkpoint:
    """
    Raises:
        InputError: a file that is damaged, or is not what its name says.
    """
    if found.kind == "gguf":
        return GgufTensors(found.files[0], config)
    return Safetensors(found.files) if found.kind == "safetensors" else TorchTensors(found.files)


def _named(stored: str) -> str:
    """The name in a causal LM of what a file calls so: files of the decoder alone leave out its prefix, those of a
    vision model have another."""
    stored = in_decoder(stored)
    return f"model.{stored}" if stored.startswith(("embed_tokens.", "layers.", "norm.")) else stored


class Safetensors:
    """A folder of safetensors, 16- or 32-bit, or in bitsandbytes' 4 bits.

    The file is opened anew for each read: pages of a mapping that stays open would add up to the whole model.
    """

    is_gguf = False
    structure = UNKNOWN

    def __init__(self, files: Sequence[Path]):
        self.files = tuple(files)
        self.stored: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}  # stored name → where it is
        for file in files:
            try:
                with safe_open(str(file), framework="pt") as opened:
                    for stored in opened.keys():  # noqa: SIM118 (no mapping)
                        name = _named(stored)
                        self.stored[name], self._file[stored] = stored, file
                        self.shapes[name] = tuple(opened.get_slice(stored).get_shape())
            except Exception as error:  # safetensors raises its own class, which older versions do not export
                raise InputError(f"{file}: not a safetensors file ({short(error)}).") from None
        self.packed = frozenset(name.rpartition(".quant_state.")[0] for name in self.stored if ".quant_state." in name)
        for weight in self.packed:
            self.shapes[weight] = tuple(self._state(weight).shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        shape, start = self.shapes[name], 0
        if not shape:  # a number
            yield self.tensor(name)
            return
        while start < shape[0]:
            with self._opened(name) as opened:
                rows = opened.get_slice(self.stored[name])
                one = rows[start : start + 1]
                stop = start + max(1, PIECE // (one.nbytes or 1))
                yield rows[start:stop].clone()
            start = stop

    def tensor(self, name: str) -> Tensor:
        with self._opened(name) as opened:
            return opened.get_tensor(self.stored[name])

    def in_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        return self.tensor(name), self._state(name)

    def _state(self, name: str) -> QuantState:
        parts = {part: self.tensor(part) for part in self.stored if part.startswith(f"{name}.")}
        return QuantState.from_dict(parts, device=torch.device("cpu"))

    def _opened(self, name: str) -> Any:
        return safe_open(str(self._file[self.stored[name]]), framework="pt")


class TorchTensors:
    """A folder of pytorch_model*.bin, read without unpickling anything but tensors, and mapped."""

    packed: frozenset[str] = frozenset()
    is_gguf = False
    structure = UNKNOWN

    def __init__(self, files: Sequence[Path]):
        self.files = tuple(files)
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            try:
                self._tensors |= torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
            except Exception as error:
                raise InputError(f"{file}: cannot be read as tensors ({short(error)}).") from None
        self.stored = {_named(name): name for name in self._tensors}
        self.shapes = {name: tuple(self.tensor(name).shape) for name in self.stored}

    def pieces(self, name: str) -> Iterator[Tensor]:
        tensor = self.tensor(name)
        yield from tensor.split(max(1, PIECE * len(tensor) // tensor.nbytes)) if tensor.ndim else [tensor]

    def tensor(self, name: str) -> Tensor:
        return self._tensors[self.stored[name]]

    def in_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        raise KeyError(name)


class GgufTensors:
    """GGUF files of any type that the gguf library dequantizes, read with plain file reads."""

    packed: frozenset[str] = frozenset()
    is_gguf = True
    structure = UNKNOWN

    def __init__(self, file: Path, config: PreTrainedConfig):
        from qalora.base.gguf_reader import open_shards

        self.config = config
        self.stored: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[_Part]] = {}  # by the stored name of the first
        readers = open_shards(file)
        self.files = tuple(reader.path for reader in readers)
        shapes = structure_of(config).shapes
        self._constants = _constants(shapes, readers[0].fields)
        self.shapes |= {name: tuple(value.shape) for name, value in self._constants.items()}
        names = {name: gguf_names(name, config) for name in (*shapes, HEAD) if not constant(name)}
        known = {part for stored in names.values() for part in stored}
        found: dict[str, _Part] = {}
        for reader in readers:
            for info in reader.tensors:
                if info.name.startswith("rope_"):  # no weights, but what the config has
                    continue
                if info.name not in known:
                    raise InputError(
                        f"{reader.path}: holds {info.name}, which a {config.model_type} model has no place for."
                    )
                found[info.name] = _Part(reader.path, info)
        for name, stored in names.items():
            if all(part in found for part in stored):
                parts = [found[part] for part in stored]
                shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
                self.stored[name], self._parts[stored[0]] = stored[0], parts
                self.shapes[name] = (shape[0], 1, *shape[1:]) if is_convolution(name) else shape

    def pieces(self, name: str) -> Iterator[Tensor]:
        if name in self._constants or is_permuted(name, self.config):
            yield self.tensor(name)
            return
        rows, fp32_row = self.shapes[name][0], 4 * int(np.prod(self.shapes[name][1:]))
        step = max(1, PIECE // fp32_row)
        for start in range(0, rows, step):
            yield from_gguf(name, self._rows(name, start, min(rows, start + step)), self.config)

    def tensor(self, name: str) -> Tensor:
        if name in self._constants:
            return self._constants[name]
        return from_gguf(name, self._rows(name, 0, self.shapes[name][0]), self.config)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        found = []
        for part in self._parts[self.stored[name]]:
            rows = part.shape[0]
            if start < rows and stop > 0:
                found.append(part.rows(max(start, 0), min(stop, rows)))
            start, stop = start - rows, stop - rows
        return found[0] if len(found) == 1 else torch.cat(found)

    def in_4bit(self, name: str) -> tuple[Tensor, QuantState]:
        raise KeyError(name)


class _Part:
    """A tensor of a GGUF file: of some layers one of several parts.

    Attributes:
        shape: of its values.
    """

    def __init__(self, file: Path, info: Any):
        """
        Args:
            info: the gguf library's, which has sizes in the opposite order.
        """
        self.file, self.offset, self.kind = file, int(info.data_offset), info.tensor_type
        self.shape = tuple(int(n) for n in reversed(info.shape))
        self._row, self._dtype = tuple(info.data.shape[1:]), info.data.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        """In fp32."""
        from gguf import dequantize

        count, size = stop - start, int(np.prod(self._row))
        at = self.offset + start * size * self._dtype.itemsize
        data = np.fromfile(self.file, dtype=self._dtype, count=count * size, offset=at).reshape(count, *self._row)
        return torch.from_numpy(np.array(dequantize(data, self.kind), dtype=np.float32))


def _constants(shapes: Mapping[str, tuple[int, ...]], fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """What GGUF has as metadata, one number a block, and transformers as tensors."""
    found = {}
    for name, shape in shapes.items():
        if (key := constant(name)) and key in fields:
            values = fields[key].contents()
            block = int(name.split(".")[2])
            found[name] = torch.tensor(values[block] if isinstance(values, list) else values).reshape(shape)
    return found

"""GGUF files, opened in a small part of the time that the gguf library takes by itself.

It makes several slices of an `np.memmap` for every string and number of the vocabulary, each in Python code
(https://github.com/ggml-org/llama.cpp/pull/13378). transformers opens a file several times a load, and so do config,
weights and tokenizer of ours: what was read of a file is kept for the next one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np

from qalora.base.layout import shards_of
from qalora.errors import InputError
from qalora.progress import Bar

Mode = Literal["r", "r+", "c"]
Array = np.ndarray[Any, Any]
# What the library says of a field: its bytes, its parts, which of them are its values, and their types.
Parts = tuple[int, list[Array], list[int], list[gguf.GGUFValueType]]
LENGTH = struct.Struct("<Q")


class GGUFReader(gguf.GGUFReader):  # type: ignore[misc]
    """The library's reader over the same mapped bytes, as a plain array, whose lists it goes through by itself."""

    def __init__(self, path: str | Path, mode: Mode = "r"):
        self.path = Path(path)
        super().__init__(path, mode)

    @property  # type: ignore[override]
    def data(self) -> np.ndarray:
        return self._data

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._data = np.asarray(mapped)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Parts:
        kind = gguf.GGUFValueType
        if raw_type != kind.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        of, count, start = kind(int(head[0][0])), int(head[1][0]), orig_offs + 12
        if of == kind.ARRAY or not count:
            return super()._get_field_parts(orig_offs, raw_type)
        if of == kind.STRING:
            end, parts = self._strings(start, count)
            values = range(3, 3 + 2 * count, 2)
        else:
            numbers = self._get(start, self.gguf_scalar_to_np[of], count)
            if len(numbers) < count:
                raise ValueError(f"a list of {count} numbers that the file ends in")
            end, parts, values = start + numbers.nbytes, np.split(numbers, count), range(2, 2 + count)
        return end - orig_offs, [*head, *parts], list(values), [kind.ARRAY, of]

    def _strings(self, at: int, count: int) -> tuple[int, list[Array]]:
        """(Where a list of strings ends, the length and the bytes of each)."""
        data, mapped = self._data, self._data.data
        parts: list[Array] = []
        for _ in range(count):
            start = at + LENGTH.size
            end = start + LENGTH.unpack_from(mapped, at)[0]
            parts += data[at:start].view(np.uint64), data[start:end]
            at = end
        return at, parts


def open_gguf(path: str | Path, mode: Mode = "r") -> GGUFReader:
    """The reader of a file, read once for as long as the file stays as it is."""
    file = os.stat(path)
    return _read(str(path), mode, (file.st_ino, file.st_size, file.st_mtime_ns))


@lru_cache(maxsize=2)
def _read(path: str, mode: Mode, identity: tuple[int, ...]) -> GGUFReader:
    with Bar(f"reading {Path(path).name}"):
        return GGUFReader(path, mode)


def open_shards(file: Path) -> list[GGUFReader]:
    """Readers of all files of a model, of which the first has the metadata; of a model in one file, its reader alone.

    Args:
        file: any of them.

    Raises:
        InputError: not a GGUF file, or a file of a split model whose name does not say where the others are.
    """
    readers = []
    for shard in (files := shards_of(file)):
        try:
            readers.append(open_gguf(shard))
        except Exception as error:  # the library raises whatever numpy does
            raise InputError(
                f"{shard}: not a GGUF file of a LLaMA-class model ({' '.join(str(error).split())[:200]})."
            ) from None
        count = _shard_field(readers[-1], "split.count", 1)
        number = _shard_field(readers[-1], "split.no", 0) + 1
        if count != len(files) or (count > 1 and files[number - 1] != shard):
            raise InputError(
                f"{shard}: file {number} of {count} of a split model by its metadata, which its name does not say; "
                f"give the files the names NAME-00001-of-{count:05d}.gguf and so on."
            )
    return readers


def check_tokenizer(file: Path, name: str) -> None:
    """
    Args:
        name: what errors call the model.

    Raises:
        InputError: a GGUF model without all that splitting text takes.
    """
    fields = open_shards(file)[0].fields
    keys = gguf.Keys.Tokenizer
    kind = fields[keys.MODEL].contents() if keys.MODEL in fields else None
    # Byte-level BPE merges by a list; SentencePiece's by scores, from which the list is made.
    needed = {None: (keys.MODEL,), "llama": (keys.LIST, keys.SCORES)}.get(kind, (keys.LIST, keys.MERGES))
    if keys.MERGES in fields and kind is not None:
        needed = (keys.LIST,)
    if missing := [key for key in needed if key not in fields]:
        what = "holds no tokenizer" if kind is None else f"holds a tokenizer ({kind}) that cannot split text"
        raise InputError(
            f"--model {name}: {file.name} {what}, for it lacks {' and '.join(missing)}; make the file anew from the "
            "original model, or pass that."
        )


def _shard_field(reader: GGUFReader, name: str, default: int) -> int:
    field = reader.fields.get(name)
    return default if field is None else max(int(field.contents()), default)


@contextmanager
def fast_gguf() -> Iterator[None]:
    """While it lasts, libraries open GGUF files so too: transformers takes the reader from the gguf library at every
    call."""
    library = gguf.GGUFReader
    gguf.GGUFReader = open_gguf  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = library  # type: ignore[misc]

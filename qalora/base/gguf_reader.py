"""GGUF files, opened in a third of the time that the gguf library takes by itself.

It slices an `np.memmap` for every string of the vocabulary, which runs Python code that slicing a plain array does not
(https://github.com/ggml-org/llama.cpp/pull/13378). transformers opens a file several times a load.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gguf
import numpy as np


class GGUFReader(gguf.GGUFReader):  # type: ignore[misc]
    """The library's reader over the same mapped bytes, as a plain array."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = np.asarray(mapped)


@contextmanager
def fast_gguf() -> Iterator[None]:
    """While it lasts, libraries open GGUF files so too: transformers takes the reader from the gguf library at every call."""
    library = gguf.GGUFReader
    gguf.GGUFReader = GGUFReader  # type: ignore[misc]
    try:
        yield
    finally:
        gguf.GGUFReader = library  # type: ignore[misc]

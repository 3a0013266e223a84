"""Sizes that the code works in and a memory plan counts with, and how people write sizes. Torch-free."""

from __future__ import annotations

import re

from qalora.errors import InputError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

QUANT_BLOCK = 64  # weights that share one absmax in 4 bits
LOGITS_CHUNK = 64 * 2**20  # bytes of fp32 logits at a time
FP32_TEMPORARY = 128 * 2**20  # bytes of one fp32 copy of 16-bit activations, of adapters and norms
OVERSAMPLING = 4  # ranks of the gradient's sketch beyond the directions asked for
MLP_TILE = 1024  # tokens; from there on one tile's tensors are small beside one block input


def parse_size(text: str, flag: str = "--gpu-memory") -> int:
    """ "24GiB", "15.9 GB" or a number of bytes → bytes.

    Raises:
        InputError: anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?B)?\s*", text.upper())
    size = 0 if match is None else int(float(match[1]) * UNITS[match[2] or ""])
    if size < UNITS["KB"]:  # a bare 24 would be bytes
        raise InputError(f"{flag} {text}: give a size such as 24GiB, 15.9GB or a number of bytes.")
    return size

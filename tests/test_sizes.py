"""Sizes as people write them, and those that plan and code have to agree on."""

from __future__ import annotations

import re

import pytest

from qalora.errors import InputError
from qalora.sizes import QUANT_BLOCK, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("15.9GB", 15_900_000_000),
        ("512MiB", 2**29),
        ("8MB", 8_000_000),
        ("1KiB", 1024),
        ("12345", 12345),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "24", "0GB", "-1GB", "24G", "GiB", "1e9", "24 GiB of it", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match=f"^gpu_memory {re.escape(text)}: give a size"):
        parse_size(text)


def test_the_block_of_the_plan_is_the_block_that_bitsandbytes_makes():
    import torch
    from bitsandbytes.functional import quantize_4bit

    _, state = quantize_4bit(torch.randn(8, 128), quant_type="nf4")
    assert state.blocksize == QUANT_BLOCK and len(state.absmax) == 8 * 128 // QUANT_BLOCK

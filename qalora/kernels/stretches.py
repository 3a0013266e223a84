"""fp32 copies of 16-bit activations, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType

from torch import Tensor

from qalora.sizes import FP32_TEMPORARY


def stretches(x: Tensor, width: int) -> Iterator[tuple[EllipsisType, slice, slice]]:
    """Indices that cut x: (…, tokens, features) into stretches of tokens, each as long as FP32_TEMPORARY hold at that
    width."""
    tokens, rows = x.shape[-2], x[..., 0, 0].numel()
    step = max(1, FP32_TEMPORARY // (4 * width * rows))
    for start in range(0, tokens, step):
        yield ..., slice(start, start + step), slice(None)

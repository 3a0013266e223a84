"""fp32 copies of 16-bit activations, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import EllipsisType

from torch import Tensor

from qalora.sizes import FP32_TEMPORARY

Stretch = tuple[EllipsisType, slice, slice]


def stretches(x: Tensor, width: int) -> Iterator[Stretch]:
    """Indices that cut x: (…, tokens, features) into stretches of tokens, each as long as FP32_TEMPORARY hold at that
    width."""
    tokens, rows = x.shape[-2], x[..., 0, 0].numel()
    step = max(1, FP32_TEMPORARY // (4 * width * rows))
    for start in range(0, tokens, step):
        yield ..., slice(start, start + step), slice(None)


def assembled(x: Tensor, width: int, compute: Callable[[Stretch], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `compute` gives of each stretch of x, put together along the tokens; of a single one without a copy."""
    first, *others = stretches(x, width)
    found = compute(first)
    if not others:
        return found
    whole = tuple(part.new_empty(*part.shape[:-2], x.shape[-2], part.shape[-1]) for part in found)
    for stretch in (first, *others):
        for out, part in zip(whole, found if stretch is first else compute(stretch), strict=True):
            out[stretch] = part
    return whole

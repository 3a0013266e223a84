"""Kernels that others keep well, in the place of this house's own on CUDA; ours are what they are tested against.

    part                       whose           ours stays
    RMSNorm                    torch           where 1 + w weighs, or a weight of another dtype
    rotation of q and k        Liger-Kernel    where that is not installed
    silu(gate) ∘ up            Liger-Kernel    there too, and for tensors in pieces
    head and cross-entropy     Liger-Kernel    there too, for losses of rows, and for heads that are no plain product

On which modules they work is the families' record (base/families.py). torch.compile is not among them: every round of
allocation changes shapes, and would have it compile again.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qalora.base.families import Weighing


@cache
def liger(name: str) -> Any:
    """A module of Liger-Kernel; None where the package is not installed."""
    absent = importlib.util.find_spec("liger_kernel") is None
    return None if absent else importlib.import_module(f"liger_kernel.{name}")


def norms(x: Tensor, weight: Tensor, weighing: Weighing) -> bool:
    """Whether torch's RMSNorm is the one of these."""
    return x.is_cuda and weighing != "plus_one" and x.dtype == weight.dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float, weighing: Weighing) -> Tensor:
    """(…, d) and (d,) → (…, d); keeps x and a number a token."""
    with torch.autocast(x.device.type, enabled=False):
        if weighing == "before":
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.rms_norm(x, weight.shape, None, eps).mul_(weight)


def rotates(z: Tensor) -> bool:
    return z.is_cuda and liger("ops.rope") is not None


def rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim: int, *, back: bool = False
) -> tuple[Tensor, Tensor]:
    """q and k turned to their positions, or back, in their own memory.

    Args:
        q, k: (rows, tokens, heads · head_dim), contiguous.
        cos, sin: (rows or 1, tokens, head_dim).
    """
    rope = liger("ops.rope")
    by_heads = (z.unflatten(-1, (-1, head_dim)).transpose(1, 2) for z in (q, k))
    q, k, *_ = (rope.rope_backward if back else rope.rope_forward)(*by_heads, cos, sin)
    return q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2)


def multiplies(*tensors: Tensor) -> bool:
    whole = all(x.is_cuda and x.is_contiguous() for x in tensors)
    return whole and liger("ops.swiglu") is not None


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ∘ up."""
    *_, product = liger("ops.swiglu").swiglu_forward(gate, up)
    return product  # type: ignore[no-any-return]


def silu_product_backward(gate: Tensor, up: Tensor, grad_product: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, in their memory."""
    return liger("ops.swiglu").swiglu_backward(gate, up, grad_product)  # type: ignore[no-any-return]

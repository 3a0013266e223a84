"""One frozen linear layer with a low-rank update, forward and backward by hand: W x + s · B diag(gate) A x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qalora.base.quantized import is_4bit
from qalora.kernels.context import Context
from qalora.kernels.recompute import kept
from qalora.kernels.stretches import Stretch, assembled, stretches

Part = tuple[Any, ...]  # an index of stretches.py

THIN = 32  # rows: from there on it makes no difference which of two factors is transposed


def frozen_forward(base: nn.Linear, x: Tensor) -> Tensor:
    """W x, computed in the dtype of x, with the weights' values as they are in theirs."""
    return F.linear(x, _weight(base, x.dtype).to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))


@dataclass(frozen=True)
class LowRank:
    """A frozen map and what the adapter adds to it now: s · B diag(gate) A, or nothing where A is None."""

    base: Any
    s: float = 0.0
    A: Any = None
    B: Any = None
    gate: Any = None

    @staticmethod
    def of(layer: nn.Module) -> LowRank:
        """Of an adapter's layer, which says it of itself, or of a linear layer that has none (any more)."""
        own: Any = getattr(layer, "low_rank", None)
        return LowRank(layer) if own is None else own()


Frozen = Sequence[tuple[nn.Module, float]]  # of several maps: the base and s of each


def can_fuse(layers: Sequence[nn.Module]) -> bool:
    """Whether `LowRank` says all about these layers: nothing drops out, and nobody else put layers of their own in
    place."""
    return all(isinstance(layer, nn.Linear) or getattr(layer, "drops", True) is False for layer in layers)


def taken_apart(layers: Sequence[nn.Module]) -> tuple[Frozen, list[Tensor | None]]:
    """What an autograd function over several maps takes: the frozen parts, and A, B and gate of each in a row."""
    maps = [LowRank.of(layer) for layer in layers]
    return [(m.base, m.s) for m in maps], [tensor for m in maps for tensor in (m.A, m.B, m.gate)]


def put_together(frozen: Frozen, trained: Sequence[Tensor | None]) -> list[LowRank]:
    return [LowRank(base, s, *trained[3 * i : 3 * i + 3]) for i, (base, s) in enumerate(frozen)]


class _Kept(Context):
    base: nn.Linear
    s: float


class LowRankLinear(torch.autograd.Function):
    """Base and update in one node: x is kept once, in its own dtype, with the (…, r) product A x; the 4-bit weight is
    dequantized for the forward and again for the backward, and never kept."""

    @staticmethod
    def forward(ctx: _Kept, x: Tensor, x_low: Tensor | None, m: LowRank, *trained: Tensor | None) -> Tensor:
        z, low = kept(lambda: map_forward(x, m, x_low))
        ctx.base, ctx.s = m.base, m.s
        ctx.save_for_backward(x, x_low, low, *trained)
        return z

    @staticmethod
    def backward(ctx: _Kept, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        x, x_low, low, *trained = ctx.saved_tensors
        need_x, need_x_low, _, *needs = ctx.needs_input_grad
        grad_x = frozen_backward(grad_z, ctx.base) if need_x else None
        inputs, grad_inputs = x, grad_x
        if x_low is not None:
            inputs, grad_inputs = x_low, torch.zeros_like(x_low) if need_x_low else None
        m = LowRank(ctx.base, ctx.s, *trained)
        grads = low_rank_backward(grad_z, inputs.__getitem__, low, m, needs, grad_inputs)
        return grad_x, None if x_low is None else grad_inputs, None, *grads


# ------------------------------------------------------------------------------ one map, forward and backward, by hand


def map_forward(x: Tensor, m: LowRank, x_low: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """W x + s · B diag(gate) A x, and A x in fp32; the adapter sees `x_low` in the place of x where it is given.

    Args:
        x: (…, tokens, in).
    """
    z = F.linear(x, _weight(m.base, x.dtype), m.base.bias)
    return z, None if m.A is None else add_low_rank(z, x if x_low is None else x_low, m)


def frozen_backward(grad_z: Tensor, base: nn.Linear, onto: Tensor | None = None) -> Tensor:
    """grad_z W, in the dtype of grad_z; added to `onto`, in place, where it is given."""
    with torch.autocast(grad_z.device.type, enabled=False):
        weight = _weight(base, grad_z.dtype)
        if onto is None:
            return grad_z @ weight
        onto.view(-1, onto.shape[-1]).addmm_(grad_z.reshape(-1, grad_z.shape[-1]), weight)
        return onto


def low_rank_backward(
    grad_z: Tensor,
    inputs: Callable[[Part], Tensor],
    low: Tensor | None,
    m: LowRank,
    needs: Sequence[bool],
    grad_inputs: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (A, B, gate), those of `needs`; that of the adapter's input is added to `grad_inputs`, in place.

    fp32 copies of 16-bit activations are as wide as the map, so they exist for a stretch of tokens at a time.

    Args:
        grad_z: (…, tokens, out).
        inputs: gives a stretch of the adapter's input (…, tokens, in).
        low: A x; None: it is computed again.
    """
    if m.A is None or m.B is None:
        return None, None, None
    A, B, gate = m.A, m.B, m.gate
    need_A, need_B, need_gate = needs
    # Of B's transpose, in whose layout thin products take half to a quarter of the time (BLAS on a CPU).
    B_t = B.T.contiguous() if B.device.type == "cpu" else B.T
    grad_A = torch.empty_like(A) if need_A else None
    grad_B_t = torch.empty_like(B_t) if need_B else None
    beta = 0  # the first stretch writes, those after it add
    grad_gate = torch.zeros_like(gate) if need_gate and gate is not None else None
    with torch.autocast(grad_z.device.type, enabled=False):
        for part in stretches(grad_z, max(A.shape[1], B.shape[0])):
            grad_out = grad_z[part].to(B.dtype)
            grad_gated = thin_product(grad_out, B_t).mul_(m.s)
            x: Any = inputs(part).to(A.dtype) if need_A or low is None else None
            low_part = thin_product(x, A) if low is None else low[part]
            if grad_gate is not None:
                grad_gate += (grad_gated * low_part).sum_to_size(grad_gate.shape)
            if grad_B_t is not None:
                gated = low_part if gate is None else low_part * gate
                grad_B_t.addmm_(gated.flatten(0, -2).T, grad_out.flatten(0, -2), beta=beta, alpha=m.s)
            grad_low = grad_gated if gate is None else grad_gated * gate
            if grad_A is not None:
                grad_A.addmm_(grad_low.flatten(0, -2).T, x.flatten(0, -2), beta=beta)
            x = None  # before there is another fp32 tensor of this width
            if grad_inputs is not None:
                _add_product(grad_inputs[part], grad_low, A)
            beta = 1
    return grad_A, None if grad_B_t is None else grad_B_t.T, grad_gate


def add_low_rank(z: Tensor, x: Tensor, m: LowRank) -> Tensor:
    """z += s · B diag(gate) A x, in fp32: one rank's share of the output is below bf16's rounding of it. Returns A
    x."""
    A, B, gate = m.A, m.B, m.gate
    # In 16 bit as PEFT does it, to the bit: so that rounding hides no error of ours.
    product = thin_product if z.dtype == A.dtype else F.linear

    def add(part: Stretch) -> tuple[Tensor]:
        low = product(x[part].to(A.dtype), A)
        gated = low if gate is None else low * gate
        if z.dtype == B.dtype:
            _add_product(z[part], gated, B.T, m.s)
            return (low,)
        update = F.linear(gated, B).mul_(m.s)
        # PEFT rounds the update before it adds over a 4-bit map and after it over a plain one; the last bit
        # follows it, so that the saved adapter is the function that was trained.
        z[part].add_(update.to(z.dtype) if is_4bit(m.base) else update)
        return (low,)

    with torch.autocast(x.device.type, enabled=False):
        (low,) = assembled(x, max(A.shape[1], B.shape[0]), add)
    return low


def thin_product(x: Tensor, A: Tensor) -> Tensor:
    """x Aᵀ, for an A (r, in) of few rows.

    BLAS on a CPU takes about half the time for the transposed product, and no longer for 7 or 11 rows than their share
    of that for 8: so ranks of all sizes cost what they are worth.
    """
    if x.device.type != "cpu" or len(A) >= THIN:
        return F.linear(x, A)
    return (A @ x.flatten(0, -2).T).T.reshape(*x.shape[:-1], len(A))


def _add_product(z: Tensor, a: Tensor, b: Tensor, s: float = 1.0) -> None:
    """z += s · a b, in place; without another tensor as wide as z where that has the dtype of b."""
    if z.dtype == b.dtype and z.is_contiguous():
        z.flatten(0, -2).addmm_(a.flatten(0, -2), b, alpha=s)
    else:
        product = a @ b
        z.add_(product if s == 1.0 else product.mul_(s))


def _weight(base: nn.Linear, dtype: torch.dtype) -> Tensor:
    """The frozen (out, in) weight in `dtype`; a 4-bit one is dequantized, which costs its 16- or 32-bit size for a
    moment."""
    if not is_4bit(base):
        return base.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)

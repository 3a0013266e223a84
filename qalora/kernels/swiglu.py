"""The MLP of a LLaMA block over gated low-rank maps, as one node.

    z = down(silu(gate x) ∘ up x)        gate, up, down: W x + s · B diag(α) A x each (low_rank.py)

Composed of single maps, an MLP keeps four tensors of its inner width for the backward: gate x, its silu, up x and their
product. Two of them give the others, so two are kept, and the backward writes their gradients into them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qalora.base.families import FAMILIES
from qalora.kernels import fused
from qalora.kernels.context import Context
from qalora.kernels.low_rank import (
    Frozen,
    LowRank,
    Part,
    can_fuse,
    frozen_backward,
    low_rank_backward,
    map_forward,
    put_together,
    taken_apart,
)
from qalora.kernels.recompute import kept, output_unused
from qalora.kernels.stretches import stretches

# Class of an MLP → whether something in its block reads what it puts out.
KNOWN = {family.mlp: family.mlp_normed for family in FAMILIES.values() if family.mlp}
SILU = ("SiLU", "SiLUActivation")
NAME = "fused SwiGLU"
Inner = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # gate x, up x, and their low-rank products


class TiledMLP(Protocol):
    """An MLP of a LLaMA block, and what `forward` reads of it."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    mlp_tile: int | None


def replaceable(model: nn.Module) -> Iterator[nn.Module]:
    """The MLPs of a known kind."""
    module: Any
    for module in model.modules():
        if type(module).__name__ in KNOWN and type(module.act_fn).__name__ in SILU:
            yield module


def forward(self: TiledMLP, x: Tensor) -> Tensor:
    """x: (rows, tokens, d) → (rows, tokens, d); at most `self.mlp_tile` tokens at a time."""
    layers = (self.gate_proj, self.up_proj, self.down_proj)
    tile = getattr(self, "mlp_tile", None)
    if not can_fuse(layers) or not torch.is_grad_enabled():
        if tile is None:
            return _one_by_one(layers, x)
        return torch.cat([_one_by_one(layers, part) for part in x.split(tile, dim=1)], dim=1)
    frozen, trained = taken_apart(layers)
    return _GatedSwiGLU.apply(x, frozen, tile, KNOWN[type(self).__name__], *trained)


def _one_by_one(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    gate, up, down = layers
    return down(F.silu(gate(x)) * up(x))


class _Kept(Context):
    frozen: Frozen
    tile: int | None


class _GatedSwiGLU(torch.autograd.Function):
    """Keeps gate x and up x, or, in tiles, x alone: each tile's are computed again when its turn in the backward
    comes."""

    @staticmethod
    def forward(
        ctx: _Kept,
        x: Tensor,
        frozen: Frozen,
        tile: int | None,
        read: bool,
        *trained: Tensor | None,
    ) -> Tensor:
        maps = put_together(frozen, trained)
        ctx.frozen, ctx.tile = frozen, tile
        inner = kept(lambda: _inner(x, maps)) if tile is None else (None,) * 4
        ctx.save_for_backward(x, *inner, *trained)
        if output_unused() and not read:
            return x.new_zeros(()).expand_as(x)
        if tile is None:
            return _down(inner, maps)
        z = torch.empty_like(x)
        for part in _tiles(x, tile):
            z[part] = _down(_inner(x[part], maps), maps)
        return z

    @staticmethod
    def backward(ctx: _Kept, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        trained = saved[4:]
        need_x, _, _, _, *needs = ctx.needs_input_grad
        maps = put_together(ctx.frozen, trained)
        if ctx.tile is None:
            inner = (saved[0], saved[1], saved[2], saved[3])
            own, *more = _backward(grad_z, x, inner, maps, need_x, needs)
            return own, None, None, None, *more
        grad_x = torch.empty_like(x) if need_x else None
        grads: list[Tensor | None] = [None] * len(trained)
        for part in _tiles(x, ctx.tile):
            own, *more = _backward(grad_z[part], x[part], _inner(x[part], maps), maps, need_x, needs)
            if grad_x is not None and own is not None:
                grad_x[part] = own
            own = None  # before the next tile's is there
            grads = [b if a is None or b is None else a.add_(b) for a, b in zip(grads, more, strict=True)]
        return grad_x, None, None, None, *grads


def _tiles(x: Tensor, tile: int) -> list[Part]:
    """Indices of at most `tile` of the tokens of x: (rows, tokens, d); positions do not mix in an MLP."""
    return [(slice(None), slice(start, start + tile)) for start in range(0, x.shape[1], tile)]


def _inner(x: Tensor, maps: Sequence[LowRank]) -> Inner:
    """gate x and up x, and their low-rank products."""
    (gate, low_gate), (up, low_up) = map_forward(x, maps[0]), map_forward(x, maps[1])
    return gate, up, low_gate, low_up


def _down(inner: Inner, maps: Sequence[LowRank]) -> Tensor:
    return map_forward(_product(inner[0], inner[1]), maps[2])[0]


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return fused.silu_product(gate, up) if fused.multiplies(gate, up) else F.silu(gate).mul_(up)


def _backward(
    grad_z: Tensor,
    x: Tensor,
    inner: Inner,
    maps: Sequence[LowRank],
    need_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the trained tensors; `inner` is written over."""
    (to_gate, to_up, to_down), (gate, up, low_gate, low_up) = maps, inner

    def product(part: Part) -> Tensor:
        return _product(gate[part], up[part])

    grad_product = frozen_backward(grad_z, to_down.base)
    grads_down = low_rank_backward(grad_z, product, None, to_down, needs[6:], grad_product)
    grad_gate, grad_up = _through_product(grad_product, gate, up)
    grad_x = frozen_backward(grad_up, to_up.base) if need_x else None
    grads_up = low_rank_backward(grad_up, x.__getitem__, low_up, to_up, needs[3:6], grad_x)
    if grad_x is not None:
        frozen_backward(grad_gate, to_gate.base, onto=grad_x)
    grads_gate = low_rank_backward(grad_gate, x.__getitem__, low_gate, to_gate, needs[:3], grad_x)
    return grad_x, *grads_gate, *grads_up, *grads_down


def _through_product(grad_product: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up from that of silu(gate) ∘ up, in the memory of two of the three."""
    if fused.multiplies(gate, up, grad_product):
        return fused.silu_product_backward(gate, up, grad_product)
    up.mul_(grad_product)
    for part in stretches(gate, gate.shape[-1]):
        grad_product[part].mul_(F.silu(gate[part]))
    torch.ops.aten.silu_backward.grad_input(up, gate, grad_input=up)
    return up, grad_product

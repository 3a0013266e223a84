"""Queries, keys and values of a LLaMA block over gated low-rank maps, rotated to their positions, as one node.

    q, k = rotate(map(x)), v = map(x)        each map: W x + s · B diag(α) A x (low_rank.py)

Composed of single maps, x is kept for each, every rotation is done again where the block is, and three gradients of x
are made and added. Here x is kept once, what is kept is rotated already, and the gradients are written onto one
another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from qalora.base.families import FAMILIES
from qalora.kernels import fused
from qalora.kernels.context import Context
from qalora.kernels.low_rank import (
    Frozen,
    can_fuse,
    frozen_backward,
    low_rank_backward,
    map_forward,
    put_together,
    taken_apart,
)
from qalora.kernels.recompute import kept

KNOWN = {family.attention for family in FAMILIES.values()} - {None}


def replaceable(model: nn.Module) -> Iterator[nn.Module]:
    """The attentions of a known kind."""
    return (module for module in model.modules() if type(module).__name__ in KNOWN)


def forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """hidden_states: (rows, tokens, d) → (rows, tokens, d)."""
    layers = (self.q_proj, self.k_proj, self.v_proj)
    attend = AttentionInterface().get(
        self.config._attn_implementation
    )  # none for eager, which each model has its own of
    if (
        attend is None
        or past_key_values is not None
        or position_embeddings is None
        or not can_fuse(layers)
        or not torch.is_grad_enabled()
    ):
        return type(self).forward(
            self, hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
            past_key_values=past_key_values, **options,
        )  # fmt: skip
    frozen, trained = taken_apart(layers)
    states = _RotatedQKV.apply(hidden_states, self.head_dim, *position_embeddings, frozen, *trained)
    query, key, value = (state.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for state in states)
    out, weights = attend(
        self, query, key, value, attention_mask,
        dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling,
        sliding_window=getattr(self, "sliding_window", getattr(self.config, "sliding_window", None)), **options,
    )  # fmt: skip
    return self.o_proj(out.flatten(2).contiguous()), weights


class _Kept(Context):
    frozen: Frozen
    head_dim: int


class _RotatedQKV(torch.autograd.Function):
    """x, cos, sin → q, k, v: (rows, tokens, heads · head_dim)."""

    @staticmethod
    def forward(
        ctx: _Kept,
        x: Tensor,
        head_dim: int,
        cos: Tensor,
        sin: Tensor,
        frozen: Frozen,
        *trained: Tensor | None,
    ) -> tuple[Tensor, ...]:
        maps = put_together(frozen, trained)

        def compute() -> tuple[Tensor | None, ...]:
            (query, key, value), low = zip(*(map_forward(x, m) for m in maps), strict=True)
            return *rotated_(query, key, cos, sin, head_dim), value, *low

        states = kept(compute)
        ctx.frozen, ctx.head_dim = frozen, head_dim
        ctx.save_for_backward(x, cos, sin, *states[3:], *trained)
        return states[:3]

    @staticmethod
    def backward(ctx: _Kept, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, *rest = ctx.saved_tensors
        low, trained = rest[:3], rest[3:]
        need_x, *_ = ctx.needs_input_grad
        needs = ctx.needs_input_grad[5:]
        grad_x: Tensor | None = None
        found: list[Tensor | None] = []
        maps = put_together(ctx.frozen, trained)
        for i, (grad, m) in enumerate(zip(turned_back(grads, cos, sin, ctx.head_dim), maps, strict=True)):
            if need_x:
                grad_x = frozen_backward(grad, m.base, onto=grad_x)
            found += low_rank_backward(grad, x.__getitem__, low[i], m, needs[3 * i : 3 * i + 3], grad_x)
        return grad_x, None, None, None, None, *found


def rotated_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """q and k turned to their positions, in their own memory; see `rotate_`."""
    if fused.rotates(q):
        return fused.rotated(q, k, cos, sin, head_dim)
    for z in (q, k):
        rotate_(z, cos, sin, head_dim)
    return q, k


def turned_back(grads: Sequence[Tensor], cos: Tensor, sin: Tensor, head_dim: int) -> Iterator[Tensor]:
    """Gradients of q and k before their rotation, which a gradient turns back, and that of v."""
    query, key, value = grads
    if fused.rotates(query):
        yield from fused.rotated(_copy(query), _copy(key), cos, sin, head_dim, back=True)
    else:
        for grad in map(_copy, (query, key)):
            rotate_(grad, cos, -sin, head_dim)
            yield grad
    yield value


def _copy(grad: Tensor) -> Tensor:
    return grad.clone(memory_format=torch.contiguous_format)


def rotate_(z: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> None:
    """Rotary position embedding (arXiv 2104.09864) of every head, in place, with pairs as transformers lays them: i and
    i + head_dim / 2.

    Args:
        z: (rows, tokens, heads · head_dim).
        cos, sin: (rows or 1, tokens, head_dim), whose two halves are equal.
    """
    first, second = z.unflatten(-1, (-1, head_dim)).chunk(2, dim=-1)
    half = head_dim // 2
    cos, sin = cos[..., None, :half], sin[..., None, :half]
    # Every product rounded before the sum, as transformers has it.
    across, back = first * sin, second * sin
    first.mul_(cos).sub_(back)
    second.mul_(cos).add_(across)

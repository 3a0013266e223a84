"""An MLP of any make by tiles of tokens: it keeps its input alone, and each tile is computed again in its backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qalora.kernels import swiglu
from qalora.kernels.recompute import nothing_kept

NAME = "MLP by tiles"
PLACES = ("mlp", "feed_forward", "shared_mlp")  # what blocks call it


def mlp_of(block: object) -> Any:
    """The MLP of a block; None: it has none by these names."""
    return next((getattr(block, name) for name in PLACES if hasattr(block, name)), None)


def replaceable(model: nn.Module) -> Iterator[nn.Module]:
    """The MLPs of blocks that are not fused (swiglu.py)."""
    fused = set(swiglu.replaceable(model))
    for block in model.modules():
        mlp = mlp_of(block) if isinstance(block, GradientCheckpointingLayer) else None
        if mlp is not None and mlp not in fused:
            yield mlp


def forward(self: Any, x: Tensor) -> Tensor:
    """x: (rows, tokens, d) → (rows, tokens, d); at most `self.mlp_tile` tokens at a time."""
    own, tile = partial(type(self).forward, self), getattr(self, "mlp_tile", None)
    if tile is None:
        return own(x)
    parts = x.split(tile, dim=1)
    if not torch.is_grad_enabled():
        return torch.cat([own(part) for part in parts], dim=1)
    return torch.cat([checkpoint(own, part, use_reentrant=False, context_fn=nothing_kept) for part in parts], dim=1)

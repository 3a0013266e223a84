"""What a step keeps between forward and backward.

none       everything that a block's backward needs
blocks     the input of every block; its inside is computed again in the backward
offload    the same inputs, in pinned host memory: copied out behind the forward, fetched one block ahead of the backward
mlp_tile   while a block is computed again, its MLP a stretch of tokens at a time: a long context's widest tensors

forward    block 0 → block 1 → … → block n        backward    block n → … → block 1 → block 0
              │         │             │                         ↑            ↑         ↑
host          └→ input  └→ input      └→ input                  └ fetched while the block above is computed again
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

Checkpointing = Literal["none", "blocks", "offload"]


def set_checkpointing(model: nn.Module, kind: Checkpointing) -> None:
    """Chooses what every block of the model keeps from now on. Non-reentrant, so adapters get their gradients though no
    input of the first block needs one."""
    store = _HostStore()
    recompute = partial(checkpoint, use_reentrant=False)
    for block in blocks_of(model):
        block.gradient_checkpointing = kind != "none"
        block._gradient_checkpointing_func = partial(_offloaded, store) if kind == "offload" else recompute


def checkpointing_of(model: nn.Module) -> Checkpointing:
    block = blocks_of(model)[0]
    if not block.gradient_checkpointing:
        return "none"
    return "offload" if block._gradient_checkpointing_func.func is _offloaded else "blocks"


def set_mlp_tile(model: nn.Module, tokens: int | None) -> None:
    """Has every MLP work on at most `tokens` positions of a row at a time, each stretch checkpointed; None: on all."""
    for block in blocks_of(model):
        mlp = block.mlp
        mlp.__dict__.pop("forward", None)
        if tokens is not None:
            mlp.forward = partial(_tiled, mlp.forward, tokens)


def blocks_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _tiled(forward: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor) -> Tensor:
    """(rows, tokens, d) → the same; positions do not mix in an MLP."""
    if hidden.shape[1] <= tokens:
        return forward(hidden)
    if torch.is_grad_enabled():
        forward = partial(checkpoint, forward, use_reentrant=False)
    return torch.cat([forward(part) for part in hidden.split(tokens, dim=1)], dim=1)


def _offloaded(store: _HostStore, block: Callable[..., Any], *inputs: Any) -> Any:
    # The hooks see what checkpoint saves, which is the inputs: inside the block it sets hooks of its own.
    with torch.autograd.graph.saved_tensors_hooks(store.keep, store.fetched):
        return checkpoint(block, *inputs, use_reentrant=False)


class _Kept:
    """One block's input on its way to host memory and back; `below` is that of the block before."""

    def __init__(self, tensor: Tensor, stream: torch.cuda.Stream, below: _Kept | None):
        self.stream, self.below, self.device = stream, below, tensor.device
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.back: Tensor | None = None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)

    def fetch(self) -> None:
        if self.back is None:
            with torch.cuda.stream(self.stream):
                self.back = self.host.to(self.device, non_blocking=True)


class _HostStore:
    """Copies in both directions, on a stream of their own; a tensor that is in host memory already stays there."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.last: _Kept | None = None

    def keep(self, tensor: Tensor) -> Any:
        if self.stream is None or not tensor.is_cuda:
            return tensor
        self.last = _Kept(tensor, self.stream, below=self.last)
        return self.last

    def fetched(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.last = None  # the next forward begins a chain of its own
        kept.fetch()
        current = torch.cuda.current_stream()
        current.wait_stream(kept.stream)
        tensor, kept.back = kept.back, None
        tensor.record_stream(current)
        if kept.below is not None:
            kept.below.fetch()
        return tensor

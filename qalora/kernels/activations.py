"""What a step keeps between forward and backward.

False      everything that a block's backward needs
selective  the input of every block and what its maps put out; norms and attention are computed again in the backward
True       the input of every block; its inside is computed again
offload    the same inputs, in host memory, pinned where it can be: copied out behind the forward, fetched one block
           ahead of the backward
mlp_tile   the input of an MLP alone, whose inner tensors, a long context's widest, are computed again a stretch of
           tokens at a time

forward    block 0 → block 1 → … → block n        backward    block n → … → block 1 → block 0
              │         │             │                         ↑            ↑         ↑
host          └→ input  └→ input      └→ input                  └ fetched while the block above is computed again
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qalora.base.device import device_module
from qalora.errors import InputError
from qalora.kernels import swiglu, tiles
from qalora.kernels.recompute import both_runs
from qalora.memory import Checkpointing

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]  # of the forward, and of its repetition


def set_checkpointing(model: nn.Module, kept: Checkpointing) -> None:
    """Chooses what every block of the model keeps from now on. Non-reentrant, so adapters get their gradients though no
    input of the first block needs one."""
    recompute = {
        "selective": partial(_recomputed, partial(both_runs, keep=True)),
        True: partial(_recomputed, partial(both_runs, keep=False)),
        "offload": partial(_offloaded, _HostStore()),
    }
    for block in blocks_of(model):
        block.kept = kept
        block.gradient_checkpointing = bool(kept)
        block._gradient_checkpointing_func = recompute.get(kept)


def forget_kept(model: nn.Module) -> None:
    """After a forward that broke: what it kept is nobody's, and the next forward begins anew."""
    set_checkpointing(model, checkpointing_of(model))


def checkpointing_of(model: nn.Module) -> Checkpointing:
    return getattr(blocks_of(model)[0], "kept", False)


def set_mlp_tile(model: nn.Module, tokens: int | None) -> None:
    """Has every MLP work on at most `tokens` positions of a row at a time; None: on all.

    Raises:
        InputError: a block without an MLP, or one whose forward somebody else has replaced.
    """
    for block in blocks_of(model):
        mlp = tiles.mlp_of(block)
        if getattr(mlp, "kernel", None) in (swiglu.NAME, tiles.NAME):
            cast(swiglu.TiledMLP, mlp).mlp_tile = tokens
        elif tokens is not None:
            kind = type(block if mlp is None else mlp).__name__
            raise InputError(f"training.mlp_tile={tokens}: {kind} cannot be tiled; leave it out.")


class Block(Protocol):
    """A decoder block of transformers, with what is set on it here."""

    kept: Checkpointing
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Callable[..., Tensor] | None
    mlp: nn.Module


def blocks_of(model: nn.Module) -> list[Block]:
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return cast(list[Block], blocks)


def _recomputed(contexts: Callable[[], Contexts], block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _offloaded(store: _HostStore, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    # The hooks see what checkpoint saves, which is the inputs: inside the block it sets hooks of its own.
    with torch.autograd.graph.saved_tensors_hooks(store.keep, store.fetched):
        return _recomputed(partial(both_runs, keep=False), block, *inputs)


class HostMemory:
    """Pieces of host memory, pinned where it can be, that are used again: one for each block input of a step.

    torch's own pinned memory comes in powers of two, which is up to twice the bytes; here a piece is as large as it
    has to be.
    """

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def take(self, tensor: Tensor) -> Tensor:
        """Room for a tensor, (nbytes,) uint8 or more.

        Raises:
            torch.OutOfMemoryError: host memory has run out too.
        """
        # Longer rows came, and they stay the longest. In place: pieces that are out come back into this list.
        self.free[:] = [piece for piece in self.free if len(piece) >= tensor.nbytes]
        if self.free:
            return self.free.pop()
        try:
            piece = torch.empty(tensor.nbytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise torch.OutOfMemoryError(f"host memory: {error}") from None
        _pin(piece)
        return piece


def _pin(piece: Tensor) -> None:
    """Pins memory in its place. What the system does not pin is copied more slowly, and nothing else."""
    if not torch.cuda.is_available():
        return
    runtime: Any = torch.cuda.cudart()
    address = piece.data_ptr()
    if int(runtime.cudaHostRegister(address, piece.nbytes, 0)) == 0:
        weakref.finalize(piece.untyped_storage(), runtime.cudaHostUnregister, address)


class _Kept:
    """One block's input on its way to host memory and back; `below` is that of the block before."""

    def __init__(self, tensor: Tensor, streams: Any, stream: Any, memory: HostMemory, below: _Kept | None):
        self.streams, self.stream, self.below, self.device = streams, stream, below, tensor.device
        piece = memory.take(tensor)
        # All copies follow one another on one stream, so the next one into the piece waits for the last one out of it.
        self.give_back = weakref.finalize(self, memory.free.append, piece)
        self.host: Tensor | None = piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self.back: Tensor | None = None
        stream.wait_stream(streams.current_stream())
        with streams.stream(stream):
            # Memory that is not pinned may be let go of before a copy behind the host's back has ended.
            self.host.copy_(tensor, non_blocking=piece.is_pinned())
        tensor.record_stream(stream)

    def fetch(self) -> None:
        if self.host is None:
            raise RuntimeError(
                "block inputs wait in host memory for one backward; keep them with gradient_checkpointing=True"
            )
        if self.back is None:
            with self.streams.stream(self.stream):
                self.back = self.host.to(self.device, non_blocking=True)


class _HostStore:
    """Copies in both directions, on a stream of their own; a tensor that is in host memory already stays there."""

    def __init__(self) -> None:
        self.streams = device_module()
        self.stream = None if self.streams is None else self.streams.Stream()
        self.memory = HostMemory()
        self.last: _Kept | None = None

    def keep(self, tensor: Tensor) -> Tensor | _Kept:
        if self.stream is None or tensor.device.type == "cpu":
            return tensor
        self.last = _Kept(tensor, self.streams, self.stream, self.memory, below=self.last)
        return self.last

    def fetched(self, kept: Tensor | _Kept) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.last = None  # the next forward begins a chain of its own
        kept.fetch()
        current = kept.streams.current_stream()
        current.wait_stream(kept.stream)
        tensor, kept.back, kept.host = cast(Tensor, kept.back), None, None
        kept.give_back()
        tensor.record_stream(current)
        if kept.below is not None:
            kept.below.fetch()
        return tensor

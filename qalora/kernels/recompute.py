"""A checkpointed block runs twice: in the forward, and again when the backward reaches it. What the second run need not
do.

What a block puts out is read by nobody the second time, so its last map is left out. And where memory is there for it,
the forward keeps what the frozen maps put out, in the order in which they run, so that the second run computes no map
at all: of norms and attention alone it makes the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

Tensors = tuple[Any, ...]  # or None, where there is none


@dataclass
class _Run:
    again: bool
    kept: deque[Tensors] | None


_run: ContextVar[_Run | None] = ContextVar("run", default=None)


def both_runs(*, keep: bool) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts around a block's first and second run; `keep` what its maps put out in between."""
    kept: deque[Tensors] | None = deque() if keep else None
    return _within(_Run(False, kept)), _within(_Run(True, kept))


def nothing_kept() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts around both runs of a part of a block, of which no map's output is kept."""
    return _within(None), _within(None)


def output_unused() -> bool:
    """Whether the block runs for the second time."""
    run = _run.get()
    return run is not None and run.again


def kept(compute: Callable[[], Tensors]) -> Tensors:
    """What `compute` gives, or gave in the block's first run if that has kept it."""
    run = _run.get()
    if run is None or run.kept is None:
        return compute()
    if run.again:
        return run.kept.popleft()
    tensors = compute()
    # Detached, since autograd makes the tensors themselves part of a graph that would then hold itself.
    run.kept.append(tuple(None if tensor is None else tensor.detach() for tensor in tensors))
    return tensors


@contextmanager
def _within(run: _Run | None) -> Iterator[None]:
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)

"""Settings with which a step fits the memory there is: pure arithmetic over plans. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qalora.memory import Checkpointing, MemoryPlan
from qalora.sizes import MLP_TILE

Plan = Callable[..., MemoryPlan]  # plan_memory with everything set but what is chosen here

FULL_FORWARD = 1024  # tokens of a forward from which on more of them hardly raise the tokens a second
HEADROOM = 0.92  # of the memory; the rest is the allocator's, and the plan's error


@dataclass(frozen=True)
class Level:
    """What a step keeps of its blocks, and how much an MLP works on at a time.

    Attributes:
        what: it does, in the words of a message.
    """

    checkpointing: Checkpointing
    mlp_tile: int | None
    what: str


# From fast to frugal.
LEVELS = (
    Level(False, None, "nothing is computed twice"),
    Level("selective", None, "norms and attention are computed again in the backward"),
    Level(True, None, "blocks are computed again in the backward"),
    Level("offload", None, "block inputs wait in host memory"),
    Level("offload", MLP_TILE, f"MLPs work on {MLP_TILE} tokens at a time"),
)


@dataclass(frozen=True)
class Fit:
    """Settings of `training` that a fit decides."""

    micro_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: Checkpointing
    mlp_tile: int | None

    def settings(self) -> dict[str, Any]:
        """By their names in `training`."""
        return vars(self)


def fit(plan: Plan, memory: int, *, batch_size: int, seq_len: int, most: int | None = None) -> Fit | None:
    """The fastest settings that fit: the first level whose largest forward fills the device, else the largest forward
    of any level. The rows of an optimizer step stay what they are.

    Args:
        memory: bytes that may be used.
        batch_size: rows an optimizer step.
        seq_len: tokens of the longest row.
        most: rows of a micro-batch; None: those of a step.

    Returns:
        None where even one row at the last level does not fit.
    """
    best: Fit | None = None
    micro_batches = [rows for rows in range(most or batch_size, 0, -1) if batch_size % rows == 0]
    for level in LEVELS:
        for rows in micro_batches:
            chosen = Fit(rows, batch_size // rows, level.checkpointing, level.mlp_tile)
            if plan(seq_len=seq_len, **chosen.settings()).total > HEADROOM * memory:
                continue
            if rows == micro_batches[0] or rows * seq_len >= FULL_FORWARD:
                return chosen
            if best is None or rows > best.micro_batch_size:
                best = chosen
            break
    return best


def fastest(plan: Plan, memory: int, *, host: int | None = None, tile: int | None = None) -> Level:
    """The fastest level that fits with the micro-batch as it is; the most frugal one where none does.

    Args:
        memory: bytes that may be used.
        host: bytes of host memory where the device has its own, in which block inputs may wait; None: it has not.
        tile: mlp_tile, where that is set already.
    """
    offered = [level for level in LEVELS if host is not None or level.checkpointing != "offload"]
    if tile is not None:
        offered = [replace(level, mlp_tile=tile) for level in offered if level.mlp_tile is None]
    for level in offered:
        planned = plan(gradient_checkpointing=level.checkpointing, mlp_tile=level.mlp_tile)
        if planned.total <= HEADROOM * memory and planned.host <= HEADROOM * (host or 0):
            return level
    return offered[-1]


def least(batch_size: int) -> Fit:
    """What needs the least memory of all: a row at a time, at the last level."""
    return Fit(1, batch_size, LEVELS[-1].checkpointing, LEVELS[-1].mlp_tile)


def lower(checkpointing: Checkpointing, tiled: bool) -> Level | None:
    """The next level where memory ran out; None at the last.

    Args:
        checkpointing: of the step that ran out.
        tiled: its MLPs worked in tiles already, whatever it kept of its blocks.
    """
    at = next(place for place, level in enumerate(LEVELS) if level.checkpointing == checkpointing)
    below = LEVELS[at + 1]
    return None if below.mlp_tile is not None and tiled else below


def largest(plan: Plan, memory: int, setting: str) -> int:
    """The largest value of a setting of the plan, such as seq_len, that fits the memory; 0 where 1 does not."""

    def fits(value: int) -> bool:
        return plan(**{setting: value}).total <= HEADROOM * memory

    if not fits(1):
        return 0
    low = 1
    while low < 1 << 24 and fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

"""One round of Algorithm 1: score every rank, decide, apply, record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from qalora.adapter.ablation import MicroBatch
from qalora.adapter.allocation import plan
from qalora.adapter.model import ranks
from qalora.adapter.scoring import Importance, Method, RankScores, score_ranks
from qalora.adapter.surgery import apply_plan


@dataclass(frozen=True)
class RoundSettings:
    """How a round decides.

    Attributes:
        budget: R, which the total never exceeds.
        prune: n_A, ranks that leave in a round.
    """

    budget: int
    prune: int
    scoring: Method
    importance: Importance
    min_rank: int
    max_rank: int | None
    seed: int


def allocation_round(
    model: PeftModel, optimizer: Any, batch: Sequence[MicroBatch], settings: RoundSettings, step: int
) -> tuple[dict[str, Any], RankScores]:
    """Runs one round on the model and its optimizer.

    Returns:
        (a line of allocation.jsonl without its scores' file, the scores that decided).

    Raises:
        RuntimeError: the total would be above the budget.
    """
    start = time.perf_counter()
    scores = score_ranks(model, batch, settings.scoring)
    decision = plan(
        scores.importance(settings.importance),
        prune=settings.prune,
        min_rank=settings.min_rank,
        max_rank=settings.max_rank,
    )
    # Seeded by step, so that a resumed run grows the same ranks as a straight one.
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    apply_plan(model, decision, optimizer, generator=generator)
    now = ranks(model)
    if sum(now.values()) > settings.budget:
        raise RuntimeError(f"step {step}: total rank {sum(now.values())} is above the budget {settings.budget}")
    record = {
        "step": step,
        "pruned": {name: list(indices) for name, indices in decision.pruned.items()},
        "grown": decision.grown,
        "ranks": now,
        "total_rank": sum(now.values()),
        "budget": settings.budget,
        "seconds": time.perf_counter() - start,
        "forward_equivalents": scores.forward_equivalents,
        "certified": False,
    }
    return record, scores

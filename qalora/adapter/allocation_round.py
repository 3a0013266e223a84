"""One round of Algorithm 1: score every rank, decide, apply, record. And one before the first step, among ranks that
start at their map's quantization error."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict

import torch
from peft import PeftModel
from torch.optim import Optimizer

from qalora.adapter.ablation import MicroBatch
from qalora.adapter.allocation import MOST, AllocationPlan, keep_best, most_pruned, plan
from qalora.adapter.certified import LEAST_CERTIFIED
from qalora.adapter.model import rank_parameters, ranks
from qalora.adapter.scores import Importance, Method, PerRank, RankScores
from qalora.adapter.scoring import FIRST_ORDER, MIDPOINT, midpoint_shares, score_ranks
from qalora.adapter.start.gradient import FORWARDS, gradient_directions
from qalora.adapter.start.quantization import start_at_quantization_error
from qalora.adapter.surgery import apply_plan
from qalora.base.checkpoint import Weights
from qalora.base.device import spare_memory

Scorer = Callable[[PeftModel, Sequence[MicroBatch], int], RankScores]  # (model, batch, ranks that will go)
Scoring = Literal["auto", "certified", "first-order", "exact", "path"]
SHARE = 0.03  # of the training so far, which `auto` may spend on scoring


@dataclass(frozen=True)
class RoundSettings:
    """How a round decides.

    Attributes:
        budget: R, which the total never exceeds.
        parameters: what the parameters of all ranks never exceed; None: their number alone counts.
        prune: n_A, ranks that leave in a round, see `most_pruned`.
        scoring: auto is first order, then exact evaluations nearest the threshold as far as 3 % of the training so far
            allow. Cost is counted in tokens through the model, not in seconds, so that a run repeats exactly.
        step_tokens: tokens of an optimizer step, on average.
        modules: those that had ranks at the start, in the model's order; one that lost all of them can be given some
            again.
    """

    budget: int
    prune: int
    scoring: Scoring
    importance: Importance
    min_rank: int
    max_rank: int | None
    seed: int
    step_tokens: float
    modules: tuple[str, ...]
    parameters: int | None = None


class Applied(TypedDict):
    """What a round did.

    Attributes:
        step: optimizer steps before it.
        pruned: module → the ranks that left, by their rows of A.
        grown: module → how many ranks entered.
        ranks: module → ranks afterwards.
        parameters: of all ranks afterwards.
    """

    step: int
    pruned: dict[str, list[int]]
    grown: dict[str, int]
    ranks: dict[str, int]
    total_rank: int
    budget: int
    parameters: int


class Record(Applied):
    """A line of allocation.jsonl.

    Attributes:
        forward_equivalents: what scoring took, in forwards of its batch.
        certified: the pruned set is settled, not estimated.
        scores: the file beside it that has them.
    """

    seconds: float
    forward_equivalents: float
    certified: bool
    exact_evaluations: int
    scores: NotRequired[str]


def allocation_round(
    model: PeftModel,
    optimizer: Optimizer | None,
    batch: Sequence[MicroBatch],
    settings: RoundSettings,
    step: int,
    spent: float = 0.0,
    growth: Sequence[MicroBatch] = (),
    scorer: Scorer | None = None,
) -> tuple[Record, RankScores]:
    """Runs one round on the model and its optimizer.

    Args:
        spent: forwards of the batch that earlier rounds took.
        growth: training rows whose gradient new ranks are pointed along; none: they point anywhere.
        scorer: what scores the ranks; None: `score_ranks`, as the settings say.

    Returns:
        (a line of allocation.jsonl without its scores' file, the scores that decided).

    Raises:
        AnswerNo: no rank is left, or the scores are not finite.
        RuntimeError: the total would be above the budget.
    """
    start = time.perf_counter()
    method, budget = _method(settings, batch, step, spent)
    prune = most_pruned(ranks(model).values(), settings.prune)
    if scorer is not None:
        scores = scorer(model, batch, prune)
    else:
        scores = score_ranks(
            model,
            batch,
            method,
            importance=settings.importance,
            prune=prune,
            min_rank=settings.min_rank,
            memory=spare_memory(),
            budget=budget,
            seed=settings.seed,
        )
    importance = {**dict.fromkeys(settings.modules, ()), **scores.importance}
    cost = rank_parameters(model, importance)
    decision = plan(
        importance,
        prune=prune,
        min_rank=settings.min_rank,
        max_rank=settings.max_rank,
        budget=settings.budget,
        cost=cost,
        parameters=settings.parameters,
    )
    # Seeded by step, so that a resumed run grows the same ranks as a straight one.
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    new_rows = {}
    if growth and decision.grown:
        directions = gradient_directions(model, growth, decision.grown, generator)
        new_rows = {name: found.known for name, found in directions.items()}
    apply_plan(model, decision, optimizer, generator=generator, new_rows=new_rows)
    record: Record = {
        **_applied(model, decision, settings.budget, settings.parameters, step, cost),
        "seconds": time.perf_counter() - start,
        "forward_equivalents": scores.forward_equivalents
        + (FORWARDS * _tokens(growth) / _tokens(batch) if new_rows else 0),
        "certified": scores.certified,
        "exact_evaluations": scores.exact_evaluations,
    }
    return record, scores


def keep_best_corrections(
    model: PeftModel,
    optimizer: Optimizer | None,
    batch: Sequence[MicroBatch],
    original: Weights,
    even: Mapping[str, int],
    *,
    budget: int,
    parameters: int | None,
    min_rank: int,
    max_rank: int | None,
    seed: int,
) -> tuple[Record, PerRank]:
    """Gives every module twice its ranks, each of which corrects its map's quantization error, and keeps those that
    lower the loss most, by `midpoint_shares`: before the first step, which these ranks allow, for their B is not zero.
    An attempt that broke off can be begun anew.

    Args:
        batch: training rows.
        original: the 16-bit weights (start/quantization.py).
        even: module → the ranks that it was given.
        budget, parameters: what ranks and their parameters never exceed; None: the number of ranks alone counts.
        min_rank, max_rank: of a module; None: no limit.

    Returns:
        (a line of allocation.jsonl without its scores' file, module → importance of each of its candidates, see
        `midpoint_shares`).
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    candidates = {name: min(MOST * rank, max_rank or MOST * rank) for name, rank in even.items()}
    apply_plan(model, _moved(ranks(model), candidates), optimizer, generator=generator)
    start_at_quantization_error(model, batch, original, generator=generator)
    importance = midpoint_shares(model, batch)
    cost = rank_parameters(model, even)
    # Every module keeps a rank, for only a round could give it one again, and a run may have none.
    least = max(1, min_rank)
    decision = keep_best(importance, cost, ranks=budget, parameters=parameters, least=least)
    apply_plan(model, decision, optimizer)
    record: Record = {
        **_applied(model, _moved(even, ranks(model)), budget, parameters, 0, cost),
        "seconds": time.perf_counter() - start,
        "forward_equivalents": 1 + MIDPOINT,
        "certified": False,
        "exact_evaluations": 0,
    }
    return record, importance


def _moved(before: Mapping[str, int], after: Mapping[str, int]) -> AllocationPlan:
    """From some numbers of ranks to others; where a module loses some, its last."""
    return AllocationPlan(
        pruned={name: tuple(range(after[name], rank)) for name, rank in before.items() if after[name] < rank},
        grown={name: after[name] - rank for name, rank in before.items() if after[name] > rank},
    )


def _applied(
    model: PeftModel,
    decision: AllocationPlan,
    budget: int,
    parameters: int | None,
    step: int,
    cost: Mapping[str, int],
) -> Applied:
    """The part of a record that says what was done.

    Raises:
        RuntimeError: the total, or the parameters, are above the budget.
    """
    now = ranks(model)
    count = sum(cost[name] * rank for name, rank in now.items())
    if sum(now.values()) > budget:
        raise RuntimeError(f"step {step}: total rank {sum(now.values())} is above the budget {budget}")
    if parameters is not None and count > parameters:
        raise RuntimeError(f"step {step}: {count} parameters are above the budget {parameters}")
    return {
        "step": step,
        "pruned": {name: list(indices) for name, indices in decision.pruned.items()},
        "grown": decision.grown,
        "ranks": now,
        "total_rank": sum(now.values()),
        "budget": budget,
        "parameters": count,
    }


def _method(
    settings: RoundSettings, batch: Sequence[MicroBatch], step: int, spent: float
) -> tuple[Method, float | None]:
    """The method of this round, and the forwards that it may spend beyond first order."""
    if settings.scoring != "auto":
        return settings.scoring, None
    if settings.importance == "path":
        return "path", None
    trained = (
        3.0 * step * settings.step_tokens / _tokens(batch)
    )  # forwards of the batch that the training so far amounts to
    left = SHARE * trained - spent - FIRST_ORDER
    return ("certified", left) if left >= LEAST_CERTIFIED else ("first-order", None)


def _tokens(batch: Sequence[MicroBatch]) -> int:
    return sum(micro["input_ids"].numel() for micro in batch)

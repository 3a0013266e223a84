"""Algorithm 1's decisions, as pure functions: when to allocate, which ranks go, which modules gain. No torch.

Source: ALoRA, arXiv 2403.16187v2, §3.3 and Algorithm 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from qalora.errors import AnswerNo

Init = Literal["kaiming", "gradient", "quantization"]  # where new ranks point
Share = Literal["even", "scores"]  # how the budget is shared out before the first step
MOST = 2  # times the even share, which no module exceeds at the start


@dataclass(frozen=True)
class AllocationPlan:
    """What one round does to the adapter.

    Attributes:
        pruned: module → ranks that leave, ascending (row of A and column of B before the round).
        grown: module → number of ranks that enter. No module is in both.
    """

    pruned: dict[str, tuple[int, ...]]
    grown: dict[str, int]


def plan(
    importance: Mapping[str, Sequence[float]],
    *,
    prune: int,
    min_rank: int = 0,
    max_rank: int | None = None,
    budget: int | None = None,
    cost: Mapping[str, int] | None = None,
    parameters: int | None = None,
) -> AllocationPlan:
    """One round of Algorithm 1: the least important ranks go, the modules that lost none share what is left of the
    budget.

    A module without ranks lost none either, so it can be given some; where an average decides, its own counts as that
    of all ranks. The total after the round is never above the budget. It is below when every module lost a rank, or
    when `max_rank` or `parameters` leave no room, and then the next round makes up for it where it can.

    Args:
        importance: module → importance of each of its ranks, higher is better (eq. 6); none for a module without ranks.
        prune: n_A, how many ranks go (fewer by `most_pruned`, or when `min_rank` protects the rest).
        min_rank: ranks that every module keeps.
        max_rank: ranks that no module exceeds by growing.
        budget: R, ranks in all; None: as many as there are.
        cost: module → parameters of one of its ranks; needed with `parameters`.
        parameters: what all ranks together never exceed by growing; None: only their number counts, as in the paper.

    Raises:
        ValueError: an importance that is not finite.
        AnswerNo: no rank would be left.
    """
    ranks = {module: len(scores) for module, scores in importance.items()}
    for module, scores in importance.items():
        if not all(math.isfinite(score) for score in scores):
            raise ValueError(f"the importance of a rank of {module} is not finite: {list(scores)}")

    pruned = least_important(importance, most_pruned(ranks.values(), prune), min_rank)
    lost_none = [module for module in ranks if module not in pruned]
    room = {module: math.inf if max_rank is None else max(max_rank - ranks[module], 0) for module in lost_none}
    total = sum(ranks.values())
    overall = sum(map(sum, importance.values())) / max(total, 1)
    average = {module: sum(importance[module]) / ranks[module] if ranks[module] else overall for module in lost_none}
    kept = {module: rank - len(pruned.get(module, ())) for module, rank in ranks.items()}
    count = max(total if budget is None else budget, total) - sum(kept.values())
    grown = share_out(count, room, average)
    if parameters is not None and cost is not None:
        left = parameters - sum(cost[module] * rank for module, rank in kept.items())
        grown = topped_up(affordable(grown, cost, left, average), count, room, cost, left, average)
    if not any(kept.values()) and not grown:
        raise AnswerNo("no rank of the adapter is left, and a round of allocation has none to prune or to grow.")
    return AllocationPlan(pruned, grown)


def most_pruned(ranks: Iterable[int], asked: int) -> int:
    """How many of the modules' ranks a round prunes: as many as asked for, but at most one per module that has any, and
    half of all.

    So what n_A was fixed at, when every module had ranks, never eats an adapter whose modules have fewer.
    """
    living = [rank for rank in ranks if rank]
    return min(asked, len(living), sum(living) // 2)


def least_important(
    importance: Mapping[str, Sequence[float]], count: int, min_rank: int = 0
) -> dict[str, tuple[int, ...]]:
    """The `count` ranks of lowest importance, at most all but `min_rank` of a module; ties go by module and rank
    order."""
    order = {module: position for position, module in enumerate(importance)}
    ascending = sorted(
        (score, order[module], rank, module)
        for module, scores in importance.items()
        for rank, score in enumerate(scores)
    )
    pruned: dict[str, list[int]] = {}
    left = count
    for _, _, rank, module in ascending:
        if left == 0:
            break
        if len(importance[module]) - len(pruned.get(module, ())) > min_rank:
            pruned.setdefault(module, []).append(rank)
            left -= 1
    return {module: tuple(sorted(pruned[module])) for module in importance if module in pruned}


def undecided(
    importance: Mapping[str, Sequence[float]],
    low: Mapping[str, Sequence[float]],
    high: Mapping[str, Sequence[float]],
    count: int,
    min_rank: int = 0,
) -> list[tuple[str, int]]:
    """The ranks that could go or stay against `least_important`'s answer, were each somewhere in its [low, high].

    Empty means that no values within these bounds give another pruned set. Nearest to the threshold first.
    """
    pruned = {(m, rank) for m, indices in least_important(importance, count, min_rank).items() for rank in indices}
    kept = {(m, rank) for m, scores in importance.items() for rank in range(len(scores))} - pruned
    if not pruned or not kept:
        return []
    # The best of a module stay by min_rank whatever their value, so long as they stay its best.
    protected = {
        (m, rank)
        for m, scores in importance.items()
        for rank in sorted(range(len(scores)), key=lambda rank: (scores[rank], rank))[max(len(scores) - min_rank, 0) :]
    }
    top = max(high[m][rank] for m, rank in pruned)
    crossing: set[tuple[str, int]] = set()
    for m, rank in kept:
        rivals = [p for p in pruned if low[m][rank] <= high[p[0]][p[1]]] if low[m][rank] <= top else []
        if (m, rank) in protected:
            inside = {(m, other) for other in range(len(importance[m]))} - {(m, rank)}
            peers = [peer for peer in inside - protected if low[m][rank] <= high[m][peer[1]]]
            rivals = rivals if any(peer in kept for peer in peers) else [p for p in rivals if p in inside]
        if rivals:
            crossing |= {(m, rank), *rivals}
    threshold = max((importance[m][rank] for m, rank in pruned))
    return sorted(crossing, key=lambda r: (abs(importance[r[0]][r[1]] - threshold), r))


def share_out(count: int, room: Mapping[str, float], average: Mapping[str, float]) -> dict[str, int]:
    """`count` new ranks over the modules of `room`, as evenly as their room allows, and the remainder one each to
    those with the highest average importance (footnote 3)."""
    grown = dict.fromkeys(room, 0)
    while count:
        open_modules = [module for module in room if grown[module] < room[module]]
        if not open_modules:
            break
        share = count // len(open_modules)
        if share == 0:
            best = sorted(open_modules, key=lambda module: -average[module])[:count]
            for module in best:
                grown[module] += 1
            break
        for module in open_modules:
            given = int(min(share, room[module] - grown[module]))
            grown[module] += given
            count -= given
    return {module: n for module, n in grown.items() if n}


def keep_best(
    importance: Mapping[str, Sequence[float]],
    cost: Mapping[str, int],
    *,
    ranks: int,
    parameters: int | None = None,
    least: int = 0,
) -> AllocationPlan:
    """Of more ranks than there is budget for, the most important of all modules stay.

    Args:
        importance: module → importance of each of its ranks, higher is better.
        cost: module → parameters of one of its ranks.
        ranks: how many stay, in all.
        parameters: what they have together at most, and then importance counts by the parameter; None: only their
            number counts.
        least: ranks of every module, its best, that stay before any others, where it has so many.
    """
    order = {module: position for position, module in enumerate(importance)}
    best_first = sorted(
        (
            place >= least,
            -importance[module][rank] / (1 if parameters is None else cost[module]),
            order[module],
            rank,
            module,
        )
        for module, scores in importance.items()
        for place, rank in enumerate(sorted(range(len(scores)), key=lambda rank: -scores[rank]))
    )
    kept: set[tuple[str, int]] = set()
    left = math.inf if parameters is None else parameters
    for _, _, _, rank, module in best_first:
        if len(kept) < ranks and cost[module] <= left:
            kept.add((module, rank))
            left -= cost[module]
    pruned = {
        module: tuple(rank for rank in range(len(scores)) if (module, rank) not in kept)
        for module, scores in importance.items()
    }
    return AllocationPlan({module: indices for module, indices in pruned.items() if indices}, {})


def affordable(
    grown: Mapping[str, int], cost: Mapping[str, int], parameters: int, average: Mapping[str, float]
) -> dict[str, int]:
    """The new ranks that together have at most so many parameters: one after another is given up, each time in the
    module with the lowest average importance of those that still gain."""
    left = dict(grown)
    excess = sum(cost[module] * n for module, n in grown.items()) - parameters
    while excess > 0 and left:
        module = min(left, key=lambda module: average[module])
        left[module] -= 1
        excess -= cost[module]
        if not left[module]:
            del left[module]
    return left


def topped_up(
    grown: Mapping[str, int],
    count: int,
    room: Mapping[str, float],
    cost: Mapping[str, int],
    parameters: int,
    average: Mapping[str, float],
) -> dict[str, int]:
    """`grown`, and as many ranks more as `count` and the parameters allow: one after another, to a module that has
    gained fewest, and of these to the one with the highest average importance."""
    more = dict(grown)
    spare = parameters - sum(cost[module] * n for module, n in grown.items())
    for _ in range(count - sum(grown.values())):
        able = [module for module in room if more.get(module, 0) < room[module] and cost[module] <= spare]
        if not able:
            break
        module = min(able, key=lambda module: (more.get(module, 0), -average[module]))
        more[module] = more.get(module, 0) + 1
        spare -= cost[module]
    return more


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps after which a round takes place, and whether the settings were scaled to fit the run."""

    steps: tuple[int, ...]
    scaled: bool


def schedule(
    *, total_steps: int, steps_per_epoch: float, rounds: int, warmup: int | float | str, interval: int | float | str
) -> Schedule:
    """K1 steps, then a round, then a round every K2 steps, at most `rounds` of them, each followed by K2 steps to
    recover.

    A run shorter than K1 + N_A·K2 shrinks both in proportion, and drops rounds that would fall on the same step.

    Args:
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps of one pass over the training rows.
        rounds: N_A.
        warmup: K1, as `parse_duration` describes.
        interval: K2, as `parse_duration` describes.
    """
    if rounds == 0:
        return Schedule((), False)
    k1 = in_steps(warmup, total_steps, steps_per_epoch)
    k2 = in_steps(interval, total_steps, steps_per_epoch)
    wanted = k1 + rounds * k2
    factor = min(1.0, total_steps / wanted)
    steps = {round((k1 + i * k2) * factor) for i in range(rounds)}
    return Schedule(tuple(sorted(step for step in steps if 1 <= step < total_steps)), factor < 1.0)


def parse_duration(value: int | float | str) -> int | float | str:
    """Checks a duration: optimizer steps (integer), a share of the run (between 0 and 1), or "N epochs".

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        valid = re.fullmatch(r"\d+(\.\d+)? epochs?", value) is not None and float(value.split()[0]) > 0
    elif isinstance(value, int):
        valid = value >= 1 and not isinstance(value, bool)
    else:
        valid = 0 < value < 1
    if not valid:
        raise ValueError('give optimizer steps (20), a share of the run (0.3) or epochs ("1 epoch")')
    return value


def in_steps(duration: int | float | str, total_steps: int, steps_per_epoch: float) -> float:
    """A duration as `parse_duration` describes it, in optimizer steps."""
    if isinstance(duration, str):
        return float(duration.split()[0]) * steps_per_epoch
    return duration if isinstance(duration, int) else duration * total_steps

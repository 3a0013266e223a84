"""Which ranks of an adapter stay: pure decisions of scores and losses.

A cut is global: ranks of all modules stand in one order, by their score or by their score per parameter, and the first
of them stay. How many is read off the curve *loss against share kept*, taken on rows that gave no scores: the smallest
cut whose loss is not above the whole adapter's, beyond what it may cost.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from qalora.adapter.scores import PerRank

if TYPE_CHECKING:
    from qalora.adapter.layer import Factors

Order = Literal["path", "sum", "values", "shrunk", "trained"]
Per = Literal["rank", "parameter"]
Kept = dict[str, list[int]]  # module → its ranks that stay, ascending; a module without any is absent
SHARES = (0.75, 0.5, 0.25, 0.125, 0.0625, 0.03)  # of the ranks: where a curve is taken
ROWS, MOST_ROWS = 200, 1000  # that a cut is decided by: more than 200 only where their answers are short
SCORING_TOKENS = 2048  # supervised tokens that score; more rows than half are never taken for it


@dataclass(frozen=True)
class Size:
    """What a cut may hold; None: no bound.

    Attributes:
        ranks, parameters: of the whole adapter.
        max_rank: of every module.
    """

    ranks: int | None = None
    parameters: int | None = None
    max_rank: int | None = None


@dataclass(frozen=True)
class Point:
    """A cut, and what it costs on the curve's rows.

    Attributes:
        share: of the whole adapter's ranks.
        ranks, parameters: that stay.
        loss: nats a supervised token.
        difference: of the loss from the whole adapter's on the same rows; stderr: its standard error over the rows.
        factors: of the layers, whose ranks stay: as training left them, or trained on; None: their own.
    """

    share: float
    ranks: int
    parameters: int
    loss: float
    difference: float
    stderr: float
    kept: Kept = field(repr=False, compare=False)
    factors: Factors | None = field(default=None, repr=False, compare=False)

    @property
    def bound(self) -> tuple[float, float]:
        """What cuts of one size are compared by, the lower the better: the difference and its standard error, then the
        loss. An order that is as good by chance has the larger error."""
        return self.difference + self.stderr, self.loss

    def holds(self, tolerance: float = 0.0) -> bool:
        """Whether its loss is not above the whole adapter's, beyond the tolerance. A single row has no standard error,
        and tells nothing."""
        return math.isfinite(self.stderr) and self.difference <= tolerance


def kept(scores: PerRank, size: Size, costs: Mapping[str, int], per: Per = "rank") -> Kept:
    """The ranks of the highest scores that the size has room for, over all modules.

    Args:
        scores: module → one value per rank.
        costs: module → parameters of one rank.
        per: what orders them: the score, or the score per parameter.
    """
    weight = {name: 1 if per == "rank" else costs[name] for name in scores}
    order = sorted(
        ((name, rank) for name, of in scores.items() for rank in range(len(of))),
        key=lambda place: -scores[place[0]][place[1]] / weight[place[0]],
    )
    found: Kept = {}
    ranks = parameters = 0
    for name, rank in order:
        own = len(found.get(name, ()))
        bounds = ((ranks + 1, size.ranks), (own + 1, size.max_rank), (parameters + costs[name], size.parameters))
        if any(bound is not None and number > bound for number, bound in bounds):
            continue
        found.setdefault(name, []).append(rank)
        ranks, parameters = ranks + 1, parameters + costs[name]
    return {name: sorted(found[name]) for name in scores if name in found}


def equal_ranks(size: Size, costs: Mapping[str, int]) -> int:
    """The largest rank that all modules can have at once within the size; 0: none.

    Args:
        costs: module → parameters of one rank.
    """
    bounds = [size.max_rank]
    bounds += [None if size.ranks is None else size.ranks // len(costs)]
    bounds += [None if size.parameters is None else size.parameters // sum(costs.values())]
    return min(bound for bound in bounds if bound is not None)


def parameters_of(kept: Kept, costs: Mapping[str, int]) -> int:
    return sum(len(ranks) * costs[name] for name, ranks in kept.items())


def paired(losses: Sequence[float], others: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """(the mean difference per token of two models' losses on the same rows, its standard error): those of a ratio, for
    rows weigh by their tokens.

    Args:
        losses, others: summed over each row's tokens.
        tokens: of each row.
    """
    differences, weights = np.subtract(losses, others), np.asarray(tokens, dtype=float)
    mean = differences.sum() / weights.sum()
    count = len(weights)
    if count < 2:
        return float(mean), math.inf
    spread = np.square(differences - mean * weights).sum() * count / (count - 1)
    return float(mean), float(np.sqrt(spread) / weights.sum())


def shrunk(shares: PerRank, stderr: PerRank, values: PerRank) -> PerRank:
    """Shares drawn towards what singular values say of them, each by how little its rows say (empirical Bayes).

    A rank of value v is taken to have the share m = c v², give or take a part τ of that. c is the least-squares fit to
    the shares by their standard errors, and τ² what their scatter about it shows beyond these errors. With every share
    known for certain the shares stay; with none known the singular values decide.

    Args:
        shares, stderr: module → of each rank, see `Shares`.
        values: module → singular value of each rank.
    """
    flat = [np.concatenate([np.asarray(of[name], dtype=float) for name in shares]) for of in (shares, stderr, values)]
    share, error, energy = flat[0], flat[1], np.square(flat[2])
    noise = np.square(error) + np.square(1e-6 * np.abs(share).max()) + np.finfo(float).tiny
    slope = float((share * energy / noise).sum() / max((energy * energy / noise).sum(), np.finfo(float).tiny))
    if slope <= 0:  # large ranks hurt: their size says nothing of what they are worth
        return shares
    expected = slope * energy
    reach = np.square(expected).clip(np.finfo(float).tiny)
    weight = np.square(reach / (reach + noise))  # ranks of which the rows say something
    scatter = (weight * (np.square(share - expected) - noise) / reach).sum()
    prior = max(0.0, float(scatter / weight.sum())) * reach
    found = iter(((prior * share + noise * expected) / (prior + noise)).tolist())
    return {name: [next(found) for _ in of] for name, of in shares.items()}


def enough_rows(tokens: Sequence[int]) -> int:
    """How many of the first rows decide a cut: enough to score and to judge, by supervised tokens of each row."""
    count = total = 0
    for of_row in tokens[:MOST_ROWS]:
        if count >= ROWS and total >= 2 * SCORING_TOKENS:
            break
        count, total = count + 1, total + of_row
    return count


def scoring_rows(tokens: Sequence[int], *, least: int = SCORING_TOKENS, seed: int = 0) -> tuple[list[int], list[int]]:
    """Rows that score, and rows that judge the cuts: random rows until they have `least` supervised tokens, at most
    half; and all others.

    Args:
        tokens: supervised ones of each row; at least two rows.
    """
    order = list(range(len(tokens)))
    random.Random(seed).shuffle(order)
    count = total = 0
    while count < len(order) // 2 and total < least:
        total += tokens[order[count]]
        count += 1
    return sorted(order[:count]), sorted(order[count:])

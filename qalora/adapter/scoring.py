"""AB-LoRA: the importance of every rank (arXiv 2403.16187, §3.3, eq. 6).

With L the mean cross-entropy on one fixed validation batch, M the adapted model, M∖r without rank r and M_r with
nothing but rank r:

    drop(r)  = L(M∖r) − L(M)          how much worse without it
    alone(r) = L(base) − L(M_r)       how much better than the base alone
    IS(r)    = drop(r) + alone(r)     eq. 6 up to a constant
    path(r)  = −∫₀¹ ∂L/∂α_r dt        with every gate at t: the rank's share of what the adapter achieved

`drop` and `alone` are the end points of `path`, whose sum over the ranks is L(base) − L(M) (Aumann-Shapley along the
diagonal; Integrated Gradients, arXiv 1703.01365).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qalora.adapter.ablation import MicroBatch, Rank, ablate, gate_gradients, scoring_mode, supervised_tokens
from qalora.adapter.allocation import undecided
from qalora.adapter.model import gated_layers

Method = Literal["exact", "first-order", "certified", "path"]
Importance = Literal["sum", "drop", "alone", "path"]
PerRank = dict[str, list[float]]

PATH_POINTS = (4, 8, 16)  # K of the Gauss-Legendre rule, raised until the sum is within PATH_ERROR of L(base) − L(M)
PATH_ERROR = 0.01
SAMPLE = 24  # ranks ablated at random, from which the residual of first order is read
MARGIN = 1.5  # the band over the largest residual that was seen
NOISE_RANKS, NOISE_STEP = 6, 1 / 16
FIRST_ORDER = 2 * 3.0  # forwards of first order: two passes of a forward and a backward
MIDPOINT = 3.0  # of the midpoint rule: one such pass
LEAST_CERTIFIED = 2 * (2 + NOISE_RANKS + SAMPLE)  # forwards below which certified scoring could ablate only its sample
BUDGET = 0.04  # forwards of a certified scoring, as a share of the naive loop's 1 + 2R


@dataclass(frozen=True)
class Residual:
    """How far first order is from exact ablation, in nats, over the ranks that were ablated.

    Attributes:
        band: what no residual of a rank that was not ablated is taken to exceed.
        noise: rounding noise of one exact evaluation, root mean square.
        dtype: what the exact evaluations were computed in.
    """

    std: float
    largest: float
    band: float
    noise: float
    dtype: str


@dataclass(frozen=True)
class RankScores:
    """Scores in nats a supervised token; module → one value a rank, in the order of the rows of A.

    Attributes:
        loss: of the adapted model; base_loss: of the base alone.
        importance: what decides.
        stderr: standard error of the importance over the rows of B_val; None where ablation alone gave it.
        exact: ablated, not estimated.
        forward_equivalents: cost in forwards of the batch; a backward (with its recomputation) counts as two.
        certified: the pruned set is that of exhaustive ablation.
        residual: what a certified scoring rests on.
    """

    method: Method
    rows: int
    supervised_tokens: int
    loss: float
    base_loss: float
    drop: PerRank
    alone: PerRank
    importance: PerRank
    stderr: PerRank | None
    exact: dict[str, list[bool]]
    forward_equivalents: float
    certified: bool
    residual: Residual | None = None

    @property
    def exact_evaluations(self) -> int:
        return sum(map(sum, self.exact.values()))


def score_ranks(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    method: Method = "first-order",
    *,
    importance: Importance = "sum",
    prune: int | None = None,
    min_rank: int = 0,
    memory: int = 0,
    budget: float | None = None,
    seed: int = 0,
) -> RankScores:
    """Scores every rank of the adapter on the batch, given as micro-batches; the model is left as it was.

    Args:
        importance: what decides; path goes with the method path, and with no other.
        prune: ranks that will go: the threshold that `certified` settles (default: one a module).
        min_rank: ranks that every module keeps.
        memory: bytes that stacked variants may hold, see `ablate`.
        budget: of `certified`, in forwards of the batch beyond first order's (default: 4 % of the naive loop's).

    Raises:
        ValueError: path where another method is asked for, or the other way round.
    """
    if (importance == "path") != (method == "path"):
        raise ValueError(f"method {method!r} does not give the importance {importance!r}")
    with scoring_mode(model):
        if method == "exact":
            return _exact(model, batch, importance, memory)
        if method == "path":
            return _path(model, batch)
        estimate = _first_order(model, batch, importance)
        if method == "first-order":
            return estimate
        every = sum(map(len, estimate.drop.values()))
        left = BUDGET * (1 + 2 * every) - estimate.forward_equivalents if budget is None else budget
        return _certified(model, batch, estimate, importance, prune or len(estimate.drop), min_rank, memory, left, seed)


def midpoint_shares(model: PeftModel, batch: Sequence[MicroBatch]) -> PerRank:
    """path(r) by the midpoint rule, −∂L/∂α_r with every gate at ½: half of first order's time.

    It is exact while the loss is quadratic in the gates: for ranks that correct a quantization error, which move it little.
    """
    with scoring_mode(model):
        _, gradients, tokens = gate_gradients(model, batch, 0.5, by_row=False)
    return _mean(gradients, tokens)


# ------------------------------------------------------------------------------------------------------------ engines


def _exact(model: PeftModel, batch: Sequence[MicroBatch], importance: Importance, memory: int) -> RankScores:
    sizes = {name: len(layer.A) for name, layer in gated_layers(model).items()}
    every = [(name, rank) for name, size in sizes.items() for rank in range(size)]
    found = ablate(model, batch, every, dtype=torch.float32, memory=memory)  # 16 bits would round small scores away
    drop = {name: [found.drop[name, rank] for rank in range(size)] for name, size in sizes.items()}
    alone = {name: [found.alone[name, rank] for rank in range(size)] for name, size in sizes.items()}
    return RankScores(
        method="exact",
        **_size(batch),
        loss=found.loss,
        base_loss=found.base_loss,
        drop=drop,
        alone=alone,
        importance=_decides(importance, drop, alone),
        stderr=None,
        exact={name: [True] * size for name, size in sizes.items()},
        forward_equivalents=found.forward_equivalents,
        certified=True,
    )


def _first_order(model: PeftModel, batch: Sequence[MicroBatch], importance: Importance) -> RankScores:
    """L is linear in one gate to first order: drop ≈ −∂L/∂α at α = 1, alone ≈ −∂L/∂α at α = 0."""
    loss, at_one, tokens = gate_gradients(model, batch, 1.0)
    base_loss, at_zero, _ = gate_gradients(model, batch, 0.0)
    drop, alone = _mean(at_one, tokens), _mean(at_zero, tokens)
    rows = {"drop": at_one, "alone": at_zero, "sum": {name: at_one[name] + at_zero[name] for name in at_one}}
    return RankScores(
        method="first-order",
        **_size(batch),
        loss=loss,
        base_loss=base_loss,
        drop=drop,
        alone=alone,
        importance=_decides(importance, drop, alone),
        stderr=_stderr(rows[importance], tokens),
        exact={name: [False] * len(scores) for name, scores in drop.items()},
        forward_equivalents=FIRST_ORDER,
        certified=False,
    )


def _path(model: PeftModel, batch: Sequence[MicroBatch]) -> RankScores:
    """Gauss-Legendre along the diagonal, with more points until the shares add up; and first order at its two ends."""
    ends = _first_order(model, batch, "sum")
    achieved, spent = ends.base_loss - ends.loss, ends.forward_equivalents
    for count in PATH_POINTS:
        points, weights = np.polynomial.legendre.leggauss(count)
        rows: dict[str, Tensor] = {}
        tokens = torch.empty(0)
        for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
            _, gradients, tokens = gate_gradients(model, batch, float(point))
            rows = {name: rows.get(name, 0.0) + float(weight) * gradient for name, gradient in gradients.items()}
        shares = _mean(rows, tokens)
        spent += 3.0 * count
        if abs(sum(map(sum, shares.values())) - achieved) <= PATH_ERROR * abs(achieved):
            break
    return replace(ends, method="path", importance=shares, stderr=_stderr(rows, tokens), forward_equivalents=spent)


def _certified(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    estimate: RankScores,
    importance: Importance,
    prune: int,
    min_rank: int,
    memory: int,
    budget: float,
    seed: int,
) -> RankScores:
    """First order for all; exact for a random sample, whose residuals give the band, and then for every rank whose
    estimate, give or take the band, could fall on the other side of the threshold.

    The band widens with every residual seen. Where exact evaluations are rounded more than first order errs, they are
    computed in fp32 over the same weights.
    """
    ranks = [(name, rank) for name, scores in estimate.drop.items() for rank in range(len(scores))]
    draw = random.Random(seed)
    dtype = cast(PreTrainedModel, model.get_base_model()).dtype
    spent = 0.0

    noise, cost = _noise(model, batch, estimate, draw.sample(ranks, min(NOISE_RANKS, len(ranks))), dtype, memory)
    spent += cost
    drop, alone = ({name: list(scores) for name, scores in kind.items()} for kind in (estimate.drop, estimate.alone))
    exact = {name: [False] * len(scores) for name, scores in drop.items()}
    residuals: dict[Rank, float] = {}

    def evaluate(chosen: Sequence[Rank]) -> float:
        found = ablate(model, batch, chosen, dtype=dtype, memory=memory)
        for rank in chosen:
            name, index = rank
            drop[name][index], alone[name][index], exact[name][index] = found.drop[rank], found.alone[rank], True
            value = _decides(importance, {name: [found.drop[rank]]}, {name: [found.alone[rank]]})[name][0]
            residuals[rank] = value - estimate.importance[name][index]
        return found.forward_equivalents

    sample = draw.sample(ranks, min(SAMPLE, len(ranks)))
    spent += evaluate(sample)
    if dtype != torch.float32 and noise > 0.25 * _rms(residuals.values()):
        dtype = torch.float32
        again, cost = _noise(model, batch, estimate, sample[:NOISE_RANKS], dtype, memory)
        noise, spent = again, spent + cost + evaluate(sample)

    while True:
        band = MARGIN * max(map(abs, residuals.values()))
        now = _decides(importance, drop, alone)
        low, high = (
            {
                name: [
                    value + (0.0 if known else sign * band) for value, known in zip(now[name], exact[name], strict=True)
                ]
                for name in now
            }
            for sign in (-1, 1)
        )
        open_ranks = undecided(now, low, high, prune, min_rank)
        todo = [rank for rank in open_ranks if not exact[rank[0]][rank[1]]]
        affordable = int((budget - spent - 2) / 2)  # a rank costs two forwards at most
        if not todo or affordable < 1:
            break
        spent += evaluate(todo[:affordable])
    return replace(
        estimate,
        method="certified",
        drop=drop,
        alone=alone,
        importance=now,
        exact=exact,
        forward_equivalents=estimate.forward_equivalents + spent,
        certified=not open_ranks,
        residual=Residual(
            _rms(residuals.values()), max(map(abs, residuals.values())), band, noise, str(dtype).removeprefix("torch.")
        ),
    )


def _noise(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    estimate: RankScores,
    ranks: Sequence[Rank],
    dtype: torch.dtype,
    memory: int,
) -> tuple[float, float]:
    """(rounding noise of one exact evaluation, forwards that it took): what closing a gate by a sixteenth changes the
    loss beyond the gradient's sixteenth. Curvature is in it by its 256th part only; rounding is in it whole."""
    found = ablate(model, batch, ranks, dtype=dtype, memory=memory, gate=1 - NOISE_STEP)
    errors = [found.drop[rank] - NOISE_STEP * estimate.drop[rank[0]][rank[1]] for rank in ranks]
    errors += [found.alone[rank] - NOISE_STEP * estimate.alone[rank[0]][rank[1]] for rank in ranks]
    return _rms(errors), found.forward_equivalents


# ------------------------------------------------------------------------------------------------------------ small parts


def _decides(importance: Importance, drop: PerRank, alone: PerRank) -> PerRank:
    if importance == "drop":
        return drop
    if importance == "alone":
        return alone
    return {name: [d + a for d, a in zip(drop[name], alone[name], strict=True)] for name in drop}


def _mean(rows: Mapping[str, Tensor], tokens: Tensor) -> PerRank:
    """Gradients of the rows' losses → importance over all their tokens."""
    return {name: (-gradient.sum(0) / tokens.sum()).tolist() for name, gradient in rows.items()}


def _stderr(rows: Mapping[str, Tensor], tokens: Tensor) -> PerRank | None:
    """Standard error of the importance over the rows: that of a ratio, for rows weigh by their tokens."""
    count = len(tokens)
    if count < 2:
        return None
    share = (tokens / tokens.sum())[:, None]
    return {
        name: ((gradient - gradient.sum(0) * share).square().sum(0) * count / (count - 1))
        .sqrt()
        .div(tokens.sum())
        .tolist()
        for name, gradient in rows.items()
    }


def _rms(values: Iterable[float]) -> float:
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares))


def _size(batch: Sequence[MicroBatch]) -> dict[str, Any]:
    return {
        "rows": sum(len(micro["labels"]) for micro in batch),
        "supervised_tokens": supervised_tokens(batch),
    }

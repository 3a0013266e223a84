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

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from qalora.adapter.ablation import MicroBatch, ablate, gate_gradients, scoring_mode
from qalora.adapter.certified import DTYPE, certify
from qalora.adapter.model import gated_layers
from qalora.adapter.scores import Importance, Method, PerRank, RankScores, Shares, check_finite, decides
from qalora.data.rows import supervised_tokens

PATH_POINTS = (4, 8, 16)  # K of the Gauss-Legendre rule, raised until the sum is within PATH_ERROR of L(base) − L(M)
PATH_ERROR = 0.01
FIRST_ORDER = 2 * 3.0  # forwards of first order: two passes of a forward and a backward
MIDPOINT = 3.0  # of the midpoint rule: one such pass
BUDGET = 0.06  # forwards of a certified scoring, as a share of the naive loop's 1 + 2R


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
        budget: of `certified`, in forwards of the batch beyond first order's (default: 6 % of the naive loop's).

    Raises:
        ValueError: path where another method is asked for, or the other way round.
        AnswerNo: a loss or a score is not finite.
    """
    if (importance == "path") != (method == "path"):
        raise ValueError(f"method {method!r} does not give the importance {importance!r}")
    with scoring_mode(model):
        if method == "exact":
            return _exact(model, batch, importance, memory).checked()
        if method == "path":
            return _path(model, batch).checked()
        estimate = _first_order(model, batch, importance).checked()
        if method == "first-order":
            return estimate
        every = sum(map(len, estimate.drop.values()))
        return certify(
            model,
            batch,
            estimate,
            importance,
            prune=len(estimate.drop) if prune is None else prune,
            min_rank=min_rank,
            memory=memory,
            budget=BUDGET * (1 + 2 * every) - estimate.forward_equivalents if budget is None else budget,
            seed=seed,
        ).checked()


def midpoint_shares(model: PeftModel, batch: Sequence[MicroBatch]) -> PerRank:
    """path(r) by the midpoint rule, −∂L/∂α_r with every gate at ½: half of first order's time.

    It is exact while the loss is quadratic in the gates: for ranks that correct a quantization error, which move it
    little.

    Raises:
        AnswerNo: the loss or a share is not finite.
    """
    with scoring_mode(model):
        loss, gradients, tokens = gate_gradients(model, batch, 0.5, by_row=False)
    shares = _mean(gradients, tokens)
    check_finite(shares, loss)
    return shares


def path_shares(model: PeftModel, batch: Sequence[MicroBatch], points: int = PATH_POINTS[0]) -> Shares:
    """path(r) by the Gauss-Legendre rule, without first order's two ends: three forwards of the batch per point.

    Raises:
        AnswerNo: a share is not finite.
    """
    with scoring_mode(model):
        rows, tokens = _along_path(model, batch, points)
    shares = Shares(_mean(rows, tokens), _stderr(rows, tokens))
    check_finite(shares.importance)
    return shares


# ------------------------------------------------------------------------------------------------------------ engines


def _exact(model: PeftModel, batch: Sequence[MicroBatch], importance: Importance, memory: int) -> RankScores:
    sizes = {name: len(layer.A) for name, layer in gated_layers(model).items()}
    every = [(name, rank) for name, size in sizes.items() for rank in range(size)]
    found = ablate(model, batch, every, dtype=DTYPE, memory=memory)
    drop = {name: [found.drop[name, rank] for rank in range(size)] for name, size in sizes.items()}
    alone = {name: [found.alone[name, rank] for rank in range(size)] for name, size in sizes.items()}
    return RankScores(
        method="exact",
        **_size(batch),
        loss=found.loss,
        base_loss=found.base_loss,
        drop=drop,
        alone=alone,
        importance=decides(importance, drop, alone),
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
        importance=decides(importance, drop, alone),
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
        rows, tokens = _along_path(model, batch, count)
        shares = _mean(rows, tokens)
        spent += 3.0 * count
        if abs(sum(map(sum, shares.values())) - achieved) <= PATH_ERROR * abs(achieved):
            break
    return replace(ends, method="path", importance=shares, stderr=_stderr(rows, tokens), forward_equivalents=spent)


def _along_path(model: PeftModel, batch: Sequence[MicroBatch], count: int) -> tuple[dict[str, Tensor], Tensor]:
    """(∫ ∂/∂α of every row's loss, with all gates at t from 0 to 1, by `count` points; the rows' supervised tokens)."""
    points, weights = np.polynomial.legendre.leggauss(count)
    rows: dict[str, Tensor] = {}
    tokens = torch.empty(0)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        _, gradients, tokens = gate_gradients(model, batch, float(point))
        rows = {name: rows.get(name, 0.0) + float(weight) * gradient for name, gradient in gradients.items()}
    return rows, tokens


# ---------------------------------------------------------------------------------------------------------- small parts


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


def _size(batch: Sequence[MicroBatch]) -> dict[str, Any]:
    return {
        "rows": sum(len(micro["labels"]) for micro in batch),
        "supervised_tokens": supervised_tokens(micro["labels"] for micro in batch),
    }

"""First order for every rank, exact ablation where that leaves a doubt about which ranks go.

    estimate      ──────┬───────────┬────────────┬────→ importance       a band around each estimate; an exact value has
                     [──┼──]     [──┼──]      [──┼──]                    its rounding noise alone
                                  threshold

The band of a rank is what its residual, exact − first order, is taken not to exceed. Residuals grow with what a rank
does: they are of second order in it. So each is measured in the rank's own scale, and the band is a multiple of the
largest that was seen, in that scale. The residuals seen are those of a random sample, of the ranks that do most, and of
every rank ablated since. No sample proves a bound for the ranks outside it; how much it says is a tolerance limit
(Wilks 1941): with n drawn at random, the share of ranks beyond the largest of them is at most 1 − 0.05^(1/n), with 95 %
confidence.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TypeVar

import torch
from peft import PeftModel

from qalora.adapter.ablation import MicroBatch, Rank, ablate
from qalora.adapter.allocation import undecided
from qalora.adapter.model import gated_layers
from qalora.adapter.scores import Importance, PerRank, RankScores, Residual, decides

T = TypeVar("T")

SAMPLE = 24  # ranks ablated at random
LARGEST = 8  # ranks ablated because their estimates are the largest
MARGIN = 2.0  # the band over the largest residual that was seen
NOISE_RANKS, NOISE_STEP = 6, 1 / 256
NOISES = 4.0  # root mean squares of rounding within which exact values may lie
UNSURE = 0.05  # one minus the confidence of `Residual.missed`
LEAST_CERTIFIED = 2 * (2 + NOISE_RANKS + SAMPLE + LARGEST)  # forwards below which it could ablate no rank in doubt
DTYPE = torch.float32  # one rank changes the loss by less than 16 bits round


def certify(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    estimate: RankScores,
    importance: Importance,
    *,
    prune: int,
    min_rank: int,
    memory: int,
    budget: float,
    seed: int,
) -> RankScores:
    """Ablates a random sample, the ranks with the largest estimates, and then whatever could fall on the other side of
    the threshold, give or take its band, until no rank could or the budget is spent.

    Args:
        estimate: first order's scores.
        prune, min_rank: the threshold to settle, see `least_important`.
        budget: forwards of the batch to spend; what is drawn at the beginning is ablated in any case.
    """
    names = [(name, rank) for name, scores in estimate.drop.items() for rank in range(len(scores))]
    draw = random.Random(seed)
    noise, spent = _noise(model, batch, estimate, draw.sample(names, min(NOISE_RANKS, len(names))), memory)
    sample = draw.sample(names, min(SAMPLE, len(names)))
    largest = sorted(names, key=lambda rank: -abs(_of(estimate.importance, rank)))[:LARGEST]

    scale = _scales(model, estimate)
    drop, alone = ({name: list(scores) for name, scores in kind.items()} for kind in (estimate.drop, estimate.alone))
    exact = {name: [False] * len(scores) for name, scores in drop.items()}
    residuals: dict[Rank, float] = {}
    rounding = NOISES * noise * (math.sqrt(2) if importance == "sum" else 1.0)
    todo = [*sample, *(rank for rank in largest if rank not in sample)]
    while True:
        found = ablate(model, batch, todo, dtype=DTYPE, memory=memory)
        spent += found.forward_equivalents
        for name, index in todo:
            drop[name][index], alone[name][index] = found.drop[name, index], found.alone[name, index]
            exact[name][index] = True
        now = decides(importance, drop, alone)
        residuals |= {rank: _of(now, rank) - _of(estimate.importance, rank) for rank in todo}
        factor = MARGIN * max(abs(residual) / _of(scale, rank) for rank, residual in residuals.items())
        low, high = (
            {
                name: [
                    value + sign * (rounding if exact[name][index] else factor * scale[name][index])
                    for index, value in enumerate(values)
                ]
                for name, values in now.items()
            }
            for sign in (-1, 1)
        )
        crossing = undecided(now, low, high, prune, min_rank)
        in_doubt = [rank for rank in crossing if not _of(exact, rank)]
        affordable = int((budget - spent - 2) / 2)  # a rank costs two forwards at most
        if not in_doubt or affordable < 1:
            break
        todo = in_doubt[:affordable]
    drawn = [residuals[rank] for rank in sample]
    return replace(
        estimate,
        method="certified",
        drop=drop,
        alone=alone,
        importance=now,
        exact=exact,
        forward_equivalents=estimate.forward_equivalents + spent,
        certified=not in_doubt,
        residual=Residual(
            std=_rms(drawn),
            largest=max(map(abs, drawn)),
            drawn=len(drawn),
            band=factor * median(value for values in scale.values() for value in values),
            missed=1 - UNSURE ** (1 / len(drawn)) if len(residuals) < len(names) else 0.0,
            noise=noise,
            tied=len(crossing) - len(in_doubt),
            dtype=str(DTYPE).removeprefix("torch."),
        ),
    )


def _scales(model: PeftModel, estimate: RankScores) -> PerRank:
    """How far first order may err on a rank, compared with the others. Residuals are of second order, so by the square
    of how much the rank seems to matter, and of its size s ‖A_k‖ ‖B_k‖, which does not cancel where slopes do."""
    matters = {
        name: [abs(d) + abs(a) for d, a in zip(estimate.drop[name], estimate.alone[name], strict=True)]
        for name in estimate.drop
    }
    layers = gated_layers(model)
    sizes = {
        name: (layers[name].s * layers[name].A.detach().norm(dim=1) * layers[name].B.detach().norm(dim=0)).tolist()
        for name in matters
    }
    usual, size = _median(matters), _median(sizes)
    return {
        name: [1 + (m / usual) ** 2 + (own / size) ** 2 for m, own in zip(matters[name], sizes[name], strict=True)]
        for name in matters
    }


def _noise(
    model: PeftModel, batch: Sequence[MicroBatch], estimate: RankScores, ranks: Sequence[Rank], memory: int
) -> tuple[float, float]:
    """(rounding noise of one exact evaluation, forwards that it took): what closing a gate by a 256th changes the loss
    beyond the gradient's 256th. Curvature is in it by its 65,536th part only; rounding is in it whole. By the median,
    so that one rank of great curvature does not pass for noise."""
    found = ablate(model, batch, ranks, dtype=DTYPE, memory=memory, gate=1 - NOISE_STEP)
    errors = [found.drop[rank] - NOISE_STEP * _of(estimate.drop, rank) for rank in ranks]
    errors += [found.alone[rank] - NOISE_STEP * _of(estimate.alone, rank) for rank in ranks]
    return median(map(abs, errors)) / 0.6745, found.forward_equivalents  # of a normal error, its standard deviation


def _of(values: Mapping[str, Sequence[T]], rank: Rank) -> T:
    name, index = rank
    return values[name][index]


def _median(values: PerRank) -> float:
    """Of all ranks; never zero."""
    return median(value for of in values.values() for value in of) or 1.0


def _rms(values: Iterable[float]) -> float:
    squares = [value * value for value in values]
    return math.sqrt(sum(squares) / len(squares))

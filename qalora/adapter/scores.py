"""What scoring finds: values of every rank, what they cost, and what a certificate rests on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qalora.errors import AnswerNo

Method = Literal["exact", "first-order", "certified", "path"]
Importance = Literal["sum", "drop", "alone", "path"]
PerRank = dict[str, list[float]]


@dataclass(frozen=True)
class Residual:
    """How far first order is from exact ablation, in nats, and what that says of the ranks that were not ablated.

    Attributes:
        std, largest: root mean square and largest, over the ranks that were drawn at random.
        drawn: how many those are.
        band: what the residual of a rank of median scale is taken not to exceed; of others, in proportion to their
            scale.
        missed: the share of the ranks not ablated that err by more than their band is at most this, with 95 %
            confidence.
        noise: rounding noise of one exact evaluation, root mean square.
        tied: ablated ranks that could change sides by that noise alone.
        dtype: what the exact evaluations were computed in.
    """

    std: float
    largest: float
    drawn: int
    band: float
    missed: float
    noise: float
    tied: int
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
        certified: the pruned set is that of exhaustive ablation: every rank was ablated, or none of the others can
            change sides while first order errs by no more than their bands, which `residual` says how far to trust.
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

    def checked(self) -> RankScores:
        """Itself.

        Raises:
            AnswerNo: a loss or a score is not finite.
        """
        check_finite(self.importance, self.loss, self.base_loss)
        return self


@dataclass(frozen=True)
class Shares:
    """One importance of every rank, in nats a supervised token, and its standard error over the rows (None of one
    row)."""

    importance: PerRank
    stderr: PerRank | None


def check_finite(importance: PerRank, *losses: float) -> None:
    """
    Raises:
        AnswerNo: a score or a loss is not finite.
    """
    odd = [(name, rank) for name, of in importance.items() for rank, value in enumerate(of) if not math.isfinite(value)]
    if not odd and all(map(math.isfinite, losses)):
        return
    what = f"the score of rank {odd[0][1]} of {odd[0][0]}" if odd else "the loss on the rows that score"
    raise AnswerNo(
        f"{what} is not finite, so ranks cannot be ordered: the adapter has diverged (take an earlier checkpoint, or "
        "lower training.learning_rate), or float16 overflows (compute in bfloat16 or float32)."
    )


def decides(importance: Importance, drop: PerRank, alone: PerRank) -> PerRank:
    """What orders the ranks, of their drop and alone."""
    if importance == "drop":
        return drop
    if importance == "alone":
        return alone
    return {name: [d + a for d, a in zip(drop[name], alone[name], strict=True)] for name in drop}

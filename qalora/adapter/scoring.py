"""AB-LoRA: the importance of every rank (arXiv 2403.16187, §3.3, eq. 6).

With L the mean cross-entropy on one fixed validation batch, M the adapted model, M∖r without rank r and M_r with
nothing but rank r:

    drop(r)  = L(M∖r) − L(M)          how much worse without it
    alone(r) = L(base) − L(M_r)       how much better than the base alone
    IS(r)    = drop(r) + alone(r)     eq. 6 up to a constant
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from peft import PeftModel

from qalora.adapter.ablation import (
    MicroBatch,
    gated,
    loss_alone,
    loss_and_gate_gradients,
    loss_without,
    mean_loss,
    scoring_mode,
    supervised_tokens,
    uniform_gates,
)
from qalora.adapter.model import gated_layers

Method = Literal["first-order", "exact"]
Importance = Literal["sum", "drop", "alone"]


@dataclass(frozen=True)
class RankScores:
    """Scores in nats a supervised token; module → one value a rank, in the order of the rows of A.

    Attributes:
        loss: of the adapted model; base_loss: of the base alone.
        forward_equivalents: cost in forwards of the batch; a backward (with its recomputation) counts as two.
    """

    method: Method
    rows: int
    supervised_tokens: int
    loss: float
    base_loss: float
    drop: dict[str, list[float]]
    alone: dict[str, list[float]]
    forward_equivalents: float

    def importance(self, kind: Importance = "sum") -> dict[str, list[float]]:
        if kind == "drop":
            return self.drop
        if kind == "alone":
            return self.alone
        return {name: [d + a for d, a in zip(self.drop[name], self.alone[name], strict=True)] for name in self.drop}


def score_ranks(model: PeftModel, batch: Sequence[MicroBatch], method: Method = "first-order") -> RankScores:
    """Scores every rank of the adapter on the batch, given as micro-batches; the model is left as it was."""
    score = {"first-order": _first_order, "exact": _exact}[method]
    with scoring_mode(model):
        loss, base_loss, drop, alone, cost = score(model, batch)
    rows = sum(len(micro["labels"]) for micro in batch)
    return RankScores(method, rows, supervised_tokens(batch), loss, base_loss, drop, alone, cost)


_Scores = tuple[float, float, dict[str, list[float]], dict[str, list[float]], float]


def _first_order(model: PeftModel, batch: Sequence[MicroBatch]) -> _Scores:
    """L is linear in one gate to first order: drop ≈ −∂L/∂α at α = 1, alone ≈ −∂L/∂α at α = 0."""
    loss, at_one = loss_and_gate_gradients(model, batch, 1.0)
    base_loss, at_zero = loss_and_gate_gradients(model, batch, 0.0)
    drop = {name: (-gradient).tolist() for name, gradient in at_one.items()}
    alone = {name: (-gradient).tolist() for name, gradient in at_zero.items()}
    return loss, base_loss, drop, alone, 2 * 3.0


def _exact(model: PeftModel, batch: Sequence[MicroBatch]) -> _Scores:
    layers = gated_layers(model)
    loss = mean_loss(model, batch)
    with gated(layers, uniform_gates(layers, 0.0)):
        base_loss = mean_loss(model, batch)
    ranks = {name: range(len(layer.A)) for name, layer in layers.items()}
    drop = {name: [loss_without(model, batch, name, r) - loss for r in ranks[name]] for name in layers}
    alone = {name: [base_loss - loss_alone(model, batch, name, r) for r in ranks[name]] for name in layers}
    return loss, base_loss, drop, alone, 2.0 + 2.0 * sum(len(r) for r in ranks.values())

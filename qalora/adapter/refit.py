"""What is left of an adapter after a cut, corrected for what has left.

reweighting   of each rank that stays, the weight that one Newton step gives its gate: 1 − t · Σ g / Σ g², of the
              gradients g of the rows' losses (their squares stand for the curvature). What the rows do not tell from
              noise is left out, and t is the best of a few.
training      some steps of AdamW at the small size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from qalora.adapter.ablation import MicroBatch, gate_gradients, scoring_mode
from qalora.adapter.compression import Kept
from qalora.adapter.cutting import Losses, gates_of, losses
from qalora.adapter.model import gated_layers
from qalora.adapter.scores import PerRank
from qalora.data.rows import supervised_tokens
from qalora.kernels.loss import row_losses
from qalora.progress import track

LEARNING_RATE = 1e-3  # of the steps
STEP_SIZES = (0.03, 0.1, 0.3, 1.0)  # of the Newton step
WEIGHTS = (0.1, 2.0)  # as far as it may go: no rank leaves by its weight


def reweighted(model: PeftModel, batch: Sequence[MicroBatch], ranks: Kept) -> PerRank:
    """Module → the weights of its ranks that stay; the model is left as it is.

    Args:
        batch: rows that say by how much.
    """
    with scoring_mode(model):
        _, gradients, _ = gate_gradients(model, batch, gates_of(model, ranks))
    changes = {name: _change(gradients[name][:, own]) for name, own in ranks.items()}

    def at(size: float) -> PerRank:
        return {name: (1 + size * change).clamp(*WEIGHTS).tolist() for name, change in changes.items()}

    found = {size: losses(model, batch, ranks, at(size)).mean for size in (0.0, *STEP_SIZES)}
    return at(min(found, key=lambda size: found[size]))


def _change(rows: Tensor) -> Tensor:
    """−Σ g / Σ g² of each rank, less where the rows disagree.

    Args:
        rows: (rows, r) gradients of the rows' losses by the gates.
    """
    total, squares = rows.sum(0), rows.square().sum(0).clamp(min=torch.finfo(rows.dtype).tiny)
    sure = (1 - squares / total.square().clamp(min=torch.finfo(rows.dtype).tiny)).clamp(min=0)
    return -sure * total / squares


@dataclass(frozen=True)
class Training:
    """Attributes: before, after: losses of the cut adapter on the rows that judge, without the steps and with them."""

    before: Losses
    after: Losses

    @property
    def helped(self) -> bool:
        """Whether the loss is lower with it, so it stayed."""
        return self.after.mean < self.before.mean


def train_where_it_helps(
    model: PeftModel, scoring: Sequence[MicroBatch], judging: Sequence[MicroBatch], steps: int
) -> Training:
    """Trains a cut adapter for some steps; where they do not help, they are taken back.

    Args:
        scoring: rows that train it.
        judging: other rows, that say whether it helps.
    """
    layers = gated_layers(model)
    own = {name: (layer.A.data.clone(), layer.B.data.clone()) for name, layer in layers.items()}
    before = losses(model, judging)
    train_steps(model, scoring, steps)
    found = Training(before, losses(model, judging))
    if not found.helped:
        for name, (A, B) in own.items():
            layers[name].A.data, layers[name].B.data = A, B
    return found


def train_steps(model: PeftModel, batch: Sequence[MicroBatch], steps: int, rate: float = LEARNING_RATE) -> None:
    """Trains the adapter for some steps of AdamW, each on one micro-batch, at a rate that falls to 0.

    Args:
        batch: micro-batches, which take turns in a random order, for they are sorted by length.
    """
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0)).tolist()
    trained = [parameter for layer in gated_layers(model).values() for parameter in (layer.A, layer.B)]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    with scoring_mode(model), torch.enable_grad():
        for parameter in trained:
            parameter.requires_grad_(True)
        for step in track(range(steps), "refitting"):
            micro = batch[order[step % len(batch)]]
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            loss = row_losses(model, micro).sum() / supervised_tokens([micro["labels"]])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

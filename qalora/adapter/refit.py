"""What is left of an adapter after a cut, corrected for what has left.

least squares   of a module whose ranks K stay, the B* that comes closest to the outputs of all its ranks, in the
                mean square over inputs x: B* = B G[:, K] G[K, K]⁻¹ with G = mean (A x)(A x)ᵀ. In the basis `svd-act`
                G is diagonal, and B* = B.
reweighting     of each rank that stays, the weight that one Newton step gives its gate: 1 − t · Σ g / Σ g², of the
                gradients g of the rows' losses (their squares stand for the curvature). What the rows do not tell
                from noise is left out, and t is the best of a few.
training        some steps of AdamW at the small size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from qalora.adapter.ablation import MicroBatch, gate_gradients, scoring_mode
from qalora.adapter.compression import Kept
from qalora.adapter.cutting import Losses, cut, losses
from qalora.adapter.model import gated_layers
from qalora.adapter.principal import input_grams
from qalora.data.rows import supervised_tokens
from qalora.kernels.loss import row_losses
from qalora.progress import track

LEARNING_RATE = 1e-3  # of the steps
STEP_SIZES = (0.03, 0.1, 0.3, 1.0)  # of the Newton step


Correction = dict[str, Tensor]  # module → its B


@dataclass(frozen=True)
class Refit:
    """
    Attributes:
        how: what corrected best.
        before, after: losses of the cut adapter on the rows that judge, without the correction and with it.
        helped: the loss is lower with it, so it stayed.
    """

    how: str
    before: Losses
    after: Losses

    @property
    def helped(self) -> bool:
        return self.after.mean < self.before.mean


def cut_and_refit(
    model: PeftModel, ranks: Kept, scoring: Sequence[MicroBatch], judging: Sequence[MicroBatch], steps: int | None
) -> Refit:
    """Cuts the adapter to these ranks, and corrects what is left; a correction that does not help is taken back.

    Args:
        scoring: rows that correct.
        judging: other rows, that say whether it helps.
        steps: of training; None: least squares or reweighting, whichever is better.
    """
    fitted = {} if steps is not None else least_squares(model, input_grams(model, scoring), ranks)
    cut(model, ranks)
    layers = gated_layers(model)
    own = {name: (layer.A.data.clone(), layer.B.data.clone()) for name, layer in layers.items()}
    before = losses(model, judging)
    if steps is None:
        tried = {"least squares": fitted, "reweighting": reweighted(model, scoring)}
        found = []
        for how, correction in tried.items():
            put(model, correction)
            found.append(Refit(how, before, losses(model, judging)))
        best = min(found, key=lambda refit: refit.after.mean)
        put(model, tried[best.how])
    else:
        train_steps(model, scoring, steps)
        best = Refit(f"{steps} steps of training", before, losses(model, judging))
    if not best.helped:
        for name, (A, B) in own.items():
            layers[name].A.data, layers[name].B.data = A, B
    return best


def least_squares(model: PeftModel, grams: Mapping[str, Tensor], ranks: Kept) -> Correction:
    """Module → B*, (out, kept), of the ranks that stay; the model is left as it is.

    Args:
        model: with all its ranks.
        grams: of `input_grams`, of the same ranks.
    """
    found = {}
    for name, index in ranks.items():
        layer = gated_layers(model)[name]
        gram = grams[name].to(layer.B.device)
        inverse = torch.linalg.pinv(gram[index][:, index], hermitian=True)
        found[name] = (layer.B.detach().double() @ gram[:, index] @ inverse).to(layer.B)
    return found


def reweighted(model: PeftModel, batch: Sequence[MicroBatch]) -> Correction:
    """Module → its B with every rank reweighted; the model is left as it is.

    Args:
        batch: rows that say by how much.
    """
    with scoring_mode(model):
        _, gradients, _ = gate_gradients(model, batch, 1.0)
    changes = {name: _change(rows) for name, rows in gradients.items()}
    own = {name: layer.B.data.clone() for name, layer in gated_layers(model).items()}

    def at(size: float) -> Correction:
        return {name: own[name] * (1 + size * change).clamp(0, 2).to(own[name]) for name, change in changes.items()}

    found: list[tuple[float, float]] = []
    for size in (0.0, *STEP_SIZES):
        put(model, at(size))
        found.append((losses(model, batch).mean, size))
    put(model, own)
    return at(min(found)[1])


def _change(rows: Tensor) -> Tensor:
    """−Σ g / Σ g² of each rank, less where the rows disagree.

    Args:
        rows: (rows, r) gradients of the rows' losses by the gates.
    """
    total, squares = rows.sum(0), rows.square().sum(0).clamp(min=torch.finfo(rows.dtype).tiny)
    sure = (1 - squares / total.square().clamp(min=torch.finfo(rows.dtype).tiny)).clamp(min=0)
    return -sure * total / squares


def put(model: PeftModel, correction: Correction) -> None:
    """Gives modules the B of a correction."""
    for name, B in correction.items():
        gated_layers(model)[name].B.data.copy_(B)


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

"""What is left of an adapter after a cut, corrected for what has left.

In closed form: of a module whose ranks K stay, the B* that comes closest to the outputs of all its ranks, in the mean
square over inputs x with G = mean (A x)(A x)ᵀ, is

    B* = B G[:, K] G[K, K]⁻¹

(least squares; in the basis `svd-act` G is diagonal, and B* = B). Or by a few steps of training at the small size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from qalora.adapter.ablation import MicroBatch, scoring_mode
from qalora.adapter.compression import Kept
from qalora.adapter.cutting import Losses, cut, losses
from qalora.adapter.model import gated_layers
from qalora.adapter.principal import input_grams
from qalora.data.rows import supervised_tokens
from qalora.kernels.loss import row_losses
from qalora.progress import track

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Refit:
    """
    Attributes:
        before, after: losses of the cut adapter on the rows that judge, without the correction and with it.
        helped: the loss is lower with it, so it stayed.
    """

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
        steps: of training; None: least squares.
    """
    better = least_squares(model, input_grams(model, scoring), ranks) if steps is None else {}
    cut(model, ranks)
    layers = gated_layers(model)
    own = {name: (layer.A.data.clone(), layer.B.data.clone()) for name, layer in layers.items()}
    before = losses(model, judging)
    for name, B in better.items():
        layers[name].B.data.copy_(B)
    if steps is not None:
        train_steps(model, scoring, steps)
    found = Refit(before, losses(model, judging))
    if not found.helped:
        for name, (A, B) in own.items():
            layers[name].A.data, layers[name].B.data = A, B
    return found


def least_squares(model: PeftModel, grams: Mapping[str, Tensor], ranks: Kept) -> dict[str, Tensor]:
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


def train_steps(model: PeftModel, batch: Sequence[MicroBatch], steps: int, rate: float = LEARNING_RATE) -> None:
    """Trains the adapter for some steps of AdamW, each on one micro-batch, at a rate that falls to 0.

    Args:
        batch: micro-batches, which take turns.
    """
    trained = [parameter for layer in gated_layers(model).values() for parameter in (layer.A, layer.B)]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    with scoring_mode(model), torch.enable_grad():
        for parameter in trained:
            parameter.requires_grad_(True)
        for step in track(range(steps), "refitting"):
            micro = batch[step % len(batch)]
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            loss = row_losses(model, micro).sum() / supervised_tokens([micro["labels"]])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

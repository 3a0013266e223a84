"""What is left of an adapter after a cut, trained on for a few steps, so that it makes up for what has left.

The factors stand in their principal basis, where those of a module are of one size. So AdamW's rate, which is how far
it moves an entry in one step, is a share of that size: one rate for adapters of any model, scaling and training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import nn

from qalora.adapter.ablation import MicroBatch, scoring_mode
from qalora.adapter.compression import Kept
from qalora.adapter.cutting import gates_of
from qalora.adapter.layer import Factors, gated, having
from qalora.adapter.model import gated_layers
from qalora.data.rows import supervised_tokens
from qalora.kernels.loss import row_losses
from qalora.progress import track

PASSES = 2  # over the rows that order the ranks
ROWS = 8  # at least, of a step
RATE = 0.05  # of the entries' root mean square; it falls to 0


def refitted(model: PeftModel, batch: Sequence[MicroBatch], ranks: Kept, steps: int | None = None) -> Factors:
    """The factors after some steps of AdamW with these ranks alone; the model is left as it is. Ranks that are to leave
    have the values that they had.

    Args:
        model: its adapter in a principal basis.
        batch: rows that train it.
        steps: None: PASSES over the rows.
    """
    layers = gated_layers(model)
    own = {name: (layer.A.data.clone(), layer.B.data.clone()) for name, layer in layers.items()}
    with having(layers, own), gated(layers, gates_of(model, ranks)):
        _train(model, grouped(batch), steps, RATE * size_of_entries(own, ranks))
    return own


def size_of_entries(factors: Factors, ranks: Kept) -> float:
    """Root mean square of the entries of these ranks."""
    squares = entries = 0.0
    for name, own in ranks.items():
        for part in (factors[name][0][own], factors[name][1][:, own]):
            squares += float(part.double().square().sum())
            entries += part.numel()
    return math.sqrt(squares / entries)


def grouped(batch: Sequence[MicroBatch]) -> list[list[MicroBatch]]:
    """The micro-batches of each step: in a random order, for they are sorted by length, until they have ROWS rows.
    Larger ones are cut, so that steps are as many whatever a forward pass holds."""
    parts = [
        {key: value[row : row + ROWS] for key, value in micro.items()}
        for micro in batch
        for row in range(0, len(micro["labels"]), ROWS)
    ]
    found: list[list[MicroBatch]] = [[]]
    for index in torch.randperm(len(parts), generator=torch.Generator().manual_seed(0)).tolist():
        if sum(len(micro["labels"]) for micro in found[-1]) >= ROWS:
            found.append([])
        found[-1].append(parts[index])
    return found


def _train(model: PeftModel, groups: Sequence[Sequence[MicroBatch]], steps: int | None, rate: float) -> None:
    """Trains the adapter in place, a step on each group in turn; steps: None: PASSES over the groups."""
    steps = PASSES * len(groups) if steps is None else steps
    trained = [parameter for layer in gated_layers(model).values() for parameter in (layer.A, layer.B)]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    with scoring_mode(model), torch.enable_grad(), _taking_gradients(trained):
        for step in track(range(steps), "refitting"):
            group = groups[step % len(groups)]
            tokens = supervised_tokens([micro["labels"] for micro in group])
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            for micro in group:
                (row_losses(model, micro).sum() / tokens).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@contextmanager
def _taking_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The parameters take gradients; at the end they have none and are frozen, also after an error."""
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False).grad = None

"""What is left of an adapter after a cut, trained on for a few steps, so that it makes up for what has left.

In a principal basis the factors of a module are of one size. So AdamW's rate, which is how far it moves an entry in one
step, is a share of that size: one rate for adapters of any model, scaling and training. For ranks that stay as training
left them it is the same share of all entries' size.
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
from qalora.adapter.layer import Factors, GatedLinear, closed, factors_of, having
from qalora.adapter.model import gated_layers
from qalora.data.rows import supervised_tokens
from qalora.kernels.loss import row_losses
from qalora.progress import track

PASSES = 2  # over the rows that order the ranks
ROWS = 8  # at least, of a step
RATE = 0.05  # of the entries' root mean square; it falls to 0


def refitted(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    ranks: Kept,
    steps: int | None = None,
    factors: Factors | None = None,
) -> Factors:
    """The factors after some steps of AdamW with these ranks alone; the model is left as it is. Ranks that are to leave
    have the values that they had, and take neither gradients nor moments.

    Args:
        model: from `attach` or `load_adapter`.
        batch: rows that train it.
        steps: None: PASSES over the rows.
        factors: of all layers, to start from; None: their own.
    """
    layers = gated_layers(model)
    start = factors or factors_of(layers)
    small = {name: (start[name][0][own].clone(), start[name][1][:, own].clone()) for name, own in ranks.items() if own}
    with having(layers, small), closed(layer for name, layer in layers.items() if name not in small):
        _train(model, [layers[name] for name in small], grouped(batch), steps, RATE * size_of_entries(small))
    found = {name: (A.clone(), B.clone()) for name, (A, B) in start.items()}
    for name, (A, B) in small.items():
        found[name][0][ranks[name]], found[name][1][:, ranks[name]] = A, B
    return found


def size_of_entries(factors: Factors) -> float:
    """Root mean square of all entries."""
    parts = [part for pair in factors.values() for part in pair]
    squares = sum(float(part.double().square().sum()) for part in parts)
    return math.sqrt(squares / sum(part.numel() for part in parts))


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


def _train(
    model: PeftModel,
    layers: Sequence[GatedLinear],
    groups: Sequence[Sequence[MicroBatch]],
    steps: int | None,
    rate: float,
) -> None:
    """Trains these layers' factors in place, a step on each group in turn; steps: None: PASSES over the groups."""
    steps = PASSES * len(groups) if steps is None else steps
    trained = [parameter for layer in layers for parameter in (layer.A, layer.B)]
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

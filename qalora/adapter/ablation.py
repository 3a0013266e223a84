"""The loss of the adapted model with gates closed: what AB-LoRA's scores are made of.

A batch here is a list of micro-batches (dicts of input_ids, attention_mask, labels …) whose rows are all scored
together; losses are means over all their supervised tokens, summed in fp64, so they do not depend on the split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from qalora.adapter.layer import GatedLinear, gated
from qalora.adapter.model import gated_layers

MicroBatch = Mapping[str, Tensor]


def supervised_tokens(batch: Sequence[MicroBatch]) -> int:
    return sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in batch)


def mean_loss(model: PeftModel, batch: Sequence[MicroBatch]) -> float:
    """Mean cross-entropy over the supervised tokens, nats; the gates are as they stand."""
    total = 0.0
    with torch.no_grad():
        for micro in batch:
            total += float(model(**micro).row_losses.double().sum())
    return total / supervised_tokens(batch)


def loss_without(model: PeftModel, batch: Sequence[MicroBatch], module: str, rank: int) -> float:
    """L(M∖r): every gate open but that of one rank."""
    layers = gated_layers(model)
    gate = torch.ones(len(layers[module].A), device=layers[module].A.device)
    gate[rank] = 0.0
    with gated(layers, {module: gate}):
        return mean_loss(model, batch)


def loss_alone(model: PeftModel, batch: Sequence[MicroBatch], module: str, rank: int) -> float:
    """L(M_r): every gate of every module closed but that of one rank."""
    layers = gated_layers(model)
    gates = uniform_gates(layers, 0.0)
    gates[module][rank] = 1.0
    with gated(layers, gates):
        return mean_loss(model, batch)


def loss_and_gate_gradients(
    model: PeftModel, batch: Sequence[MicroBatch], value: float
) -> tuple[float, dict[str, Tensor]]:
    """L and ∂L/∂α of every rank, with all gates at `value`: one forward and backward of each micro-batch.

    Returns:
        (loss, module → (r,) fp64 gradient).
    """
    layers, tokens = gated_layers(model), supervised_tokens(batch)
    gradients = {name: torch.zeros(len(layer.A), dtype=torch.float64) for name, layer in layers.items()}
    total = 0.0
    for micro in batch:
        gates = uniform_gates(layers, value)
        for gate in gates.values():
            gate.requires_grad_()
        with gated(layers, gates), torch.enable_grad():
            loss = model(**micro).row_losses.sum()
            for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                gradients[name] += gradient.double().cpu() / tokens
        total += float(loss.detach().double())
    return total / tokens, gradients


def uniform_gates(layers: Mapping[str, GatedLinear], value: float) -> dict[str, Tensor]:
    return {name: torch.full((len(layer.A),), value, device=layer.A.device) for name, layer in layers.items()}


@contextmanager
def scoring_mode(model: PeftModel) -> Iterator[None]:
    """Dropout off, adapters frozen, everything else as in a training step, and all of it restored at the end.

    The blocks alone stay in train mode: transformers checkpoints activations only there, so scoring needs no more
    memory than a step does. What is inside them does not, for attention drops out by its own mode.
    """
    modes = {module: module.training for module in model.modules()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in model.modules():
            module.training = isinstance(module, GradientCheckpointingLayer)
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in parameters:
            parameter.requires_grad_(True)

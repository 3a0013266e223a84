"""Where a frozen map would move if it could: the leading directions of ∂L/∂W, without ever holding ∂L/∂W.

Ranks with A = 0 add nothing to z = W x + s · B A x, whatever B is, and their gradient is ∂L/∂A = s · Bᵀ ∂L/∂W: for a
random B, a random mixture of the rows of ∂L/∂W. Let Q span these mixtures. Ranks with A = Q and B = 0 add nothing
either, and ∂L/∂B = s · ∂L/∂W Qᵀ, from which ∂L/∂W is known within that span. These are the two passes of a randomized
SVD (Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.1 and 5.1), each a forward and backward like any
other: in micro-batches, under checkpointing, over a 4-bit base; the memory is that of a few more ranks.

How far a rank moves the output depends on how much of the input lies along its row of A, and inputs lie along their
mean for the most part: a row in its direction would learn twenty times as fast as a random one (SmolLM2). So directions
are orthogonal, and of one length, in the metric of the inputs: with C = E[x xᵀ], in units of its mean eigenvalue, the
rows are the right-singular vectors of ∂L/∂W (C + 1)^(−1/2), times (C + 1)^(−1/2). The 1 keeps directions without inputs
from growing without bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from qalora.adapter.ablation import MicroBatch, scoring_mode
from qalora.adapter.layer import GatedLinear
from qalora.adapter.model import add_layer, gated_layers, ranks, remove_layer
from qalora.adapter.start.inputs import visit_inputs
from qalora.data.rows import supervised_tokens
from qalora.kernels.loss import row_losses
from qalora.kernels.stretches import stretches
from qalora.sizes import OVERSAMPLING

# Of a row of A: what PEFT's Kaiming-uniform start has, so that learning rates mean the same.
START_NORM = 1 / math.sqrt(3)
FORWARDS = 7.0  # two with their backwards, and one


@dataclass(frozen=True)
class Directions:
    """Of one module.

    Attributes:
        rows: (n, in) for A, the one along which the loss falls fastest first, fp32.
        slopes: (n,) length of ∂L/∂W rowᵀ, which is that of ∂L/∂B's column over s: nats per unit of B, of the batch's
            mean loss per supervised token.
    """

    rows: Tensor
    slopes: Tensor

    @property
    def known(self) -> Tensor:
        """The rows about which the gradient says something."""
        return self.rows[self.slopes > 1e-6 * self.slopes[:1]]


def start_along_gradient(model: PeftModel, batch: Sequence[MicroBatch], *, generator: torch.Generator) -> None:
    """Points every rank of an adapter whose B is zero along ∂L/∂W's leading directions; the function does not change.

    Args:
        batch: training rows.
        generator: CPU generator of the sketch, for runs that can be repeated.
    """
    found = gradient_directions(model, batch, ranks(model), generator)
    for name, layer in gated_layers(model).items():
        rows = found[name].known[: len(layer.A)]
        layer.A.data[: len(rows)] = rows


def gradient_directions(
    model: PeftModel, batch: Sequence[MicroBatch], counts: Mapping[str, int], generator: torch.Generator
) -> dict[str, Directions]:
    """The leading `counts` directions of ∂L/∂W for each of the named modules, which may have no ranks; fewer where a
    map has fewer."""
    bare = [name for name in counts if name not in gated_layers(model)]
    try:
        for name in bare:
            add_layer(model, name)
        return _directions(model, batch, counts, generator)
    finally:
        for name in bare:
            if name in gated_layers(model):
                remove_layer(model, name)


def _directions(
    model: PeftModel, batch: Sequence[MicroBatch], counts: Mapping[str, int], generator: torch.Generator
) -> dict[str, Directions]:
    layers = {name: gated_layers(model)[name] for name in counts}
    spans = _spans(model, batch, layers, counts, generator)
    moments = _input_moments(model, batch, layers, spans)
    rows = {
        name: _inverse_root(moments[name] + torch.eye(len(span), device=span.device)) @ span
        for name, span in spans.items()
    }
    found = {}
    for name, projection in _gradients(model, batch, layers, A=rows).items():
        _, values, inner = torch.linalg.svd(projection / layers[name].s, full_matrices=False)
        count = counts[name]
        found[name] = Directions(START_NORM * (inner @ rows[name])[:count], START_NORM * values[:count])
    return found


def _spans(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    layers: Mapping[str, GatedLinear],
    counts: Mapping[str, int],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Module → (n, in) orthonormal rows that span most of ∂L/∂W's leading right-singular vectors; n is a few more than
    wanted."""
    mixing = {}
    for name, layer in layers.items():
        fan_out, fan_in = layer.B.shape[0], layer.A.shape[1]
        mixing[name] = torch.randn(fan_out, min(counts[name] + OVERSAMPLING, fan_out, fan_in), generator=generator)
    mixtures = _gradients(model, batch, layers, B=mixing)
    return {name: torch.linalg.qr(mixture.T).Q.T.contiguous() for name, mixture in mixtures.items()}


def _input_moments(
    model: PeftModel, batch: Sequence[MicroBatch], layers: Mapping[str, GatedLinear], spans: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Module → (n, n) Q E[x xᵀ] Qᵀ of its inputs x, in units of E|x|² / in, which a random direction has; padding left
    out."""
    sums = {name: torch.zeros(len(span), len(span), device=span.device) for name, span in spans.items()}
    energies = {name: torch.zeros((), device=span.device) for name, span in spans.items()}

    def add(name: str, inputs: Tensor) -> None:
        for part in stretches(inputs, inputs.shape[-1]):
            x = inputs[part].to(torch.float32)
            along = F.linear(x, spans[name])
            sums[name] += along.T @ along
            energies[name] += x.square().sum() / x.shape[-1]

    visit_inputs(model, batch, layers, add)
    return {name: sums[name] / energies[name] for name in spans}


def _inverse_root(matrix: Tensor) -> Tensor:
    """M^(−1/2) of a symmetric positive definite M."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.rsqrt() @ vectors.T


def _gradients(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    layers: Mapping[str, GatedLinear],
    *,
    A: Mapping[str, Tensor] | None = None,
    B: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Gradients of the mean loss for what further ranks lack: given their A, of their B, which is zero; or the other
    way round."""
    tokens = supervised_tokens(micro["labels"] for micro in batch)
    with scoring_mode(model), _further_ranks(layers, A, B), torch.enable_grad():
        trained: dict[str, Tensor] = {
            name: (layer.A if A is None else layer.B).requires_grad_() for name, layer in layers.items()
        }
        sums = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        for micro in batch:
            loss = row_losses(model, micro).sum()  # the mean's gradients would be too small for fp16
            for name, gradient in zip(sums, torch.autograd.grad(loss, list(trained.values())), strict=True):
                sums[name] += gradient / tokens
    own = {name: len(layer.A) for name, layer in layers.items()}
    return {name: gradient[own[name] :] if A is None else gradient[:, own[name] :] for name, gradient in sums.items()}


@contextmanager
def _further_ranks(
    layers: Mapping[str, GatedLinear], A: Mapping[str, Tensor] | None, B: Mapping[str, Tensor] | None
) -> Iterator[None]:
    """Layers with other, longer matrices in the places of theirs, which are back at the end, also after an error; of
    further ranks, A or B is zero."""
    own = {name: (layer.A, layer.B) for name, layer in layers.items()}

    def put(layer: GatedLinear, A: nn.Parameter, B: nn.Parameter) -> None:
        adapter = layer.active_adapters[0]
        layer.lora_A[adapter].weight, layer.lora_B[adapter].weight = A, B

    try:
        for name, layer in layers.items():
            count = len(A[name]) if A is not None else B[name].shape[1] if B is not None else 0
            further_A = layer.A.new_zeros(count, layer.A.shape[1]) if A is None else A[name].to(layer.A)
            further_B = layer.B.new_zeros(layer.B.shape[0], count) if B is None else B[name].to(layer.B)
            longer_A, longer_B = torch.cat([layer.A.data, further_A]), torch.cat([layer.B.data, further_B], dim=1)
            put(layer, nn.Parameter(longer_A, requires_grad=False), nn.Parameter(longer_B, requires_grad=False))
        yield
    finally:
        for name, layer in layers.items():
            put(layer, *own[name])

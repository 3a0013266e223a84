"""Where a frozen map would move if it could: the leading directions of ∂L/∂W, without ever holding ∂L/∂W.

Ranks with A = 0 add nothing to z = W x + s · B A x, whatever B is, and their gradient is ∂L/∂A = s · Bᵀ ∂L/∂W: for a random B, a
random mixture of the rows of ∂L/∂W. Let Q span these mixtures. Ranks with A = Q and B = 0 add nothing either, and ∂L/∂B =
s · ∂L/∂W Qᵀ, whose singular vectors are those of ∂L/∂W within that span. These are the two passes of a randomized SVD
(Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.1 and 5.1), each a forward and backward like any other: in
micro-batches, under checkpointing, over a 4-bit base; the memory is that of a few more ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from qalora.adapter.ablation import MicroBatch, scoring_mode, supervised_tokens
from qalora.adapter.layer import GatedLinear
from qalora.adapter.model import gated_layers, ranks

OVERSAMPLING = 4  # columns of the sketch beyond those asked for
# Of a row of A: what PEFT's Kaiming-uniform start has, so that learning rates mean the same.
START_NORM = 1 / math.sqrt(3)
FORWARDS = 6.0  # two forwards with their backwards


@dataclass(frozen=True)
class Directions:
    """Of one module: singular values of ∂L/∂W, largest first, and its right-singular vectors.

    Attributes:
        values: (n,) nats per unit of W, of the batch's mean loss per supervised token.
        rows: (n, in), orthonormal, fp32.
    """

    values: Tensor
    rows: Tensor


def start_along_gradient(model: PeftModel, batch: Sequence[MicroBatch], *, generator: torch.Generator) -> None:
    """Points every rank of an adapter whose B is zero along ∂L/∂W's leading directions; the function does not change.

    Args:
        batch: training rows.
        generator: CPU generator of the sketch, for runs that can be repeated.
    """
    point_along(model, gradient_directions(model, batch, ranks(model), generator))


def point_along(model: PeftModel, found: Mapping[str, Directions]) -> None:
    """Every rank of an adapter whose B is zero along its module's directions, as far as they are known."""
    for name, layer in gated_layers(model).items():
        rows = starting_rows(found[name])[: len(layer.A)]
        layer.A.data[: len(rows)] = rows


def expected_gains(directions: Directions, fan_out: int) -> list[float]:
    """What a rank along each direction would gain at first under Adam, up to a factor that all modules share: the sum of the
    magnitudes of ∂L/∂B's column, σ · ‖u‖₁, with ‖u‖₁ taken as √out, as it is for entries of like size."""
    return [math.sqrt(fan_out) * value for value in directions.values.tolist()]


def starting_rows(directions: Directions) -> Tensor:
    """(n, in) rows for A; those that the gradient says nothing about are left out."""
    known = directions.values > 1e-6 * directions.values[:1]
    return START_NORM * directions.rows[known]


def gradient_directions(
    model: PeftModel, batch: Sequence[MicroBatch], counts: Mapping[str, int], generator: torch.Generator
) -> dict[str, Directions]:
    """The leading `counts` directions of ∂L/∂W for each of the named modules; fewer where a map has fewer."""
    layers = {name: gated_layers(model)[name] for name in counts}
    sizes = {
        name: min(counts[name] + OVERSAMPLING, layer.B.shape[0], layer.A.shape[1]) for name, layer in layers.items()
    }
    mixing = {name: torch.randn(layer.B.shape[0], sizes[name], generator=generator) for name, layer in layers.items()}
    nothing = {name: torch.zeros(sizes[name], layer.A.shape[1]) for name, layer in layers.items()}
    mixtures = _gradients(model, batch, layers, nothing, mixing, of="A")
    spans = {name: torch.linalg.qr(mixture.T).Q.T.contiguous() for name, mixture in mixtures.items()}
    nothing = {name: torch.zeros_like(matrix) for name, matrix in mixing.items()}
    projections = _gradients(model, batch, layers, spans, nothing, of="B")
    found = {}
    for name, projection in projections.items():
        _, values, inner = torch.linalg.svd(projection, full_matrices=False)
        count = counts[name]
        found[name] = Directions(values[:count] / layers[name].s, (inner @ spans[name])[:count])
    return found


def _gradients(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    layers: Mapping[str, GatedLinear],
    A: Mapping[str, Tensor],
    B: Mapping[str, Tensor],
    of: str,
) -> dict[str, Tensor]:
    """Gradients of the mean loss for the A, or the B, of further ranks."""
    tokens = supervised_tokens(batch)
    with scoring_mode(model), _further_ranks(layers, A, B), torch.enable_grad():
        trained: dict[str, nn.Parameter] = {name: getattr(layer, of).requires_grad_() for name, layer in layers.items()}
        sums = {name: torch.zeros_like(parameter) for name, parameter in trained.items()}
        for micro in batch:
            loss = model(**micro).row_losses.sum() / tokens
            for name, gradient in zip(sums, torch.autograd.grad(loss, list(trained.values())), strict=True):
                sums[name] += gradient
    return {
        name: gradient[-len(A[name]) :] if of == "A" else gradient[:, -len(A[name]) :]
        for name, gradient in sums.items()
    }


@contextmanager
def _further_ranks(
    layers: Mapping[str, GatedLinear], A: Mapping[str, Tensor], B: Mapping[str, Tensor]
) -> Iterator[None]:
    """Layers with other, longer matrices in the places of theirs, which are back at the end, also after an error."""
    own = {name: (layer.A, layer.B) for name, layer in layers.items()}

    def put(layer: GatedLinear, A: nn.Parameter, B: nn.Parameter) -> None:
        adapter = layer.active_adapters[0]
        layer.lora_A[adapter].weight, layer.lora_B[adapter].weight = A, B

    try:
        for name, layer in layers.items():
            longer_A = torch.cat([layer.A.data, A[name].to(layer.A)])
            longer_B = torch.cat([layer.B.data, B[name].to(layer.B)], dim=1)
            put(layer, nn.Parameter(longer_A, requires_grad=False), nn.Parameter(longer_B, requires_grad=False))
        yield
    finally:
        for name, layer in layers.items():
            put(layer, *own[name])

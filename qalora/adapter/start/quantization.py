"""Ranks that begin by giving back what quantization took from their map.

A 4-bit map computes W₄ x where the model had W x: it errs by E x, with E = W − W₄. Among all B A of r ranks the one
that leaves least of E x, in the mean square over inputs x, is s · B A = U Uᵀ E, where U (out, r) are the leading
principal components of the errors E x themselves (Eckart–Young, in the metric of the inputs: arXiv 2410.21271
compensates a compressed model in it, LoftQ, 2310.08659, starts LoRA by E alone). Nothing beyond r ranks a map is added:
training goes on from there with the same matrices.

A few hundred tokens of training rows are enough to find U, so a forward of some rows keeps as many inputs of each map,
in host memory, and then the 16-bit weights pass by, a map at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from qalora.adapter.ablation import MicroBatch
from qalora.adapter.model import gated_layers
from qalora.adapter.start.gradient import START_NORM
from qalora.adapter.start.inputs import token_mask, visit_inputs
from qalora.base.checkpoint import Weights
from qalora.base.quantized import dequantize
from qalora.progress import track

TOKENS = 256  # whose inputs are kept; all of 16 rows of E2E, four times as many, gave the same loss (bench/results)
FEWEST_ROWS = 4  # that these tokens are from: those of one text are alike


def start_at_quantization_error(
    model: PeftModel, batch: Sequence[MicroBatch], original: Weights, *, generator: torch.Generator
) -> None:
    """Sets A and B of every gated layer to the best correction of its map's quantization error; the loss moves towards
    the 16-bit model's.

    Args:
        model: an adapter that was not trained yet.
        batch: training rows.
        original: the weights that were quantized.
        generator: CPU generator that chooses tokens, for runs that can be repeated.
    """
    layers = gated_layers(model)
    for layer in layers.values():
        layer.B.data.zero_()  # of an attempt that broke off: inputs are those of the base alone
    inputs = sampled_inputs(model, some_rows(batch, generator), generator)
    for name, layer in track(layers.items(), "start"):
        error = (
            original(name)
            .to(layer.A.device, torch.float32, copy=True)
            .sub_(dequantize(cast(nn.Linear, layer.base_layer)))
        )
        A, B = correction(error, torch.cat(inputs[name]).to(error), len(layer.A))
        layer.A.data[: len(A)] = A
        layer.B.data[:, : len(A)] = B / layer.s


def correction(error: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The B A of at most `rank` ranks that leaves the least of `inputs` @ (error − B A)ᵀ, in the sum of squares.

    Args:
        error: (out, in), fp32.
        inputs: (n, in), fp32.

    Returns:
        (A (k, in), B (out, k)), the rank that corrects most first; every row of A has the length of PEFT's start, and k
        is below `rank` where fewer correct everything.
    """
    outputs = inputs @ error.T
    squares, combinations = torch.linalg.eigh((outputs @ outputs.T).double())
    # Largest first; of what is left over, fp32 says nothing.
    squares, combinations = squares.flip(0)[:rank], combinations.flip(1)[:, :rank]
    known = squares > 1e-6 * squares[:1].clamp(min=1e-30)
    components = torch.linalg.qr(outputs.T @ combinations[:, known].to(outputs)).Q
    rows = components.T @ error
    lengths = rows.norm(dim=1)
    return START_NORM * rows / lengths[:, None], components * lengths / START_NORM


def some_rows(batch: Sequence[MicroBatch], generator: torch.Generator) -> list[MicroBatch]:
    """Random rows of the batch, until they are `FEWEST_ROWS` and have twice as many tokens as will be kept; or all."""
    masks = [token_mask(micro) for micro in batch]
    rows = [(i, row, length) for i, mask in enumerate(masks) for row, length in enumerate(mask.sum(1).tolist())]
    chosen: list[list[int]] = [[] for _ in batch]
    tokens = 0
    for count, place in enumerate(torch.randperm(len(rows), generator=generator).tolist()):
        if count >= FEWEST_ROWS and tokens >= 2 * TOKENS:
            break
        i, row, length = rows[place]
        chosen[i].append(row)
        tokens += length
    return [
        {key: value[sorted(kept)] for key, value in micro.items()}
        for micro, kept in zip(batch, chosen, strict=True)
        if kept
    ]


def sampled_inputs(
    model: PeftModel, batch: Sequence[MicroBatch], generator: torch.Generator
) -> Mapping[str, list[Tensor]]:
    """Module → (n, in) inputs of some tokens of every micro-batch, about `TOKENS` in all, in host memory; padding left
    out."""
    layers = gated_layers(model)
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}
    share = min(1.0, TOKENS / sum(int(token_mask(micro).sum()) for micro in batch))
    whole: Tensor | None = None  # what the last map read, and what was kept of it: q, k and v read the same
    chosen = torch.empty(0)
    places, among = torch.empty(0), -1  # the tokens that are kept, of how many

    def keep(name: str, inputs: Tensor) -> None:
        nonlocal whole, chosen, places, among
        if inputs is not whole:
            if len(inputs) != among:
                among = len(inputs)
                places = torch.randperm(among, generator=generator)[: ceil(share * among)]
            whole, chosen = inputs, inputs[places.to(inputs.device)].cpu()
        kept[name].append(chosen)

    visit_inputs(model, batch, layers, keep)
    return kept

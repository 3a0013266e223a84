"""The principal basis of a LoRA: the same function, its ranks ordered by what they carry.

A LoRA's ranks are not identifiable. For any invertible T, (T A, B T⁻¹) is the same function with other ranks. Which
ranks training leaves is chance; in a principal basis the first k ranks are the best k that there are, in the mean
square of

- the weights (`svd`): the singular value decomposition of B A, for which no data is needed;
- the outputs B A x on some inputs (`svd-act`): that of B A C^½ with C = Σ x xᵀ. Only A C Aᵀ (r × r) of the inputs is
  needed, for B A C Aᵀ Bᵀ has its left singular vectors.

Two QR decompositions and one of an r × r matrix, in fp64: milliseconds per module. No matrix is in × in or out × in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from qalora.adapter.ablation import MicroBatch
from qalora.adapter.model import gated_layers, remove_layer, settle_scalings, sync_config
from qalora.adapter.scores import PerRank
from qalora.adapter.start.inputs import visit_inputs
from qalora.adapter.surgery import replace_ranks
from qalora.errors import AnswerNo
from qalora.kernels.stretches import stretches

Basis = Literal["trained", "svd", "svd-act"]
NEGLIGIBLE = 1e-7  # of the largest singular value, or of the largest rank: fp32 factors tell nothing below that


@dataclass(frozen=True)
class Principal:
    """A factorization B A = B' A' of k ≤ r ranks, the one that carries most first; in fp64.

    Attributes:
        A: (k, in), A' = T A.
        B: (out, k), B' = B T⁻¹. Row i of A' and column i of B' have equal lengths.
        values: (k,) singular values: of B A, or of B A C^½.
        turn: (k, r), T.
        back: (r, k), T⁻¹ (of a rank-deficient adapter a one-sided inverse: T T⁻¹ = 1).
    """

    A: Tensor
    B: Tensor
    values: Tensor
    turn: Tensor
    back: Tensor


def into_basis(model: PeftModel, basis: Basis, batch: Sequence[MicroBatch] = ()) -> PerRank:
    """Brings every module's adapter into the basis, in place; the function stays.

    Ranks without energy leave, and a module that has no other keeps none. Scalings become what alpha over any rank is
    exactly (`settle_scalings`).

    Args:
        model: from `attach` or `load_adapter`.
        batch: micro-batches whose tokens are the inputs that `svd-act` weighs by; the others need none.

    Returns:
        Module → what each rank carries, s times its singular value: of the weights, or for `svd-act` of the outputs, as
        a root mean square over the tokens. In the trained basis it is s · |a| |b| of the rank.

    Raises:
        AnswerNo: the adapter adds nothing, for every B A is zero.
    """
    settle_scalings(model)
    layers = gated_layers(model)
    grams = input_grams(model, batch) if basis == "svd-act" else {}
    values: PerRank = {}
    for name, layer in layers.items():
        A, B = layer.A.detach(), layer.B.detach()
        if basis == "trained":
            values[name] = (layer.s * A.double().norm(dim=1) * B.double().norm(dim=0)).tolist()
            continue
        found = principal(A, B, grams.get(name))
        values[name] = (layer.s * found.values).tolist()
        if values[name]:
            replace_ranks(layer, found.A, found.B)
        else:
            remove_layer(model, name)
    if not any(map(any, values.values())):
        raise AnswerNo("the adapter adds nothing (every B A is zero), so there is nothing to keep; train it first.")
    sync_config(model)
    return {name: of for name, of in values.items() if of}


def input_grams(model: PeftModel, batch: Sequence[MicroBatch]) -> dict[str, Tensor]:
    """Module → (r, r) fp64, the mean of (A x)(A x)ᵀ over the tokens of the batch; a forward of each micro-batch."""
    layers = gated_layers(model)
    sums = {name: torch.zeros(2 * [len(layer.A)], dtype=torch.float64) for name, layer in layers.items()}
    tokens = dict.fromkeys(layers, 0)

    def add(name: str, inputs: Tensor) -> None:
        A = layers[name].A
        for part in stretches(inputs, inputs.shape[-1]):
            low = F.linear(inputs[part].to(A.dtype), A).cpu().double()
            sums[name] += low.T @ low
        tokens[name] += len(inputs)

    visit_inputs(model, batch, layers, add)
    return {name: total / max(1, tokens[name]) for name, total in sums.items()}


def principal(A: Tensor, B: Tensor, gram: Tensor | None = None) -> Principal:
    """The principal basis of B A.

    Args:
        A: (r, in).
        B: (out, r).
        gram: (r, r), A C Aᵀ = Σ (A x)(A x)ᵀ over the inputs that decide; None: the weights alone decide.
    """
    A, B = A.double(), B.double()
    Q_b, R_b = torch.linalg.qr(B)
    Q_a, R_a = torch.linalg.qr(A.T)
    core = R_b @ R_a.T  # B A = Q_b core Q_aᵀ
    if gram is None:
        U, values, _ = torch.linalg.svd(core, full_matrices=False)
    else:
        U, values, _ = torch.linalg.svd(R_b @ _root(gram.to(A)), full_matrices=False)
    rows = U.T @ core  # of A', before its length is shared with B', in the basis Q_a
    lengths = rows.norm(dim=1)
    largest = torch.maximum(lengths.max(), (R_a.norm(dim=0) * R_b.norm(dim=0)).max())  # ranks can cancel out
    there = lengths > NEGLIGIBLE * largest.clamp(min=torch.finfo(torch.float64).tiny)
    U, rows, lengths, values = U[:, there], rows[there], lengths[there], values[there]
    share = lengths.sqrt()
    turn = (U.T @ R_b) / share[:, None]
    # rows of T A are independent, so T⁻¹ = Aᵀ's coordinates of them: A (T A)⁺.
    back = R_a.T @ torch.linalg.pinv(rows / share[:, None])
    return Principal((rows / share[:, None]) @ Q_a.T, (Q_b @ U) * share, values, turn, back)


def turned_moments(found: Principal, of_A: Tensor, of_B: Tensor, *, order: Literal[1, 2]) -> tuple[Tensor, Tensor]:
    """Adam's moments of A and B, for A' and B'.

    Gradients go over as ∂A' = T⁻ᵀ ∂A and ∂B' = ∂B Tᵀ, and so do first moments, exactly. Second moments go over by the
    squared entries of the same matrices: exact if the gradients of different ranks are uncorrelated.

    Args:
        of_A: (r, in).
        of_B: (out, r).
        order: 1 or 2.
    """
    back, turn = found.back.T.to(of_A), found.turn.T.to(of_B)
    if order == 2:
        back, turn = back.square(), turn.square()
    return back @ of_A, of_B @ turn


def _root(gram: Tensor) -> Tensor:
    """L with L Lᵀ = gram, for a positive semidefinite matrix that may be singular."""
    squares, vectors = torch.linalg.eigh(gram)
    return vectors * squares.clamp(min=0).sqrt()

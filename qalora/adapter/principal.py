"""The principal basis of a LoRA: the same function, its ranks ordered by what they carry.

A LoRA's ranks are not identifiable. For any invertible T, (T A, B T⁻¹) is the same function with other ranks. Which
ranks training leaves is chance; in a principal basis the first k ranks are the best k that there are, in the mean
square of

- the weights (`svd`): the singular value decomposition of B A, for which no data is needed;
- the outputs B A x on some inputs (`svd-act`): that of B A C^½ with C = Σ x xᵀ. Only A C Aᵀ (r × r) of the inputs is
needed, for
  B A C Aᵀ Bᵀ has its left singular vectors.

Two QR decompositions and one of an r × r matrix, in fp64: milliseconds per module, and no matrix of in × in or out ×
in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Basis = Literal["trained", "svd", "svd-act"]
NEGLIGIBLE = 1e-7  # of the largest singular value: fp32 factors say nothing about what is below


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
        U, values, _ = torch.linalg.svd(core)
    else:
        U, values, _ = torch.linalg.svd(R_b @ _root(gram.double()))
    rows = U.T @ core  # of A', before its length is shared with B', in the basis Q_a
    lengths = rows.norm(dim=1)
    there = lengths > NEGLIGIBLE * lengths.max().clamp(min=torch.finfo(torch.float64).tiny)
    U, rows, lengths, values = U[:, there], rows[there], lengths[there], values[there]
    share = lengths.sqrt()
    turn = (U.T @ R_b) / share[:, None]
    # rows of T A are independent, so T⁻¹ = Aᵀ's coordinates of them: A (T A)⁺.
    back = R_a.T @ torch.linalg.pinv(rows / share[:, None])
    return Principal((rows / share[:, None]) @ Q_a.T, (Q_b @ U) * share, values, turn, back)


def turned_moments(found: Principal, of_A: Tensor, of_B: Tensor, *, order: Literal[1, 2]) -> tuple[Tensor, Tensor]:
    """Adam's moments of A and B, for A' and B'.

    Gradients go over as ∂A' = T⁻ᵀ ∂A and ∂B' = ∂B Tᵀ, and so do first moments, exactly. Second moments go over by the
    squared entries
    of the same matrices: exact if the gradients of different ranks are uncorrelated.

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

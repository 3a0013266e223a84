"""W x + s · B diag(gate) A x and its gradients, against the same written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qalora.kernels.low_rank import THIN, LowRank, LowRankLinear, can_fuse, map_forward, thin_product


@pytest.fixture
def parts():
    torch.manual_seed(0)
    linear = nn.Linear(6, 5).requires_grad_(False)
    A, B, gate = (torch.randn(shape, requires_grad=True) for shape in ((3, 6), (5, 3), (3,)))
    return linear, A, B, gate, torch.randn(2, 4, 6, requires_grad=True)


def written_out(linear, A, B, gate, x, s):
    return linear(x) + s * F.linear(F.linear(x, A) * gate, B)


def test_forward_and_gradients_are_those_of_the_formula(parts):
    linear, A, B, gate, x = parts
    leaves, weights = (x, A, B, gate), torch.randn(2, 4, 5)
    expected = torch.autograd.grad((written_out(linear, A, B, gate, x, 0.5) * weights).sum(), leaves)
    z = LowRankLinear.apply(x, None, LowRank(linear, 0.5, A, B, gate), A, B, gate)
    torch.testing.assert_close(z, written_out(linear, A, B, gate, x, 0.5))
    found = torch.autograd.grad((z * weights).sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_an_adapter_it_is_the_linear_layer(parts):
    linear, *_, x = parts
    z, low = map_forward(x, LowRank.of(linear))
    assert low is None
    torch.testing.assert_close(z, linear(x))


@pytest.mark.parametrize("ranks", [1, 7, THIN, THIN + 3])
def test_a_thin_product_is_the_product(ranks):
    x, A = torch.randn(2, 3, 6), torch.randn(ranks, 6)
    torch.testing.assert_close(thin_product(x, A), x @ A.T)


def test_layers_that_drop_or_are_somebody_elses_are_not_fused(parts):
    linear = parts[0]
    dropping = nn.Identity()
    dropping.drops = True
    kept = nn.Identity()
    kept.drops = False
    assert can_fuse([linear, kept]) and not can_fuse([linear, dropping]) and not can_fuse([nn.Identity()])

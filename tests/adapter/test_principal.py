"""The principal basis against the decompositions of the full matrices, and Adam in turned coordinates."""

from __future__ import annotations

import pytest
import torch

from qalora.adapter.principal import principal, turned_moments


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 40, generator=generator) * torch.tensor([3.0, 1, 0.1, 2, 5, 0.01])[:, None]
    return A, torch.randn(30, 6, generator=generator)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(200, 40, generator=generator) @ torch.randn(40, 40, generator=generator)


def test_the_function_stays(factors, inputs):
    A, B = factors
    for gram in (None, (inputs @ A.T).T @ (inputs @ A.T)):
        found = principal(A, B, gram)
        torch.testing.assert_close(found.B @ found.A, (B.double() @ A.double()), rtol=0, atol=1e-10)
        torch.testing.assert_close(found.turn @ A.double(), found.A, rtol=0, atol=1e-10)
        torch.testing.assert_close(B.double() @ found.back, found.B, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.A.norm(dim=1), found.B.norm(dim=0))


def test_the_first_ranks_are_the_truncated_svd(factors):
    A, B = factors
    found = principal(A, B)
    U, S, Vh = torch.linalg.svd(B.double() @ A.double())
    torch.testing.assert_close(found.values, S[:6])
    for k in (1, 3, 5):
        torch.testing.assert_close(found.B[:, :k] @ found.A[:k], U[:, :k] * S[:k] @ Vh[:k], rtol=0, atol=1e-9)


def test_with_inputs_the_first_ranks_leave_least_of_the_outputs(factors, inputs):
    """Against Eckart-Young on the outputs themselves."""
    A, B = factors
    low = inputs @ A.T
    found = principal(A, B, low.T @ low)
    outputs = (low @ B.T).double()
    U, S, Vh = torch.linalg.svd(outputs, full_matrices=False)
    torch.testing.assert_close(found.values, S[:6], rtol=1e-5, atol=1e-4)
    for k in (1, 3, 5):
        kept = inputs.double() @ (found.B[:, :k] @ found.A[:k]).T
        torch.testing.assert_close(kept, U[:, :k] * S[:k] @ Vh[:k], rtol=1e-4, atol=1e-3 * float(S[0]))


@pytest.mark.parametrize("dead", ["B", "A", "both equal"])
def test_ranks_of_no_energy_leave(factors, dead):
    A, B = factors
    if dead == "B":
        B[:, 2] = 0
    elif dead == "A":
        A[4] = 0
    else:
        A[1] = A[0]
    found = principal(A, B)
    assert len(found.A) == 5
    torch.testing.assert_close(found.B @ found.A, B.double() @ A.double(), rtol=0, atol=1e-10)


def test_an_adapter_that_is_zero_has_no_rank(factors):
    A, B = factors
    assert len(principal(A, torch.zeros_like(B)).A) == 0


def test_first_moments_go_over_exactly(factors):
    """Adam's first moment is a mean of gradients, which autograd takes in both coordinates."""
    A, B = (factor.double().requires_grad_() for factor in factors)
    found = principal(A.detach(), B.detach())
    A2, B2 = found.A.clone().requires_grad_(), found.B.clone().requires_grad_()
    target = torch.randn(30, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for left, right in ((B, A), (B2, A2)):
        (torch.tanh(left @ right) * target).sum().backward()
    of_A, of_B = turned_moments(found, A.grad, B.grad, order=1)
    torch.testing.assert_close(of_A, A2.grad, rtol=0, atol=1e-8)
    torch.testing.assert_close(of_B, B2.grad, rtol=0, atol=1e-8)


def test_second_moments_of_uncorrelated_gradients_go_over_in_the_mean(factors):
    A, B = factors
    found = principal(A, B)
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(6, 1, generator=generator, dtype=torch.float64) + 0.5
    gradients = torch.randn(20_000, 6, 5, generator=generator, dtype=torch.float64) * spread
    turned = found.back.T @ gradients
    of_A, _ = turned_moments(found, gradients.square().mean(0), torch.zeros(30, 6), order=2)
    torch.testing.assert_close(of_A, turned.square().mean(0), rtol=0.1, atol=0)

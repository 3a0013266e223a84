"""The lean RMSNorm against transformers' own."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qalora.kernels import norm as kernel
from qalora.kernels import stretches


def norms(dtype):
    torch.manual_seed(0)
    plain = LlamaRMSNorm(48, eps=1e-5)
    plain.weight.data.uniform_(0.5, 1.5)
    plain = plain.to(dtype).requires_grad_(False)
    lean = LlamaRMSNorm(48, eps=1e-5).to(dtype).requires_grad_(False)
    lean.load_state_dict(plain.state_dict())
    (only,) = kernel.replaceable(lean)
    only.forward = MethodType(kernel.forward, only)
    return plain, lean


@pytest.mark.parametrize("stretch", [1, 1 << 27], ids=["token by token", "whole"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_it_computes_transformers_norm(monkeypatch, dtype, tolerance, stretch):
    monkeypatch.setattr(stretches, "FP32_TEMPORARY", stretch)
    plain, lean = norms(dtype)
    x = (3 * torch.randn(2, 7, 48)).to(dtype)
    grad = torch.randn(2, 7, 48).to(dtype)
    grads = []
    for norm in (plain, lean):
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        if norm is plain:
            expected = out
        out.backward(grad)
        grads.append(leaf.grad)
    assert torch.equal(out, expected)
    torch.testing.assert_close(grads[1], grads[0], rtol=tolerance, atol=tolerance)


def test_its_gradient_is_the_finite_difference():
    _, lean = norms(torch.float32)
    x = torch.randn(1, 3, 48, requires_grad=True)
    along, out_grad = torch.randn(1, 3, 48), torch.randn(1, 3, 48)
    (lean(x) * out_grad).sum().backward()
    h = 1e-2
    with torch.no_grad():
        difference = ((lean(x + h * along) - lean(x - h * along)) * out_grad).sum() / (2 * h)
    assert (x.grad * along).sum().item() == pytest.approx(difference.item(), rel=1e-2, abs=1e-3)


def test_a_trained_norm_stays_as_it_is():
    norm = LlamaRMSNorm(8)
    assert not list(kernel.replaceable(norm)) and list(kernel.replaceable(norm.requires_grad_(False))) == [norm]

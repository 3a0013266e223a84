"""torch's RMSNorm in the place of ours, against transformers' own. Where kernels are reached is tested on the device
without hardware (tests/fake_cuda/on_kernels.py), and their values on CUDA in tests/gpu."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qalora.kernels import fused


@pytest.mark.parametrize(("kind", "weighing"), [(LlamaRMSNorm, "after"), (Olmo2RMSNorm, "before")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_torchs_norm_is_transformers(kind, weighing, dtype):
    torch.manual_seed(0)
    norm = kind(48, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.data.uniform_(0.5, 1.5)
    x, grad = (3 * torch.randn(2, 7, 48)).to(dtype), torch.randn(2, 7, 48).to(dtype)
    found = []
    for compute in (norm, lambda leaf: fused.rms_norm(leaf, norm.weight, 1e-5, weighing)):
        leaf = x.clone().requires_grad_()
        out = compute(leaf)
        out.backward(grad)
        found.append((out.detach(), leaf.grad))
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found[1], found[0], **tolerance)


def test_a_cpu_keeps_ours():
    x = torch.randn(1, 2, 8)
    assert not fused.norms(x, x[0, 0], "after") and not fused.rotates(x) and not fused.multiplies(x)

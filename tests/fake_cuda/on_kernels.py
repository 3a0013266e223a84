"""Which kernels a step on CUDA reaches: torch's RMSNorm, and Liger-Kernel's where it is installed. A module with its
functions, in plain torch, stands in for it; its own values are for tests/gpu."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

from qalora.adapter.model import attach, gated_layers
from qalora.kernels import fused
from qalora.kernels.loss import liger_loss, summed_loss


def step(model, batch):
    """(the loss, gradients of all adapters) on the host."""
    loss = summed_loss(model, batch, fused=liger_loss())
    loss.backward()
    layers = gated_layers(model).values()
    return torch.cat([x.detach().flatten().cpu() for x in (loss, *(t.grad for m in layers for t in (m.A, m.B)))])


def on_both(make_base, make_batch, randomize_B):
    """`step` on the CPU, and on the device."""
    batch, found = make_batch(), []
    for place in ("cpu", "cuda"):
        model = randomize_B(attach(make_base().to(place), r=4, alpha=8)).train()
        found.append(step(model, {key: value.to(place) for key, value in batch.items()}))
    return found


@pytest.mark.parametrize(("kind", "times"), [("llama", 5), ("olmo2", 9), ("gemma2", 0)])
def test_norms_are_torchs_wherever_it_has_their_form(device, save_tiny, make_batch, randomize_B, tmp_path, kind, times):
    """Two blocks, and the last norm; 1 + w, of the Gemmas, is no form that torch has."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    save_tiny(tmp_path, kind, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **heads)

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).cpu().requires_grad_(False)

    with device.counted() as (_, kernels):
        on_a_cpu, on_cuda = on_both(base, make_batch, randomize_B)
    assert kernels["rms_norm"] == times
    torch.testing.assert_close(on_cuda, on_a_cpu, rtol=1e-4, atol=1e-5)


class LigerInPlainTorch:
    """Liger-Kernel's functions that are called here, with their signatures."""

    def __init__(self):
        self.reached = set()

    def rope_forward(self, q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        self.reached.add("rope_forward")
        turned = (z * cos[:, None] + rotate_half(z) * sin[:, None] for z in (q, k))
        return *turned, cos, sin

    def rope_backward(self, dq, dk, cos, sin, position_ids=None, unsqueeze_dim=1):
        self.reached.add("rope_backward")
        return tuple(z * cos[:, None] - rotate_half(z) * sin[:, None] for z in (dq, dk))

    def swiglu_forward(self, a, b):
        self.reached.add("swiglu_forward")
        return a, b, F.silu(a) * b

    def swiglu_backward(self, a, b, dc):
        self.reached.add("swiglu_backward")
        sigmoid = torch.sigmoid(a)
        grads = dc * b * sigmoid * (1 + a * (1 - sigmoid)), dc * a * sigmoid
        return a.copy_(grads[0]), b.copy_(grads[1])

    def LigerFusedLinearCrossEntropyLoss(self, reduction):
        def loss(head, states, targets):
            self.reached.add("linear_cross_entropy")
            return F.cross_entropy(F.linear(states, head).float(), targets, reduction=reduction)

        return loss


@pytest.fixture
def liger(monkeypatch):
    plain = LigerInPlainTorch()
    monkeypatch.setattr(fused, "liger", lambda name: plain)
    monkeypatch.setattr("qalora.kernels.loss.liger", lambda name: plain)
    return plain.reached


def test_a_step_takes_ligers_kernels_where_it_is_installed(device, liger, tiny_llama, make_batch, randomize_B):
    expected, found = on_both(tiny_llama, make_batch, randomize_B)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert liger == {"rope_forward", "rope_backward", "swiglu_forward", "swiglu_backward", "linear_cross_entropy"}

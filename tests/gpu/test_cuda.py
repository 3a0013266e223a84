"""What only a CUDA device can show; skipped by name elsewhere."""

from __future__ import annotations

import pytest
import torch

from qalora.adapter.ablation import ablate, scoring_mode
from qalora.adapter.allocation import AllocationPlan
from qalora.adapter.model import attach, gated_layers, ranks
from qalora.adapter.surgery import apply_plan
from qalora.base.quantized import quantize_
from qalora.training.activations import set_checkpointing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_on_a_4_bit_base_equal_those_in_fp32(tiny_llama, make_batch, randomize_B, dtype):
    gradients = []
    for compute in (dtype, torch.float32):
        base = tiny_llama().to("cuda", compute)
        quantize_(base, compute_dtype=compute)
        model = randomize_B(attach(base, r=4, alpha=8))
        model(**{key: value.cuda() for key, value in make_batch().items()}).loss.backward()
        gradients.append(torch.cat([layer.A.grad.flatten() for layer in gated_layers(model).values()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("name", ["PagedAdamW32bit", "PagedAdamW8bit", "AdamW8bit"])
def test_training_goes_on_after_surgery_with_bitsandbytes_optimizers(tiny_llama, make_batch, name):
    import bitsandbytes as bnb

    base = tiny_llama(hidden_size=512, intermediate_size=1024).to("cuda", torch.bfloat16)
    quantize_(base, compute_dtype=torch.bfloat16)
    model = attach(base, r=64, alpha=128)
    optimizer = getattr(bnb.optim, name)([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = {key: value.cuda() for key, value in make_batch().items()}

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step() for _ in range(4)]
    first, *_, last = ranks(model)
    apply_plan(model, AllocationPlan({first: tuple(range(0, 64, 2))}, {last: 32}), optimizer)
    losses += [step() for _ in range(4)]
    assert ranks(model)[first] == 32
    assert ranks(model)[last] == 96
    assert losses[-1] < losses[3] < losses[0]


def test_ablation_is_the_same_with_block_inputs_in_host_memory(tiny_llama, make_batch, randomize_B):
    model = randomize_B(attach(tiny_llama().to("cuda"), r=4, alpha=8))
    batch = [{key: value.cuda() for key, value in make_batch().items()}]
    chosen = [(name, rank) for name in ranks(model) for rank in (0, 3)]
    with scoring_mode(model):
        on_host, on_device = (ablate(model, batch, chosen, memory=memory) for memory in (0, 1 << 30))
    assert on_host.drop == pytest.approx(on_device.drop, abs=2e-6)
    assert on_host.alone == pytest.approx(on_device.alone, abs=2e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_block_inputs_in_host_memory_give_the_same_gradients(tiny_llama, make_batch, randomize_B, rows):
    model = randomize_B(attach(tiny_llama(num_hidden_layers=5).to("cuda"), r=4, alpha=8)).train()
    batches = [{key: value.cuda() for key, value in make_batch(rows=rows, seed=seed).items()} for seed in (1, 2)]
    gradients = []
    for kind in ("blocks", "offload"):
        set_checkpointing(model, kind)
        model.zero_grad()
        for batch in batches:
            model(**batch).loss.backward()
        gradients.append(
            [grad.clone() for layer in gated_layers(model).values() for grad in (layer.A.grad, layer.B.grad)]
        )
    torch.testing.assert_close(gradients[1], gradients[0])

"""Invariant 2: several ablations in one forward are those one at a time, and a block resumed from its captured input
computes what the full forward does."""

from __future__ import annotations

import pytest
import torch

from qalora.adapter.ablation import ablate, scoring_mode
from qalora.adapter.layer import gated
from qalora.adapter.model import gated_layers
from qalora.kernels.loss import row_losses


def mean_loss(model, batch):
    with torch.no_grad():
        return float(row_losses(model, batch).double().sum()) / int((batch["labels"][:, 1:] != -100).sum())


def one_at_a_time(model, batch, ranks):
    """Drop and alone from two whole forwards a rank."""
    layers = gated_layers(model)
    closed = {name: torch.zeros(len(layer.A)) for name, layer in layers.items()}
    loss = mean_loss(model, batch)
    with gated(layers, closed):
        base_loss = mean_loss(model, batch)
    drop, alone = {}, {}
    for name, rank in ranks:
        one = torch.zeros(len(layers[name].A)).index_fill(0, torch.tensor(rank), 1.0)
        with gated(layers, {name: 1 - one}):
            drop[name, rank] = mean_loss(model, batch) - loss
        with gated(layers, {**closed, name: one}):
            alone[name, rank] = base_loss - mean_loss(model, batch)
    return loss, base_loss, drop, alone


RANKS = [(f"model.layers.{i}.{m}", k) for i in (0, 1) for m in ("self_attn.v_proj", "mlp.down_proj") for k in (0, 2, 3)]


@pytest.mark.parametrize("memory", [0, 10**6, 10**9], ids=["one", "some", "all"])
@pytest.mark.parametrize("four_bit", [False, True], ids=["16bit", "4bit"])
def test_ablate_equals_one_rank_at_a_time(tiny_adapter, make_batch, four_bit, memory):
    model, batch = tiny_adapter(r=4, four_bit=four_bit), make_batch(rows=5)
    batch["attention_mask"][1, 9:] = 0
    batch["labels"][1, 9:] = -100
    loss, base_loss, drop, alone = one_at_a_time(model, batch, RANKS)
    with scoring_mode(model):
        found = ablate(model, [batch], RANKS, memory=memory)
    assert (found.loss, found.base_loss) == (pytest.approx(loss, abs=1e-7), pytest.approx(base_loss, abs=1e-7))
    assert found.drop == pytest.approx(drop, abs=2e-6)
    assert found.alone == pytest.approx(alone, abs=2e-6)
    assert min(abs(score) for score in (*drop.values(), *alone.values())) > 2e-5
    assert mean_loss(model, batch) == loss  # open again


def test_ablate_in_fp32_over_a_bf16_base_is_the_fp32_model(tiny_adapter, make_batch):
    model, batch = tiny_adapter(r=4, dtype=torch.bfloat16), make_batch()
    with scoring_mode(model):
        found = ablate(model, [batch], RANKS, dtype=torch.float32)
    model.base_model.model.float()
    loss, base_loss, drop, alone = one_at_a_time(model, batch, RANKS)
    assert (found.loss, found.base_loss) == (pytest.approx(loss, abs=1e-6), pytest.approx(base_loss, abs=1e-6))
    assert found.drop == pytest.approx(drop, abs=2e-6)
    assert found.alone == pytest.approx(alone, abs=2e-6)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("four_bit", [False, True], ids=["16bit", "4bit"])
def test_a_block_resumed_from_its_captured_input_equals_the_full_forward(tiny_adapter, make_batch, block, four_bit):
    model, batch = tiny_adapter(r=4, four_bit=four_bit), make_batch()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    layers, name = gated_layers(model), f"model.layers.{block}.self_attn.q_proj"
    blocks = model.get_base_model().model.layers
    captured, outputs = {}, []

    def capture(module, args, kwargs):
        captured.update(args=args, kwargs=kwargs)

    def keep(module, args, output):
        outputs.append(output)

    gate = {name: torch.tensor([1.0, 0.0, 1.0, 1.0])}
    with scoring_mode(model), torch.no_grad():
        hook = blocks[block].register_forward_pre_hook(capture, with_kwargs=True)
        model(**inputs)
        hook.remove()
        hook = blocks[block].register_forward_hook(keep)
        with gated(layers, gate):
            model(**inputs)  # from the embeddings on
            blocks[block](*captured["args"], **captured["kwargs"])  # from the input that open gates gave
        hook.remove()
    full, resumed = outputs
    assert torch.equal(full, resumed)

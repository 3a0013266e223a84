"""Invariant 2: several ablations in one forward are those one at a time, and a block resumed from its captured input
computes what the full forward does."""

from __future__ import annotations

import pytest
import torch

from qalora.adapter.ablation import loss_without, mean_loss, scoring_mode
from qalora.adapter.layer import gated
from qalora.adapter.model import gated_layers


@pytest.mark.parametrize("four_bit", [False, True], ids=["16bit", "4bit"])
def test_stacked_gates_equal_one_ablation_at_a_time(tiny_adapter, make_batch, four_bit):
    model, batch = tiny_adapter(r=4, four_bit=four_bit), make_batch(rows=3)
    layers, name = gated_layers(model), "model.layers.1.mlp.up_proj"
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    stacked = {key: value.repeat(4, 1) for key, value in batch.items()}
    closed_one = (1 - torch.eye(4)).repeat_interleave(3, dim=0)[:, None]  # (4 · rows, 1, r): rank k closed in copy k
    with scoring_mode(model), torch.no_grad():
        with gated(layers, {name: closed_one}):
            sums = model(**stacked).row_losses.view(4, 3).sum(1)
        single = torch.tensor([loss_without(model, [batch], name, rank) for rank in range(4)])
        assert not torch.allclose(single, torch.tensor(mean_loss(model, [batch])), atol=1e-4)
    torch.testing.assert_close(sums / tokens, single, rtol=0, atol=1e-6)


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

"""What a GGUF file holds of a tensor, and of an adapter, as the gguf library and llama.cpp read it."""

from __future__ import annotations

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quantize
from transformers import LlamaConfig

from qalora.deploy.gguf import narrower, read_adapter, stored, write_adapter

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=32,
)
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "shape", "asked", "kind"),
    [
        (f"{Q}.weight", (4, 64), "q8_0", "Q8_0"),
        (f"{Q}.weight", (4, 64), "q4_0", "Q4_0"),
        ("lm_head.weight", (4, 64), "q4_0", "Q8_0"),  # embeddings and head keep 8 bits
        (f"{Q}.weight", (4, 40), "q8_0", "F16"),  # no whole blocks
        ("model.norm.weight", (64,), "q8_0", "F32"),
        (f"{Q}.weight", (4, 64), "bf16", "BF16"),
    ],
)
def test_values_are_those_that_the_library_gives_back(name, shape, asked, kind):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs = GGMLQuantizationType[kind]
    expected = torch.from_numpy(dequantize(quantize(value.numpy(), theirs), theirs)).view(shape)
    assert torch.equal(stored(name, value, asked), expected)


def test_an_adapter_is_read_as_it_was_written(tmp_path):
    generator = torch.Generator().manual_seed(1)
    updates = {
        Q: (torch.randn(3, 64, generator=generator), torch.randn(64, 3, generator=generator), 2.0),
        DOWN: (torch.randn(3, 96, generator=generator), torch.randn(64, 3, generator=generator), 2.0),
    }
    write_adapter(tmp_path / "a.gguf", updates, CONFIG)
    found = read_adapter(tmp_path / "a.gguf", [Q, DOWN], CONFIG)
    for name, (A, B, s) in updates.items():
        torch.testing.assert_close(found[name][2] * found[name][1] @ found[name][0], s * B @ A, rtol=1e-5, atol=1e-5)
    reader = GGUFReader(tmp_path / "a.gguf")
    names = {tensor.name for tensor in reader.tensors}
    assert {"blk.0.attn_q.weight.lora_a", "blk.0.ffn_down.weight.lora_b"} <= names
    assert reader.fields["general.type"].contents() == "adapter"


def test_a_window_that_reaches_as_far_as_the_context_narrows_nothing():
    assert narrower(CONFIG) is None

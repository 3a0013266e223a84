"""Names and row order of GGUF, against llama.cpp's own permutation."""

from __future__ import annotations

import pytest
import torch
from transformers import GraniteMoeHybridConfig, LlamaConfig, Qwen2Config

from qalora.base.gguf_names import from_gguf, gguf_names, gguf_of, is_permuted, to_gguf
from qalora.errors import InputError

LLAMA = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, hidden_size=16, num_hidden_layers=4)
QWEN = Qwen2Config(num_attention_heads=4, num_key_value_heads=2, hidden_size=16, num_hidden_layers=4)


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight"),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
        ("model.layers.1.self_attn.k_proj.bias", "blk.1.attn_k.bias"),
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.norm.weight", "output_norm.weight"),
    ],
)
def test_names(name, there):
    assert gguf_names(name, LLAMA) == (there,)


def test_a_fused_layer_of_granite_4_is_two_of_llama():
    config = GraniteMoeHybridConfig(num_hidden_layers=4, layer_types=["attention"] * 4)
    names = [gguf_names(f"model.layers.3.shared_mlp.{part}_linear.weight", config) for part in ("input", "output")]
    assert names == [("blk.3.ffn_gate.weight", "blk.3.ffn_up.weight"), ("blk.3.ffn_down.weight",)]


@pytest.mark.parametrize(("name", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_rows_of_q_and_k_are_those_of_llama_cpps_converter(name, heads):
    name = f"model.layers.0.self_attn.{name}.weight"
    weight = torch.arange(heads * 4 * 16).view(heads * 4, 16).float()
    theirs = weight.reshape(heads, 2, 4 // 2, 16).swapaxes(1, 2).reshape(weight.shape)
    assert torch.equal(to_gguf(name, weight, LLAMA), theirs)
    assert torch.equal(from_gguf(name, theirs, LLAMA), weight)


def test_nothing_else_changes_places():
    weight = torch.arange(8.0)[:, None]
    for name, config in (("model.layers.0.self_attn.v_proj.weight", LLAMA), ("m.layers.0.self_attn.q_proj.bias", QWEN)):
        assert not is_permuted(name, config) and to_gguf(name, weight, config) is weight


def test_a_model_that_is_not_written_is_named():
    with pytest.raises(InputError, match="model_type=gpt2: GGUF is written and read for llama, mistral, ministral"):
        gguf_of(type("Config", (), {"model_type": "gpt2"})())

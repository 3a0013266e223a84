"""What a family's structure is, is held against loaded models in tests/test_families.py; here what it is made from."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, Lfm2Config, Phi3Config

from qalora.base.structure import check_plain, config_of, final_norm, sizes_of, structure_of
from qalora.errors import InputError

SMALL = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_shapes_are_those_that_transformers_saves(tied):
    config = Phi3Config(**SMALL, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    found = structure_of(config)
    saved = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if tied:
        del saved["lm_head.weight"]
    assert found.shapes == saved
    assert found.others == ("lm_head",) and found.architecture == "Phi3ForCausalLM"
    assert found.linear["model.layers.1.self_attn.qkv_proj"] == (16, 32)
    assert found.linear["model.layers.0.mlp.gate_up_proj"] == (16, 48) and len(found.linear) == 8
    assert found.is_linear("model.layers.0.mlp.down_proj.weight")
    assert not found.is_linear("lm_head.weight") and not found.is_linear("model.layers.0.input_layernorm.weight")


def test_sizes_add_up_to_the_model():
    config = Phi3Config(**SMALL, tie_word_embeddings=False)
    sizes = sizes_of(config.to_dict())
    weights = sum(fan_in * fan_out for _, fan_in, fan_out in sizes["linear"])
    model = AutoModelForCausalLM.from_config(config)
    assert weights + sizes["tables"] + sizes["rest"] == sum(p.numel() for p in model.parameters())
    assert sizes["intermediate_size"] == 24 and sizes["tables"] == 2 * 32 * 16


def test_the_norm_before_the_head_is_found_under_any_name():
    model = AutoModelForCausalLM.from_config(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))
    assert final_norm(model.model) == "embedding_norm"


def test_fields_that_are_no_config_are_named():
    with pytest.raises(InputError, match=r"^here: no config of a phi3 model \("):
        config_of({"model_type": "phi3", "num_hidden_layers": "two"}, "here")
    check_plain({"model_type": "starcoder2", **SMALL}, "here")

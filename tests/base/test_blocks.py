"""Blocks by their formulas, or by transformers' own model, are those of transformers."""

from __future__ import annotations

import pytest

from qalora.base.families import FAMILIES
from qalora.base.registry import ModelShape
from qalora.models import parameters

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        {"model_type": "granite", "attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "attention_bias": True},
        {"model_type": "glm4", "attention_bias": True},
        {"model_type": "olmo3"},
        {"model_type": "ministral3"},
        {"model_type": "qwen3_5_text", "num_hidden_layers": 5, "full_attention_interval": 2},
        {"model_type": "gemma4_text", "attention_k_eq_v": True, "num_global_key_value_heads": 1, "head_dim": 16},
        {"model_type": "gemma4_text", "num_hidden_layers": 4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
         "layer_types": ["sliding_attention", "full_attention"] * 2},
        {"model_type": "granitemoehybrid", "attention_bias": True, "layer_types": ["attention"] * 2,
         "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 80},
        {"model_type": "cohere2"},  # no formula is kept for it
        {"model_type": "exaone4"},
    ],
    ids=lambda fields: fields["model_type"],
)  # fmt: skip
def test_what_a_small_config_says_is_what_transformers_makes_of_it(fields, monkeypatch, meta_model, linear_layers):
    monkeypatch.setitem(FAMILIES, fields["model_type"], FAMILIES.get(fields["model_type"], FAMILIES["llama"]))
    config = {**TINY, **fields, "pad_token_id": 0}
    model, shape = meta_model(config), ModelShape.from_config(config)
    assert shape.linear_maps() == linear_layers(model)
    assert parameters(shape) == sum(parameter.numel() for parameter in model.parameters())

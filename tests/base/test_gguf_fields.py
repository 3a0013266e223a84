"""Keys are those that llama.cpp reads, and a config read back from them has what the first one had."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from qalora.base.gguf_fields import _fields, metadata, model_type_of
from qalora.base.structure import config_of, structure_of
from qalora.errors import InputError

SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=128, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
PATTERN = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]


def config(model_type: str, **own):
    return CONFIG_MAPPING[model_type](**SIZES | own)


# What is written beyond the sizes. The keys are llama.cpp's (src/llama-arch.cpp).
CASES = {
    "granite": (
        dict(attention_multiplier=0.25, embedding_multiplier=12.0, residual_multiplier=0.5, logits_scaling=8.0),
        {"attention.scale": 0.25, "embedding_scale": 12.0, "residual_scale": 0.5, "logit_scale": 8.0},
    ),
    "granitemoehybrid": (
        dict(embedding_multiplier=12.0, layer_types=["attention"] * 4, num_local_experts=0, num_experts_per_tok=0,
             shared_intermediate_size=160, position_embedding_type=None),
        {"feed_forward_length": 160, "expert_shared_feed_forward_length": 160, "rope.scaling.finetuned": False},
    ),
    "cohere2": (
        dict(logit_scale=0.25, layer_types=PATTERN, sliding_window=16, layer_norm_eps=1e-4),
        {"logit_scale": 0.25, "attention.sliding_window": 16, "attention.layer_norm_epsilon": 1e-4,
         "attention.sliding_window_pattern": [True, True, True, False]},
    ),
    "gemma2": (
        dict(query_pre_attn_scalar=32, attn_logit_softcapping=40.0, final_logit_softcapping=20.0, sliding_window=16),
        {"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0, "attention.sliding_window": 16,
         "attention.sliding_window_pattern": [True, False, True, False]},
    ),
    "lfm2": (
        dict(layer_types=["conv", "full_attention"] * 2, conv_L_cache=5, block_auto_adjust_ff_dim=False, norm_eps=1e-4),
        {"attention.head_count_kv": [0, 2, 0, 2], "shortconv.l_cache": 5, "attention.layer_norm_rms_epsilon": 1e-4},
    ),
    "qwen3_5_text": (
        dict(layer_types=["linear_attention"] * 3 + ["full_attention"], linear_num_key_heads=2,
             linear_num_value_heads=6, linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=3),
        {"full_attention_interval": 4, "ssm.group_count": 2, "ssm.time_step_rank": 6, "ssm.state_size": 8,
         "ssm.inner_size": 48, "ssm.conv_kernel": 3},
    ),
    "gemma4_text": (
        dict(layer_types=["sliding_attention", "full_attention"] * 2, global_head_dim=64, num_kv_shared_layers=2,
             hidden_size_per_layer_input=16, vocab_size_per_layer_input=32, use_double_wide_mlp=True),
        {"attention.key_length": 64, "attention.key_length_swa": 32, "attention.shared_kv_layers": 2,
         "embedding_length_per_layer_input": 16, "feed_forward_length": [96, 96, 192, 192],
         "attention.head_count_kv": [2, 2, 2, 2]},
    ),
}  # fmt: skip


class Tensor:
    shape = (64, 32)


@pytest.mark.parametrize("model_type", CASES)
def test_what_is_said_of_a_model_is_what_is_read(model_type):
    own, keys = CASES[model_type]
    first = config(model_type, **own)
    said = metadata(first)
    assert keys.items() <= said.items()
    assert said["block_count"], said["embedding_length"] == (4, 64)
    there = dict.fromkeys(
        ["per_layer_token_embd.weight", "blk.3.attn_q.weight", *(f"blk.{i}.attn_v.weight" for i in range(4))], Tensor
    )
    known = first.to_dict()
    fields = {name: value for name, value in _fields(model_type, said, there).items() if name in known}
    if model_type == "gemma4_text":
        fields |= {"global_head_dim": said["attention.key_length"]}
    again = config_of(fields, "file")
    assert structure_of(again).shapes == structure_of(first).shapes
    for name in (*own, "num_key_value_heads", "max_position_embeddings"):
        if name in known:
            assert vars(again)[name] == vars(first)[name], name


def test_an_architecture_is_that_of_one_model_type():
    assert model_type_of("olmo2", {}, "file") == "olmo2"
    assert model_type_of("olmo2", {"attention.sliding_window": 4096}, "file") == "olmo3"
    assert model_type_of("granite", {"feed_forward_length": 96}, "file") == "granite"
    assert model_type_of("granite", {"expert_shared_feed_forward_length": 96}, "file") == "granitemoehybrid"
    assert model_type_of("granite", {"rope.scaling.finetuned": False}, "file") == "granitemoehybrid"
    assert model_type_of("llama", {}, "file") == "llama"
    with pytest.raises(InputError, match=r"a GGUF file of architecture falcon, which is not read here \(llama, "):
        model_type_of("falcon", {}, "file")

"""What llama.cpp would compute otherwise is refused with what it is; tests/test_families.py has the same through a
merge, and what passes through llama.cpp."""

from __future__ import annotations

import re

import pytest
from transformers import CONFIG_MAPPING

from qalora.deploy.gguf_limits import check_written
from qalora.errors import InputError

SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=128, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GEMMA = dict(query_pre_attn_scalar=16)
WHOLE = dict(sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 64)
BIAS = "model.layers.0.self_attn.o_proj.bias"


def check(model_type, own, names=()):
    check_written(CONFIG_MAPPING[model_type](**SIZES | own), names)


@pytest.mark.parametrize(
    ("model_type", "own", "names", "refused"),
    [
        ("llama", dict(hidden_act="gelu"), (), "hidden_act=gelu: llama.cpp computes silu there"),
        ("qwen2", dict(head_dim=32), (), "heads of 32: llama.cpp has them 16 wide"),
        ("cohere", dict(tie_word_embeddings=False), (), "tie_word_embeddings=false: llama.cpp takes the embeddings"),
        ("olmo2", dict(tie_word_embeddings=True), (), "tie_word_embeddings=true: llama.cpp needs a head of its own"),
        ("seed_oss", {}, (BIAS,), "a bias of o_proj: llama.cpp has none there"),
        ("gemma2", GEMMA | dict(final_logit_softcapping=None), (), "final_logit_softcapping=null: llama.cpp caps"),
        ("gemma3_text", GEMMA | dict(attn_logit_softcapping=50.0), (), "attn_logit_softcapping=50: llama.cpp caps"),
        ("gemma3_text", GEMMA | dict(use_bidirectional_attention=True), (), "use_bidirectional_attention=True"),
        ("gemma", dict(use_bidirectional_attention=True), (), "use_bidirectional_attention=True: llama.cpp attends"),
        ("gemma", dict(tie_word_embeddings=False), (), "tie_word_embeddings=false: llama.cpp takes the embeddings"),
        ("arcee", dict(hidden_act="silu"), (), "hidden_act=silu: llama.cpp computes relu2 there"),
        ("arcee", {}, (BIAS,), "a bias of o_proj: llama.cpp has none there"),
        ("gemma4_text", dict(vocab_size_per_layer_input=30), (), "vocab_size_per_layer_input=30: llama.cpp has as"),
        ("smollm3", dict(no_rope_layers=[1, 1, 0, 1]), (), "no_rope_layers of another pattern: llama.cpp rotates"),
        ("exaone4", dict(num_hidden_layers=64) | WHOLE, (), "no windows in 64 blocks: llama.cpp has windows where"),
        ("cohere", dict(num_hidden_layers=64, use_qk_norm=False), (), "use_qk_norm=false and 64 blocks"),
        ("qwen3_5_text", dict(layer_types=["full_attention"] + ["linear_attention"] * 3), (), "no regular pattern"),
        ("qwen3_5_text", dict(linear_key_head_dim=8, linear_value_head_dim=16), (), "of different widths"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(model_type, own, names, refused):
    with pytest.raises(InputError, match=rf"{model_type} with .*{re.escape(refused)}.*; use .*format hf"):
        check(model_type, own, names)


@pytest.mark.parametrize(
    ("model_type", "own", "names"),
    [
        ("llama", dict(head_dim=32), (BIAS,)),
        ("qwen2", {}, ("model.layers.0.self_attn.q_proj.bias",)),
        ("gemma", dict(hidden_act="gelu"), ()),  # as published; it means the other one
        ("gemma2", GEMMA, ()),
        ("gemma2", dict(num_hidden_layers=46, head_dim=32, query_pre_attn_scalar=16), ()),  # the model of 27B
        ("gemma3_text", GEMMA, ()),
        ("exaone4", dict(num_hidden_layers=64, sliding_window=16), ()),
        ("cohere", dict(num_hidden_layers=64, use_qk_norm=True), ()),
        ("smollm3", {}, ()),
    ],
)
def test_what_it_computes_too_is_not(model_type, own, names):
    check(model_type, own, names)

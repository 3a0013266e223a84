"""What is said of a family is what transformers and gguf say of it."""

from __future__ import annotations

import gguf
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from qalora.base.families import BLOCK_MAPS, FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_of_transformers_is_as_the_record_says(name):
    config = AutoConfig.for_model(name, vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    block = AutoModelForCausalLM.from_config(config).model.layers[0]
    assert type(block.self_attn).__name__ == FAMILIES[name].attention
    linear = {path for path, module in block.named_modules() if type(module).__name__ == "Linear"}
    assert linear == set(BLOCK_MAPS)
    assert (block.self_attn.q_proj.bias is not None) == FAMILIES[name].attention_bias


@pytest.mark.parametrize("name", FAMILIES)
def test_gguf_knows_the_architecture(name):
    assert FAMILIES[name].gguf in gguf.MODEL_ARCH_NAMES.values()

"""What is said of a family is what transformers and gguf say of it."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from qalora.base.families import FAMILIES, WRAPPERS

IN_TRANSFORMERS = [name for name in FAMILIES if name in CONFIG_MAPPING]  # InternLM 3 brings its own code


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_a_block_of_transformers_is_as_the_record_says(name):
    sizes = dict(hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = AutoConfig.for_model(name, vocab_size=8, num_key_value_heads=1, head_dim=8, pad_token_id=0, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    family, modules = FAMILIES[name], {type(module).__name__ for module in model.modules()}
    assert {family.norm, family.mlp, family.attention} - {None} <= modules
    biased = [m.bias is not None for path, m in model.named_modules() if path.endswith("self_attn.q_proj")]
    assert all(found == family.attention_bias for found in biased)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.gguf])
def test_gguf_knows_the_architecture(name):
    assert FAMILIES[name].gguf.architecture in gguf.MODEL_ARCH_NAMES.values()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_head_of_a_vision_model_is_tied_where_its_config_does_not_say(wrapper):
    assert CONFIG_MAPPING[wrapper]().tie_word_embeddings == WRAPPERS[wrapper]

"""Names and configs of the text part of a vision model, against transformers' models without weights."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig

from qalora.base.families import in_decoder, in_wrapper, text_fields
from qalora.base.structure import completed, config_of, structure_of, text_part

TEXT = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=128, pad_token_id=0,
)  # fmt: skip
WRAPPERS = {
    "gemma3": ("gemma3_text", "siglip_vision_model"),
    "gemma4": ("gemma4_text", "gemma4_vision"),
    "mistral3": ("mistral", "pixtral"),
    "qwen3_5": ("qwen3_5_text", "qwen3_5_vision"),
}


def whole_config(wrapper: str, **more):
    text, vision = WRAPPERS[wrapper]
    return AutoConfig.for_model(
        wrapper, text_config=TEXT | {"model_type": text}, vision_config={"model_type": vision}, **more
    )


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_adapters_have_the_names_of_the_whole(wrapper):
    config = whole_config(wrapper)
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config)
    found = structure_of(text_part(config))
    assert found.wrapped and found.adapted == {
        name: (module.in_features, module.out_features)
        for name, module in whole.named_modules()
        if isinstance(module, nn.Linear) and ".language_model.layers." in name
    }
    assert {in_decoder(name) for name in found.adapted} == found.linear.keys()
    stored = {in_decoder(name) for name in whole.state_dict()}
    assert found.shapes.keys() <= stored


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_head_is_tied_as_the_whole_says(wrapper, tied):
    config = whole_config(wrapper, tie_word_embeddings=tied)
    config.get_text_config().tie_word_embeddings = not tied
    assert text_part(config).tie_word_embeddings == tied
    assert ("lm_head.weight" in structure_of(text_part(config)).shapes) == (not tied)
    fields = json.loads(config.to_json_string())
    assert text_fields(fields)["tie_word_embeddings"] == tied
    del fields["tie_word_embeddings"]  # then as this version of transformers has it
    assert text_fields(fields)["tie_word_embeddings"] == type(config)().tie_word_embeddings


def test_the_4_bit_form_of_a_whole_is_that_of_its_text_part():
    config = whole_config("gemma3", quantization_config={"load_in_4bit": True})
    assert text_part(config).quantization_config == {"load_in_4bit": True}
    assert not hasattr(config.get_text_config(), "quantization_config")  # the config that was given stays as it was


def test_a_decoder_by_itself_has_its_own_names():
    config = LlamaConfig(**TEXT)
    assert text_part(config) is config
    found = structure_of(config)
    assert not found.wrapped and found.adapted == found.linear
    assert found.is_linear("model.layers.1.mlp.up_proj.weight") and not found.is_linear("lm_head.weight")
    assert found.others == ("lm_head",) and found.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.vision_tower.layers.0.fc1.weight", "model.vision_tower.layers.0.fc1.weight"),
        ("vision_tower.language_model.x", "vision_tower.language_model.x"),
    ],
)
def test_names_in_files_of_either_age_are_the_decoder_s(stored, name):
    assert in_decoder(stored) == name
    if stored.startswith("model.language_model."):
        assert in_wrapper(name) == stored


def test_what_a_config_leaves_out_is_what_transformers_has():
    fields = {"model_type": "gemma3_text", "hidden_size": 64}
    found = completed(fields)
    assert found["hidden_size"] == 64 and found["head_dim"] == config_of(fields, "x").head_dim == 256

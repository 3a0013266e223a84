"""Registered models have the shapes that transformers makes of their configs, and the sizes that are published."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qalora.base.published import PUBLISHED
from qalora.base.registry import MODELS, ModelShape
from qalora.models import parameters

# One of several names with the same config.
DISTINCT = {json.dumps({**fields, "max_position_embeddings": 0}): name for name, (_, fields) in PUBLISHED.items()}


@pytest.mark.parametrize("name", DISTINCT.values())
def test_linear_layers_and_parameters_are_those_of_transformers(name, meta_model, linear_layers):
    fields, shape = PUBLISHED[name][1], MODELS[name][1]
    model = meta_model(fields)
    assert shape.linear_maps() == linear_layers(
        model, "model.language_model." if fields.get("wrapped_in") else "model."
    )
    assert parameters(shape) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-30b", 32_528_943_616),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("llama3.3-70b", 70_553_706_496),
        ("tinyllama-1.1b", 1_100_048_384),
        ("mistral-7b", 7_241_732_096),
        ("mistral-7b-v0.3", 7_248_023_552),
        ("ministral-8b", 8_019_808_256),
        ("mistral-small-24b", 23_572_403_200),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-32b", 32_762_123_264),
        ("gemma3-1b", 999_885_952),
        ("phi-4", 14_659_507_200),
        ("phi-4-mini", 3_836_021_760),
        ("granite3.3-8b-instruct", 8_170_864_640),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("smollm3-3b", 3_075_098_624),
        ("olmo2-7b", 7_298_617_344),
        ("olmo2-13b", 13_716_198_400),
    ],
)
def test_parameters_add_up_to_the_published_counts(name, published):
    assert parameters(MODELS[name][1]) == published


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("llama2-7b", "llama-7b"),
        ("llama2-13b", "llama-13b"),
        ("llama3.1-8b", "llama3-8b"),
        ("qwen3-8b-base", "qwen3-8b"),
    ],
)
def test_models_of_one_shape(name, twin):
    positions = {"llama2-7b": 4096, "llama2-13b": 4096, "llama3.1-8b": 131072, "qwen3-8b-base": 32768}
    assert MODELS[name][1] == replace(MODELS[twin][1], positions=positions[name])


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [("qwen3.5-4b", "qwen3_5"), ("gemma3-4b", "gemma3"), ("gemma4-e2b", "gemma4"), ("gemma3-1b", None)],
)
def test_vision_models_are_registered_with_their_text_part(name, wrapper):
    """The same shape as of a config.json that has the text part's fields inside, as published."""
    shape, fields = MODELS[name][1], PUBLISHED[name][1]
    assert shape.wrapped_in == wrapper
    if wrapper is not None:
        inside = {key: value for key, value in fields.items() if key not in ("wrapped_in", "tie_word_embeddings")}
        tied = {"tie_word_embeddings": True} if wrapper == "qwen3_5" else {}  # else by default
        found = ModelShape.from_config({"model_type": wrapper, "text_config": inside, "vision_config": {}, **tied})
        assert found == shape


def test_a_config_that_leaves_out_what_transformers_has_is_read():
    """As google/gemma-3-4b publishes its own: without heads, vocabulary, and whether the head is tied."""
    text = dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
    text |= dict(sliding_window=1024, rope_scaling={"factor": 8.0, "rope_type": "linear"})
    found = ModelShape.from_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert replace(found, positions=131072) == MODELS["gemma3-4b"][1]


def test_every_model_is_registered_once():
    hub_ids = [hub_id for hub_id, _ in MODELS.values()]
    assert len(set(hub_ids)) == len(hub_ids)

"""Registered models have the shapes that transformers makes of their configs, and the sizes that are published."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qalora.base.families import WRAPPERS
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


# What the Hub counts in the safetensors files of a model.
ON_THE_HUB = {
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-30b": 32_528_943_616, "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248, "llama3.1-8b-instruct": 8_030_261_248, "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824, "llama3.3-70b": 70_553_706_496, "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552, "ministral-8b": 8_019_808_256,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen3-0.6b": 751_632_384 - 151936 * 1024,  # which stores the tied head a second time
    "qwen3-1.7b": 2_031_739_904 - 151936 * 2048, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264, "gemma3-1b": 999_885_952, "phi-4": 14_659_507_200, "phi-4-mini": 3_836_021_760,
    "granite3.1-2b": 2_533_525_504, "granite3.1-2b-instruct": 2_533_531_648, "granite3.3-2b-instruct": 2_533_539_840,
    "granite3.3-8b-instruct": 8_170_864_640, "granite4.0-350m": 352_379_904, "granite4.0-1b": 1_631_750_144,
    "granite4.0-micro": 3_402_836_480,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624, "olmo2-7b": 7_298_617_344, "olmo2-13b": 13_716_198_400,
}  # fmt: skip
# The same with vision, and with the block of Qwen3.5 that predicts one token more.
WITH_VISION = {
    "gemma3-4b": 4_300_079_472, "gemma3-12b": 12_187_325_040, "gemma3-27b": 27_432_406_640,
    "ministral3-3b": 3_849_090_048, "ministral3-8b": 8_918_026_716 - 476,  # scales of its linear layers, in 8 bits
    "mistral-small-3.2-24b-instruct": 24_011_361_280,
    "qwen3.5-2b": 2_274_069_824, "qwen3.5-4b": 4_659_865_088, "qwen3.5-9b": 9_653_104_368,
    "qwen3.5-27b": 27_781_427_952,
}  # fmt: skip


@pytest.mark.parametrize("name", ON_THE_HUB)
def test_parameters_add_up_to_the_published_counts(name):
    assert parameters(MODELS[name][1]) == ON_THE_HUB[name]


def one_token_more(shape: ModelShape) -> int:
    """The last block of Qwen3.5 once more, with what it reads: the hidden states and the next token's embeddings."""
    d, block = shape.hidden_size, f"layers.{shape.num_hidden_layers - 1}."
    linear = sum(i * o for name, (i, o) in shape.linear_maps().items() if block in name)
    return linear + 2 * d * d + 5 * d + 2 * shape.head_dim


@pytest.mark.parametrize(
    ("names", "projector"),
    [
        (["gemma3-4b", "gemma3-12b", "gemma3-27b"], lambda d: 1152 * (d + 1)),
        (["ministral3-3b", "ministral3-8b", "mistral-small-3.2-24b-instruct"], lambda d: (d + 1024) * d),
        (["qwen3.5-2b", "qwen3.5-4b"], lambda d: (4096 + 1) * d),
        (["qwen3.5-9b", "qwen3.5-27b"], lambda d: (4608 + 1) * d),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_published_counts_of_vision_models_leave_one_tower(names, projector):
    """Of several sizes, which have it in common: a text part that is not as published would leave another one.

    Args:
        projector: hidden size → parameters between the tower and the text part that depend on it.
    """
    left = set()
    for name in names:
        shape = MODELS[name][1]
        further = one_token_more(shape) if shape.wrapped_in == "qwen3_5" else 0
        left.add(WITH_VISION[name] - parameters(shape) - projector(shape.hidden_size) - further)
    assert len(left) == 1 and min(left) > 3e8


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
    [
        ("qwen3.5-4b", "qwen3_5"),
        ("gemma3-4b", "gemma3"),
        ("gemma4-e2b", "gemma4"),
        ("ministral3-3b", "mistral3"),
        ("mistral-small-3.1-24b", "mistral3"),
        ("gemma3-1b", None),
    ],
)
def test_vision_models_are_registered_with_their_text_part(name, wrapper):
    """The same shape as of a config.json that has the text part's fields inside, as published."""
    shape, fields = MODELS[name][1], PUBLISHED[name][1]
    assert shape.wrapped_in == wrapper
    if wrapper is not None:
        inside = {key: value for key, value in fields.items() if key not in ("wrapped_in", "tie_word_embeddings")}
        tied = dict(tie_word_embeddings=fields["tie_word_embeddings"])
        said = {} if shape.tie_word_embeddings == WRAPPERS[wrapper] else tied
        found = ModelShape.from_config({"model_type": wrapper, "text_config": inside, "vision_config": {}, **said})
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

from __future__ import annotations

import re

import pytest

from qalora.errors import InputError
from qalora.recipe import advice, make_recipe, setting_types
from qalora.recipe.reading import with_preset
from qalora.recipe.spellings import ALIASES

MINIMAL = [("model", "tiny"), ("data.train", "rows.jsonl")]


def build(*settings, **more):
    return make_recipe([*MINIMAL, *with_preset([*settings, *more.items()])], origin="test")


def refusal(*settings):
    with pytest.raises(InputError) as error:
        build(*settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("training.per_device_eval_batch_size", "did you mean evaluation.batch_size?"),
        ("lora.per_device_train_batch_size", "did you mean training.micro_batch_size?"),
        ("batch_size", "did you mean training.micro_batch_size (rows a forward)"),
        ("bf16", "did you mean quantization.bnb_4bit_compute_dtype=bfloat16?"),
        ("training.cosine_min_lr_ratio", "did you mean training.lr_scheduler_type=cosine_with_min_lr and"),
        ("lora.use_dora", "(leave it out: every adapter is a plain LoRA in PEFT's form)"),
        ("deepspeed", "(leave it out: one process trains on one device)"),
    ],
)
def test_an_unknown_setting_of_another_tool_is_looked_up_first(key, says):
    assert f"{key}: unknown setting{'' if says[0] == '(' else ','} {says}" in refusal((key, 1))


def test_advice_names_settings_that_there_are():
    known = dict(setting_types())
    leaves = {name.rpartition(".")[2] for name in known}
    for table in (advice.NEAR, advice.NONE):
        assert table.keys() & (leaves | ALIASES.keys()) <= {
            "batch_size",
            "warmup",
            "adapter",
        }  # ours in another section
        for text in table.values():
            for name in re.findall(r"\b(?:data|training|lora|quantization|allocation|evaluation|logging)\.\w+", text):
                assert name in known, text
    assert not advice.NEAR.keys() & advice.NONE.keys()

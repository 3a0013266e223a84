from __future__ import annotations

import pytest

from qalora.errors import InputError
from qalora.recipe import make_recipe, setting_types
from qalora.recipe.reading import with_preset
from qalora.recipe.spellings import ALIASES

MINIMAL = [("model", "tiny"), ("data.train", "rows.jsonl")]


def build(*settings, **more):
    return make_recipe([*MINIMAL, *with_preset([*settings, *more.items()])], origin="test")


def get(recipe, key):
    for part in key.split("."):
        recipe = getattr(recipe, part)
    return recipe


def refusal(*settings):
    with pytest.raises(InputError) as error:
        build(*settings)
    return str(error.value)


@pytest.fixture
def write(tmp_path):
    def make(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return make


VALUES = {
    "model": "m", "data.train": "t", "data.format": "text", "data.max_seq_len": 77, "data.val_set_size": 0.5,
    "data.train_on_inputs": True, "data.packing": True, "training.micro_batch_size": 3, "training.num_epochs": 2.0,
    "lora.adapter": "a", "training.learning_rate": 0.5, "training.optim": "adamw_8bit",
    "quantization.bnb_4bit_quant_type": "fp4", "quantization.bnb_4bit_use_double_quant": False,
    "quantization.load_in_4bit": False, "lora.r": 4, "lora.alpha": 32, "lora.target_modules": ["q_proj"],
    "lora.dropout": 0.1, "lora.layers_to_transform": [1, 2], "data.validation": "v", "data.split": "a",
    "data.validation_split": "b", "data.name": "main", "data.chat_template": "c.jinja", "data.max_rows": 9,
    "evaluation.batch_size": 3, "evaluation.max_new_tokens": 7, "logging.steps": 4, "training.max_steps": 5,
    "training.warmup_steps": 6, "training.lr_scheduler_type": "polynomial", "training.eval_strategy": "epoch",
    "training.max_grad_norm": 0.7, "training.label_smoothing_factor": 0.2, "training.neftune_noise_alpha": 5.0,
    "training.gradient_checkpointing": "selective", "hub_model_id": "me/x",
}  # fmt: skip


SPECIAL = {"mask_prompt": False, "bits": 16, "quantization_bit": 16}  # the value that means the one above


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_sets_the_canonical_setting(alias):
    canonical = ALIASES[alias]
    section = canonical.rpartition(".")[0]
    for key in {alias, f"{section}.{alias}".lstrip(".")}:
        assert get(build((key, SPECIAL.get(alias, VALUES[canonical]))), canonical) == VALUES[canonical]


def test_every_alias_leads_to_a_setting():
    known = dict(setting_types())
    assert set(ALIASES.values()) <= known.keys()
    assert not ALIASES.keys() & known.keys() - {"model"}


def test_an_alias_in_another_section_is_unknown():
    assert "lora.lr: unknown setting" in refusal(("lora.lr", 1e-4))


@pytest.mark.parametrize(("bits", "in_4bit"), [(4, True), (16, False), (32, False)])
def test_bits(bits, in_4bit):
    assert build(bits=bits).quantization.load_in_4bit is in_4bit


@pytest.mark.parametrize("bits", [8, [4]])
def test_bits_that_are_none(bits):
    assert "load_in_4bit" in refusal(("bits", bits))


@pytest.mark.parametrize(("alias", "name"), [("input-output", "prompt-completion"), ("completion", "text")])
def test_format_aliases(alias, name):
    assert build(("data.format", alias)).data.format == name


def test_lists_from_text():
    assert build(lora_target="q_proj, v_proj").lora.target_modules == ["q_proj", "v_proj"]
    assert build(lora_target="all-linear").lora.target_modules == "all-linear"
    assert build(("training.report_to", "tensorboard")).training.report_to == ["tensorboard"]
    assert build(("training.report_to", "none")).training.report_to == []
    assert build(("evaluation.metrics", "loss,rougeL")).evaluation.metrics == ["loss", "rougeL"]
    assert build(("evaluation.choices", "yes, no")).evaluation.choices == ["yes", "no"]


def test_sources_are_one_text_or_several():
    assert build(("data.train", "a,b.jsonl")).data.train == "a,b.jsonl"
    assert build(("data.validation", ["a", "b"])).data.validation == ["a", "b"]
    assert "data.train" in refusal(("data.train", 5))


@pytest.mark.parametrize(
    ("setting", "given", "found"),
    [
        ("training.max_steps", -1, None),
        ("training.max_grad_norm", 0, 0.0),
        ("training.max_grad_norm", None, None),
        ("training.eval_strategy", False, "no"),  # YAML's no
        ("training.save_strategy", False, "no"),
        ("training.eval_steps", 0.1, 0.1),
        ("training.save_steps", "0.25", 0.25),
        ("training.warmup_steps", 100.0, 100),
        ("training.lr_scheduler_kwargs", {"min_lr": "1e-6"}, {"min_lr": 1e-6}),  # YAML's 1e-6 is a text
        ("training.lr_scheduler_kwargs", '{"min_lr_rate": 0.1}', {"min_lr_rate": 0.1}),
        ("training.lr_scheduler_kwargs", {"decay_type": "1-sqrt"}, {"decay_type": "1-sqrt"}),
        ("training.lr_scheduler_kwargs", None, {}),
        ("training.optim", "adamw_bnb_8bit", "adamw_8bit"),
        ("training.gradient_checkpointing", "unsloth", "offload"),
        ("lora.layers_to_transform", 3, [3]),
        ("lora.layers_to_transform", "0,1", [0, 1]),
        ("lora.target_modules", "all", "all-linear"),
        ("lora.target_modules", ".*(q|v)_proj", ".*(q|v)_proj"),
        ("lora.target_modules", "self_attn.q_proj, v_proj", ["self_attn.q_proj", "v_proj"]),
    ],
)
def test_values_as_other_tools_have_them(setting, given, found):
    value = get(build((setting, given)), setting)
    assert (value, type(value)) == (found, type(found))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.learnin_rate", "training.learning_rate"),
        ("lora.rank", "lora.r"),
        ("eval_step", "training.eval_steps"),
        ("logging_step", "logging.steps"),
        ("warmup_step", "training.warmup_steps"),
        ("max_step", "training.max_steps"),
        ("num_epoch", "training.num_epochs"),
        ("allocation.round", "allocation.rounds"),
        ("load_in_4bit", "quantization.load_in_4bit"),
        ("trainig.learning_rate", "training.learning_rate"),
        ("micro_batch_sise", "training.micro_batch_size"),
    ],
)
def test_an_unknown_setting_names_the_nearest(key, nearest):
    assert f"{key}: unknown setting, did you mean {nearest}?" in refusal((key, 1))


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [("data", "rows.jsonl", "data.train"), ("lora", 8, "lora.r"), ("training", [], "training.micro_batch_size")],
)
def test_a_value_for_a_section_is_told_its_settings(key, value, first):
    assert f"{key}={value!r}: a section; write its settings by their own names, such as {first}" in refusal(
        (key, value)
    )


def test_data_sets_with_settings_of_their_own_are_told_where_these_go():
    message = refusal(("datasets", [{"path": "a.jsonl", "type": "alpaca"}]))
    assert "name files, folders or Hub ids alone; what they hold is said by data.format, data.split" in message
    assert message.count("data.train=") == 1


def test_nothing_near_names_nothing():
    assert refusal(("zzzzqqq", 1)) == "test: zzzzqqq: unknown setting."

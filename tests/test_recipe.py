from __future__ import annotations

import inspect
import math
import re

import pytest
import yaml

from qalora import recipe as module
from qalora import spellings
from qalora.data.formats import ALPACA_WITH_INPUT, to_example
from qalora.data.tokenization import load_dataset
from qalora.errors import InputError
from qalora.recipe import (
    ALIASES,
    Recipe,
    load_recipe,
    make_recipe,
    parse_overrides,
    recipe_path,
    setting_types,
    with_preset,
)

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


# --------------------------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize("settings", [(), (("allocation.preset", "paper"),)], ids=["defaults", "preset"])
def test_the_papers_schedule(settings):
    """ALoRA, §4.3 and appendix E."""
    recipe = build(*settings)
    allocation = recipe.allocation
    assert (recipe.lora.r, allocation.prune_per_round, allocation.val_batch_size) == (8, None, 32)
    assert allocation.rounds_in(2000) == 8
    assert (allocation.warmup, allocation.interval) == ("1 epoch", "0.25 epochs")
    assert (recipe.training.learning_rate, recipe.training.lr_scheduler_type) == (1e-4, "linear")
    assert (recipe.training.warmup_ratio, recipe.training.eval_steps) == (0.06, 200)
    assert (recipe.training.early_stopping_patience, recipe.data.max_seq_len) == (10, 2048)


@pytest.mark.parametrize(("steps", "rounds"), [(20, 0), (300, 0), (999, 0), (1000, 8), (10_000, 8)])
def test_rounds_from_a_thousand_steps_on_unless_they_are_given(steps, rounds):
    assert build().allocation.rounds_in(steps) == rounds
    assert build(("allocation.rounds", 5)).allocation.rounds_in(steps) == 5
    assert build(("allocation.preset", "paper")).allocation.rounds_in(steps) == 8


def test_a_preset_yields_to_what_is_given_beside_it_and_wins_over_what_lies_below(write):
    file = write("model: m\ndata: {train: t}\nallocation: {rounds: 3, budget: parameters}\nlora: {init: gradient}\n")
    below = load_recipe(file)
    assert (below.allocation.rounds, below.allocation.budget, below.lora.init) == (3, "parameters", "gradient")
    recipe = load_recipe(file, [("allocation.interval", 5), ("allocation.preset", "paper"), ("lora.r", 4)])
    assert (recipe.lora.init, recipe.allocation.start, recipe.allocation.kind) == ("kaiming", "even", "sum")
    assert (recipe.allocation.rounds, recipe.allocation.interval, recipe.lora.r) == (8, 5, 4)
    assert recipe.allocation.budget == "ranks"
    file = write("model: m\ndata: {train: t}\nallocation: {rounds: 3, preset: paper}\n")
    assert load_recipe(file).allocation.rounds == 3
    assert "allocation.preset='papers'" in refusal(("allocation.preset", "papers"))


@pytest.mark.parametrize(
    ("settings", "sixteen_bit", "init", "start"),
    [
        ([], True, "quantization", "even"),
        ([("allocation.start", "scores")], False, "quantization", "scores"),
        ([], False, "gradient", "even"),
        ([("quantization.load_in_4bit", False)], True, "gradient", "even"),
        ([("allocation.rounds", 0)], True, "kaiming", "even"),  # plain LoRA
        ([("allocation.rounds", 0), ("lora.init", "quantization")], True, "quantization", "even"),
        ([("allocation.rounds", 0), ("allocation.start", "scores")], True, "quantization", "scores"),
        ([("lora.init", "kaiming")], True, "kaiming", "even"),
        ([("allocation.preset", "paper")], True, "kaiming", "even"),
    ],
)
def test_where_ranks_start_unless_it_is_given(settings, sixteen_bit, init, start):
    assert build(*settings).chosen_init(sixteen_bit=sixteen_bit) == init
    assert build(*settings).allocation.start == start


# ---------------------------------------------------------------------------------------------------------- aliases

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


# ----------------------------------------------------------------------------------------------------------- values


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


def test_labels_and_columns_are_text():
    assert build(("data.labels", {0: "negative", 1: 7})).data.labels == {"0": "negative", "1": "7"}


@pytest.mark.parametrize("duration", [20, 0.3, "1 epoch", "0.25 epochs"])
def test_durations_keep_their_type(duration):
    found = build(("allocation.warmup", duration)).allocation.warmup
    assert (found, type(found)) == (duration, type(duration))


@pytest.mark.parametrize(("size", "kind"), [(50, int), (0.1, float)])
def test_validation_size_is_rows_or_a_share(size, kind):
    assert type(build(val_size=size).data.val_set_size) is kind


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


def test_warm_up_is_a_share_or_a_count_and_what_is_said_later_counts(write):
    def warmup(*overrides):
        training = load_recipe(file, overrides).training
        return training.warmup_steps, training.warmup_ratio

    file = write("model: m\ndata: {train: t}\n")
    assert warmup() == (None, 0.06)
    assert warmup(("num_warmup_steps", 7)) == (7, None)
    file = write("model: m\ndata: {train: t}\ntraining: {warmup_ratio: 0.1}\n")
    assert warmup(("training.warmup_steps", 7)) == (7, None)
    file = write("model: m\ndata: {train: t}\ntraining: {lr_warmup_steps: 9}\n")
    assert warmup(("training.warmup_ratio", 0.2)) == (None, 0.2)
    assert warmup(("training.learning_rate", 0.2)) == (9, None)
    resolved = load_recipe(file).to_yaml()
    assert load_recipe(write(resolved)).to_yaml() == resolved


def test_paths_have_home_and_variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    recipe = build(
        ("model", "~/models/m"),
        ("data.train", "${DATA}/rows.jsonl"),
        ("data.validation", "$DATA/v"),
        ("output_dir", "$HOME/runs"),
    )
    assert (recipe.model, recipe.output_dir) == ("/home/me/models/m", "/home/me/runs")
    assert (recipe.data.train, recipe.data.validation) == ("/data/rows.jsonl", "/data/v")
    assert build(("data.train", "yahma/alpaca-cleaned")).data.train == "yahma/alpaca-cleaned"


# -------------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["training.learning_rate=2e-4"], [("training.learning_rate", "2e-4")]),
        (["--training.learning_rate", "2.0e-4"], [("training.learning_rate", 2e-4)]),
        (["--training.learning_rate=0.5"], [("training.learning_rate", 0.5)]),
        (["--data.packing"], [("data.packing", True)]),
        (["--data.packing", "--merge"], [("data.packing", True), ("merge", True)]),
        (["--data.packing", "lora.r=4"], [("data.packing", True), ("lora.r", 4)]),
        (["--merge", "output_dir=out"], [("merge", True), ("output_dir", "out")]),
        (["--data.packing", "lr=1.0"], [("data.packing", True), ("lr", 1.0)]),
        (["--output-dir", "runs/a"], [("output_dir", "runs/a")]),
        (["--training.seed", "-1"], [("training.seed", -1)]),
        (["--data.completion_template", "a=b"], [("data.completion_template", "a=b")]),
        (["data.train=a=b"], [("data.train", "a=b")]),
        (["data.train=my rows #2.jsonl"], [("data.train", "my rows #2.jsonl")]),
        (["output_dir=123"], [("output_dir", "123")]),
        (["data.prompt_template={a} b"], [("data.prompt_template", "{a} b")]),
        (['data.prompt_template="{a}\\n"'], [("data.prompt_template", "{a}\n")]),
        (["--evaluation.answer_pattern", "#### (.*)"], [("evaluation.answer_pattern", "#### (.*)")]),
        (["data.validation="], [("data.validation", None)]),
        (["data.columns={mr: prompt}"], [("data.columns", {"mr": "prompt"})]),
        (["data.train=[a.jsonl, 'b.csv']"], [("data.train", ["a.jsonl", "b.csv"])]),
        (["data.train=[ab]*.jsonl"], [("data.train", "[ab]*.jsonl")]),
        (["data.train=a.jsonl,b.jsonl"], [("data.train", "a.jsonl,b.jsonl")]),
        (["data.split=train[:10%]"], [("data.split", "train[:10%]")]),
        (["--data.validation", "null"], [("data.validation", None)]),
        (["lora.target_modules=*[qv]_proj: x"], [("lora.target_modules", "*[qv]_proj: x")]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else "",
)
def test_spellings_of_an_override(arguments, expected):
    assert parse_overrides(arguments) == expected


def test_a_float_without_a_dot_is_a_float():
    assert build(*parse_overrides(["lr=2e-4"])).training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["oops"], "oops: not an option"),
        (["data.columns={a: b"], "data.columns: the value '{a: b' is not"),
    ],
    ids=["bare-word", "not-yaml"],
)
def test_overrides_that_are_refused(arguments, message):
    with pytest.raises(InputError) as error:
        parse_overrides(arguments)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("training.max_steps", True), ("lora.r", True), ("data.labels", {0: False, 1: True}), ("data.train", True)],
)
def test_a_truth_value_is_no_number_and_no_text(setting, value):
    """`--lora.r` without its value, and YAML's yes and no."""
    assert re.search(rf"{setting}=.*: (a value is missing|yes, no)", refusal((setting, value)))


def test_the_command_line_wins_over_the_file(write):
    path = write("model: a\ndata: {train: t}\nlora: {r: 4, alpha: 8}\ntraining: {lr: 0.1}\n")
    recipe = load_recipe(path, [("training.learning_rate", 0.2), ("lora.r", 1)])
    assert (recipe.training.learning_rate, recipe.lora.r, recipe.lora.alpha) == (0.2, 1, 8)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.learnin_rate", "training.learning_rate"),
        ("lora.rank", "lora_rank"),
        ("allocation.round", "allocation.rounds"),
        ("load_in_4bit", "quantization.load_in_4bit"),
        ("trainig.learning_rate", "training.learning_rate"),
        ("micro_batch_sise", "training.micro_batch_size"),
    ],
)
def test_an_unknown_setting_names_the_nearest(key, nearest):
    assert f"{key}: unknown setting, did you mean {nearest}?" in refusal((key, 1))


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


@pytest.mark.parametrize("number", [math.nan, math.inf, "nan", "-inf"])
@pytest.mark.parametrize("key", ["training.learning_rate", "lr", "training.weight_decay", "data.val_set_size"])
def test_a_number_that_is_none_is_refused_as_such(tmp_path, key, number):
    message = refusal((key, number))
    assert f"{ALIASES.get(key, key)}={number!r}" in message
    assert "input should be a finite number" in message
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: {train: x}\ntraining: {learning_rate: .nan}\n")
    with pytest.raises(InputError, match="training.learning_rate=nan: input should be a finite number.$"):
        load_recipe(str(path))


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


def test_advice_names_settings_that_there_are():
    known = dict(setting_types())
    leaves = {name.rpartition(".")[2] for name in known}
    for table in (spellings.NEAR, spellings.NONE):
        assert table.keys() & (leaves | ALIASES.keys()) <= {
            "batch_size",
            "warmup",
            "adapter",
        }  # ours in another section
        for text in table.values():
            for name in re.findall(r"\b(?:data|training|lora|quantization|allocation|evaluation|logging)\.\w+", text):
                assert name in known, text
    assert not spellings.NEAR.keys() & spellings.NONE.keys()


def test_nothing_near_names_nothing():
    assert refusal(("zzzzqqq", 1)) == "test: zzzzqqq: unknown setting."


def test_all_problems_at_once():
    message = refusal(("lora.r", 0), ("training.optim", "sgd"), ("nonsense_key", 1), ("data.max_seq_len", "long"))
    for part in (
        "lora.r=0: input should be",
        "training.optim='sgd'",
        "nonsense_key: unknown",
        "data.max_seq_len='long'",
    ):
        assert message.count(part) == 1


def test_all_disagreements_at_once():
    with pytest.raises(InputError) as error:
        make_recipe([("training.warmup_steps", 30), ("training.warmup_ratio", 0.1)], origin="test")
    for part in ("model is missing", "data.train is missing", "training.warmup_steps=30"):
        assert part in str(error.value)


def test_a_setting_of_several_types_is_named_once():
    message = refusal(("data.val_set_size", "many"))
    assert message.count("data.val_set_size='many'") == 1 and "val_set_size.int" not in message
    message = refusal(("allocation.warmup", [1]))
    assert message.count("allocation.warmup=[1]") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([("data.val_set_size", 0)], "no validation rows: set data.validation"),
        (
            [("training.warmup_steps", 30), ("training.warmup_ratio", 0.1)],
            "training.warmup_steps=30 and training.warmup_ratio=0.1 say the same thing twice",
        ),
        (
            [("training.save_steps", 1.5)],
            "training.save_steps=1.5: a number of steps is whole, a share of the run is below 1",
        ),
        (
            [("training.lr_scheduler_type", "greedy"), ("training.eval_strategy", "no")],
            "training.lr_scheduler_type=greedy follows the validation loss, and training.eval_strategy=no takes none",
        ),
        (
            [("lora.target_modules", "(q|v")],
            "lora.target_modules='(q|v': no regular expression (missing ), unterminated",
        ),
        ([("lora.layers_to_transform", [])], "lora.layers_to_transform=[]: name blocks by their numbers, from 0 on"),
        ([("lora.layers_to_transform", -1)], "name blocks by their numbers, from 0 on"),
        ([("training.max_steps", 0)], "training.max_steps=0"),
        ([("data.train", "$NO_SUCH_PLACE/rows")], "data.train='$NO_SUCH_PLACE/rows': $NO_SUCH_PLACE is not set"),
        ([("allocation.start", "gradient")], "allocation.start='gradient': input should be 'even' or 'scores'"),
        (
            [("allocation.start", "scores"), ("lora.init", "gradient")],
            "allocation.start=scores chooses among the ranks of lora.init=quantization, and lora.init is gradient",
        ),
        (
            [("lora.init", "quantization"), ("quantization.load_in_4bit", False)],
            "lora.init=quantization gives back what 4 bits took, and quantization.load_in_4bit is false",
        ),
        (
            [("allocation.start", "scores"), ("quantization.load_in_4bit", False)],
            "allocation.start=scores gives back what 4 bits took, and quantization.load_in_4bit is false",
        ),
        ([("allocation.max_rank", 4)], "lora.r=8 must lie between allocation.min_rank=0 and max_rank=4"),
        ([("allocation.min_rank", 9)], "allocation.min_rank=9 is above lora.r=8"),
        ([("lora.r", 12), ("lora.alpha", 16)], "make alpha a multiple of r, e.g. lora.alpha=24"),
        (
            [("lora.r", 12), ("allocation.rounds", 0), ("allocation.start", "scores")],
            "make alpha a multiple of r, e.g. lora.alpha=24",
        ),
        ([("allocation.warmup", 1.5)], "allocation.warmup=1.5: give optimizer steps (20), a share"),
        ([("allocation.interval", "soon")], "allocation.interval='soon': give optimizer steps"),
        ([("training.learning_rate", 0)], "training.learning_rate=0: input should be greater than 0"),
        (
            [("training.gradient_accumulation_steps", 0)],
            "gradient_accumulation_steps=0: input should be greater",
        ),
    ],
    ids=lambda value: "-".join(key for key, _ in value) if isinstance(value, list) else "",
)
def test_settings_that_are_refused(settings, message):
    assert message in refusal(*settings)


def test_any_scaling_goes_without_allocation():
    assert build(("lora.r", 12), ("allocation.rounds", 0)).lora.alpha == 16


# ------------------------------------------------------------------------------------------- one name with two values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {train: t}\nlora: {r: 4}\ndata: {train: u}\n", "data stands twice, in lines 1 and 3; keep one"),
        ("model: m\n\nmodel: m\n", "model stands twice, in lines 1 and 3"),
        ("lora:\n  r: 4\n  alpha: 8\n  r: 8\n", "lora.r stands twice, in lines 2 and 4"),
        ("lora: {r: 4, r: 8}\n", "lora.r stands twice, in line 1"),
        ("data:\n  columns:\n    q: prompt\n    q: completion\n", "data.columns.q stands twice, in lines 3 and 4"),
        ("data:\n  labels: {yes: a, true: b}\n", "data.labels.True stands twice, in line 2"),
        ("data:\n  labels: {1: a, 0x1: b}\n", "data.labels.1 stands twice, in line 2"),
        ("data:\n  train:\n  - {a: 1,\n     a: 2}\n", "data.train.[].a stands twice, in lines 3 and 4"),
        ("x: &x {r: 1}\ny: &y {r: 2}\nlora:\n  <<: *x\n  <<: *y\n", "lora.<< stands twice, in lines 4 and 5"),
        ("x: &x {r: 1,\n  r: 2}\nlora: *x\n", "x.r stands twice, in lines 1 and 2"),
        (
            "training:\n  lr: 0.1\n  learning_rate: 0.2\n",
            "two values for training.learning_rate, training.lr=0.1 (line 2) and training.learning_rate=0.2 (line 3); "
            "keep one",
        ),
        ("lora: {r: 4}\nlora_r: 8\n", "two values for lora.r, lora.r=4 (line 1) and lora_r=8 (line 2)"),
        ("lora.r: 8\nlora:\n  r: 4\n", "two values for lora.r, lora.r=8 (line 1) and lora.r=4 (line 3)"),
        (
            "mask_prompt: true\ndata: {train_on_inputs: true}\n",
            "two values for data.train_on_inputs, mask_prompt=True (line 1) and data.train_on_inputs=True (line 2)",
        ),
    ],
)
def test_two_values_in_a_file_are_refused_with_both_places(write, text, message):
    path = write(text)
    with pytest.raises(InputError, match=f"^{re.escape(f'{path}: {message}')}"):
        load_recipe(path, MINIMAL)


def test_what_is_no_second_value(write):
    """Merges are replaced by what stands beside them; two spellings may agree; layers lie over each other."""
    path = write("lora: {r: 4, alpha: 8}\ntraining: {lr: 0.5, learning_rate: 0.5}\nmodel: m\n")
    assert load_recipe(path, [("data.train", "t"), ("lora.r", 2), ("lora_r", 2)]).lora.r == 2
    text = "data: {columns: &x {a: b, c: d}, train: t}\nmodel: m\n"
    assert load_recipe(write(text)).data.columns == {"a": "b", "c": "d"}
    text = "data:\n  train: t\n  columns: &x {a: b, c: d}\n  labels: {<<: *x, a: e}\nmodel: m\n"
    assert load_recipe(write(text)).data.labels == {"a": "e", "c": "d"}
    text = "data:\n  train: t\n  columns: &x {a: b}\n  labels: {<<: [*x, {a: c, d: e}]}\nmodel: m\n"
    assert load_recipe(write(text)).data.labels == {"a": "b", "d": "e"} == yaml.safe_load(text)["data"]["labels"]


def test_two_values_in_a_profile_are_refused(tmp_path, monkeypatch):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "mine.yaml").write_text("model: m\ndata: {train: t}\n")
    (tmp_path / "profiles" / "p.yaml").write_text("training:\n  lr: 1\n  lr: 2\n")
    monkeypatch.setattr(module, "recipes_dir", lambda: tmp_path)
    with pytest.raises(InputError, match=r"p\.yaml: training\.lr stands twice, in lines 2 and 3"):
        load_recipe("mine", profile="p")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora.r=1", "lora.r=2"], "command line: two values for lora.r, lora.r=1 and lora.r=2; keep one."),
        (["lora.r=1", "--lora-r", "2"], "command line: two values for lora.r, lora.r=1 and lora_r=2; keep one."),
        (
            ["--lr=1.0", "training.learning_rate=2.0"],
            "command line: two values for training.learning_rate, lr=1.0 and training.learning_rate=2.0; keep one.",
        ),
        (["model=b"], "command line: two values for model, model=a and model=b; keep one."),
    ],
)
def test_two_values_on_the_command_line_are_refused(arguments, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_recipe("alpaca", [("model", "a"), *parse_overrides(arguments)])


def test_a_value_of_the_command_line_with_a_key_twice_is_refused():
    with pytest.raises(InputError, match=r"^data\.columns: a stands twice, in line 1; keep one\.$"):
        parse_overrides(["data.columns={a: prompt, a: completion}"])


@pytest.mark.parametrize("name", ["columns", "labels"])
def test_two_values_of_one_text_are_refused(name):
    assert "1 stands twice" in refusal((f"data.{name}", {1: "a", "1": "b"}))


# ------------------------------------------------------------------------------------------------------------ files


def test_yaml_round_trip(write):
    recipe = build(
        ("data.labels", {0: "no", 1: "yes"}),
        ("allocation.warmup", 0.3),
        ("allocation.interval", 5),
        ("lr", 1e-5),
        ("data.prompt_template", "Grüße: {a}\nb"),
        ("lora.target_modules", "q_proj,v_proj"),
    )
    path = write(recipe.to_yaml())
    assert load_recipe(path) == recipe
    assert load_recipe(path).to_yaml() == recipe.to_yaml()
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_an_empty_section_changes_nothing(write):
    """All its lines commented out."""
    assert load_recipe(write("model: tiny\ndata: {train: rows.jsonl}\ntraining:\n  # seed: 1\n")) == build()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "a recipe is a mapping of settings, this file holds list"),
        ("a: [", "not a YAML file"),
        ("", "holds NoneType"),
    ],
    ids=["list", "broken", "empty"],
)
def test_files_that_are_refused(write, text, message):
    path = write(text)
    with pytest.raises(InputError) as error:
        load_recipe(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_recipes_by_name(tmp_path, monkeypatch):
    for name in ("alpaca", "quickstart"):
        (tmp_path / f"{name}.yaml").write_text("model: m\ndata: {train: t}\n")
    monkeypatch.setattr(module, "recipes_dir", lambda: tmp_path)
    assert recipe_path("alpaca") == tmp_path / "alpaca.yaml"
    with pytest.raises(InputError, match=r"recipe alpacca: .*did you mean alpaca\?.*alpaca, quickstart"):
        recipe_path("alpacca")


@pytest.mark.parametrize("name", module.recipe_names())
def test_shipped_recipes_are_valid(name):
    recipe = load_recipe(name, [("model", "tiny"), ("data.train", "rows.jsonl")])
    assert recipe.model == "tiny"


@pytest.mark.parametrize(
    ("name", "row", "prompt", "completion"),
    [
        ("sst2", {"sentence": "s", "label": 1}, "s\nThe sentiment of the given sentence is:", " positive"),
        (
            "boolq",
            {"passage": "p", "question": "q", "answer": False},
            "Reference document:\np\nQuestion:\nq\nAnswer:",
            " no",
        ),
        (
            "e2e",
            {"meaning_representation": "m", "human_reference": "r"},
            "Reference:\nm\nGenerate a customer review following the given reference.\n",
            "r",
        ),
        ("gsm8k", {"question": "1+1?", "answer": "2\n#### 2"}, "1+1?\nAnswer:", " 2\n#### 2"),
        (
            "dolly",
            {"instruction": "i", "context": "c", "response": "r"},
            ALPACA_WITH_INPUT.format(instruction="i", input="c"),
            "r",
        ),
    ],
)
def test_a_row_as_its_recipe_reads_it(name, row, prompt, completion):
    recipe = load_recipe(name, [("model", "tiny")])
    taken = inspect.signature(to_example).parameters
    example = to_example(row, 0, **{key: value for key, value in recipe.data.reading().items() if key in taken})
    assert ("".join(turn.text for turn in example.prompt), example.reference) == (prompt, completion)
    assert completion.strip() in (recipe.evaluation.choices or [completion.strip()])
    if recipe.evaluation.answer_pattern:
        assert re.search(recipe.evaluation.answer_pattern, completion)[1] == "2"


def test_every_setting_of_the_data_reaches_the_reader():
    taken = inspect.signature(load_dataset).parameters.keys() - {"source", "tokenizer", "split", "limit"}
    assert module.DataConfig().reading().keys() == taken


def test_nine_recipes_are_shipped():
    assert module.recipe_names() == [
        "alpaca", "alpaca-clean", "boolq", "dolly", "e2e", "gsm8k", "oasst1", "quickstart", "sst2",
    ]  # fmt: skip


@pytest.mark.parametrize("profile", module.profile_names())
def test_a_profile_lies_over_the_recipe_and_under_the_command_line(profile):
    settings = [("model", "tiny"), ("data.train", "rows.jsonl")]
    recipe = load_recipe("alpaca", settings, profile)
    assert recipe.training.fit == "auto"
    assert recipe.training.learning_rate == load_recipe("alpaca", settings).training.learning_rate
    assert load_recipe("alpaca", [*settings, ("training.fit", None)], profile).training.fit is None


def test_three_profiles_are_shipped_with_the_dtype_of_their_device():
    settings = [("model", "tiny"), ("data.train", "rows.jsonl")]
    dtypes = {
        name: load_recipe("alpaca", settings, name).quantization.bnb_4bit_compute_dtype
        for name in module.profile_names()
    }
    assert dtypes == {"24gb": "bfloat16", "cpu": "auto", "t4": "float16"}
    with pytest.raises(InputError, match=r"profile t5: no such profile; there are 24gb, cpu, t4\."):
        load_recipe("alpaca", settings, "t5")


def test_importance_follows_the_scoring_unless_given():
    def kind(*settings):
        return load_recipe("quickstart", [("model", "smollm2-135m"), *settings]).allocation.kind

    assert kind() == kind(("allocation.scoring", "exact")) == "sum"
    assert kind(("allocation.scoring", "path")) == kind(("allocation.importance", "path")) == "path"
    with pytest.raises(InputError, match=r"allocation.importance=path .* allocation.scoring=exact"):
        kind(("allocation.scoring", "exact"), ("allocation.importance", "path"))
    with pytest.raises(InputError, match=r"allocation.importance=drop .* allocation.scoring=path"):
        kind(("allocation.scoring", "path"), ("allocation.importance", "drop"))


@pytest.mark.parametrize(
    ("targets", "named"), [(["q_prj"], "q_prj is no"), ([], "none is no"), ("q_proj,lm_head", "lm_head is no")]
)
def test_targets_are_maps_of_a_block(targets, named):
    assert f"{named} linear map of a block; name some of q_proj, k_proj" in refusal(("lora.target_modules", targets))

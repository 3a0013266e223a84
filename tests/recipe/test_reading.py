from __future__ import annotations

import inspect
import math
import re

import pytest
import yaml

from qalora.data.formats import ALPACA_WITH_INPUT, to_example
from qalora.errors import InputError
from qalora.recipe import checked, load_recipe, parse_overrides, recipe_path
from qalora.recipe import reading as module
from qalora.recipe.spellings import ALIASES


def test_a_preset_yields_to_what_is_given_beside_it_and_wins_over_what_lies_below(refusal, write):
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


def test_a_float_without_a_dot_is_a_float(build):
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
def test_a_truth_value_is_no_number_and_no_text(refusal, setting, value):
    """`--lora.r` without its value, and YAML's yes and no."""
    assert re.search(rf"{setting}=.*: (a value is missing|yes, no)", refusal((setting, value)))


def test_the_command_line_wins_over_the_file(write):
    path = write("model: a\ndata: {train: t}\nlora: {r: 4, alpha: 8}\ntraining: {lr: 0.1}\n")
    recipe = load_recipe(path, [("training.learning_rate", 0.2), ("lora.r", 1)])
    assert (recipe.training.learning_rate, recipe.lora.r, recipe.lora.alpha) == (0.2, 1, 8)


@pytest.mark.parametrize("number", [math.nan, math.inf, "nan", "-inf"])
@pytest.mark.parametrize("key", ["training.learning_rate", "lr", "training.weight_decay", "data.val_set_size"])
def test_a_number_that_is_none_is_refused_as_such(refusal, tmp_path, key, number):
    message = refusal((key, number))
    assert f"{ALIASES.get(key, key)}={number!r}" in message
    assert "input should be a finite number" in message
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: {train: x}\ntraining: {learning_rate: .nan}\n")
    with pytest.raises(InputError, match="training.learning_rate=nan: input should be a finite number.$"):
        load_recipe(str(path))


def test_all_problems_at_once(refusal):
    message = refusal(("lora.r", 0), ("training.optim", "sgd"), ("nonsense_key", 1), ("data.max_seq_len", "long"))
    for part in (
        "lora.r=0: input should be",
        "training.optim='sgd'",
        "nonsense_key: unknown",
        "data.max_seq_len='long'",
    ):
        assert message.count(part) == 1


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
        load_recipe(path, [("model", "tiny"), ("data.train", "rows.jsonl")])


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
def test_two_values_of_one_text_are_refused(refusal, name):
    assert "1 stands twice" in refusal((f"data.{name}", {1: "a", "1": "b"}))


def test_an_empty_section_changes_nothing(build, write):
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


@pytest.mark.parametrize(("key", "end"), [("lora.rr", "did you mean lora.r?"), ("zzzz", "zzzz: unknown setting.")])
def test_a_message_has_one_end(key, end):
    with pytest.raises(InputError) as error:
        load_recipe("quickstart", [("model", "tiny"), ("data.train", "rows.jsonl"), (key, 1)])
    assert str(error.value).endswith(end)


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


def test_twelve_recipes_are_shipped():
    assert module.recipe_names() == [
        "alpaca", "alpaca-clean", "boolq", "chat", "dolly", "e2e", "gsm8k", "oasst1", "quickstart",
        "reasoning", "sst2", "tools",
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


def test_a_recipe_that_a_script_changed_is_held_to_the_same(write):
    recipe = load_recipe(write("model: x\ndata: {train: 'a,b.jsonl', labels: {0: bad}}\ntraining: {warmup_steps: 5}"))
    assert checked(recipe) == recipe
    assert checked(recipe).training.model_fields_set == recipe.training.model_fields_set
    with pytest.raises(InputError, match=r"^recipe: lora\.r=0: .*; training\.num_epochs='x': .*number"):
        checked(recipe.with_settings({"lora.r": 0, "training.num_epochs": "x"}))
    with pytest.raises(InputError, match="warmup_ratio=0.1 say the same thing twice"):
        checked(recipe.with_settings({"training.warmup_ratio": 0.1}))
    for name, told in (("max_steps", "did you mean training.max_steps"), ("lora.rank", r"lora\.rank: no such setting")):
        with pytest.raises(InputError, match=told):
            recipe.with_settings({name: 1})


def test_paths_may_be_paths(write, tmp_path):
    file = write(f"model: x\ndata: {{train: {tmp_path}/rows.jsonl}}")
    paths = {"model": tmp_path, "output_dir": tmp_path / "run", "lora.adapter": tmp_path / "adapter"}
    recipe = load_recipe(file, paths | {"data.train": [tmp_path / "a.jsonl", "b.jsonl"]})
    assert [recipe.model, recipe.output_dir, recipe.lora.adapter] == list(map(str, paths.values()))
    assert recipe.data.train == [f"{tmp_path}/a.jsonl", "b.jsonl"]
    assert load_recipe(file, {"data.train": tmp_path / "a,b.jsonl"}).data.train == f"{tmp_path}/a,b.jsonl"

from __future__ import annotations

import inspect

import pytest
import yaml

from qalora.data.tokenization import load_dataset
from qalora.errors import InputError
from qalora.recipe import Recipe, load_recipe, make_recipe
from qalora.recipe.reading import with_preset
from qalora.recipe.settings import DataConfig

MINIMAL = [("model", "tiny"), ("data.train", "rows.jsonl")]


def build(*settings, **more):
    return make_recipe([*MINIMAL, *with_preset([*settings, *more.items()])], origin="test")


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


def test_labels_and_columns_are_text():
    assert build(("data.labels", {0: "negative", 1: 7})).data.labels == {"0": "negative", "1": "7"}


@pytest.mark.parametrize("duration", [20, 0.3, "1 epoch", "0.25 epochs"])
def test_durations_keep_their_type(duration):
    found = build(("allocation.warmup", duration)).allocation.warmup
    assert (found, type(found)) == (duration, type(duration))


@pytest.mark.parametrize(("size", "kind"), [(50, int), (0.1, float)])
def test_validation_size_is_rows_or_a_share(size, kind):
    assert type(build(val_size=size).data.val_set_size) is kind


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


def test_a_setting_of_several_types_is_named_once():
    message = refusal(("data.val_set_size", "many"))
    assert message.count("data.val_set_size='many'") == 1 and "val_set_size.int" not in message
    message = refusal(("allocation.warmup", [1]))
    assert message.count("allocation.warmup=[1]") == 1


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


def test_every_setting_of_the_data_reaches_the_reader():
    taken = inspect.signature(load_dataset).parameters.keys() - {"source", "tokenizer", "split", "limit"}
    assert DataConfig().reading().keys() == taken


def test_importance_follows_the_scoring_unless_given():
    def kind(*settings):
        return load_recipe("quickstart", [("model", "smollm2-135m"), *settings]).allocation.kind

    assert kind() == kind(("allocation.scoring", "exact")) == "sum"
    assert kind(("allocation.scoring", "path")) == kind(("allocation.importance", "path")) == "path"
    with pytest.raises(InputError, match=r"allocation.importance=path .* allocation.scoring=exact"):
        kind(("allocation.scoring", "exact"), ("allocation.importance", "path"))
    with pytest.raises(InputError, match=r"allocation.importance=drop .* allocation.scoring=path"):
        kind(("allocation.scoring", "path"), ("allocation.importance", "drop"))


@pytest.mark.parametrize(("targets", "named"), [([], "none is no"), ("q_proj,lm_head", "lm_head is no")])
def test_targets_are_linear_layers_of_a_block(targets, named):
    assert f"{named} linear layer of a block; name some of q_proj, k_proj" in refusal(("lora.target_modules", targets))

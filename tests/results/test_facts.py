"""What a run's folder says of the run, and what is left out of it."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml

from qalora.results.card import adapter_card
from qalora.results.facts import hub_ids, lasting, read_command, read_run, with_command, without_paths


@pytest.mark.parametrize(
    ("text", "is_left"),
    [
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("data.train=/home/me/a b/rows.jsonl", "data.train=rows.jsonl"),
        ("data.train=[/home/a.jsonl,/home/b.jsonl]", "data.train=[a.jsonl,b.jsonl]"),
        ("~/models/llama", "llama"),
        ("./here/rows.csv", "rows.csv"),
        ("../up/", "up"),
        ("tatsu-lab/alpaca", "tatsu-lab/alpaca"),
        ("data/rows.jsonl", "data/rows.jsonl"),
        ("/no_think", "/no_think"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("lora.target_modules=.*\\.(q|v)_proj", "lora.target_modules=.*\\.(q|v)_proj"),
        ("training.learning_rate=1e-4", "training.learning_rate=1e-4"),
        ("", ""),
    ],
)
def test_places_of_this_machine_are_named_by_their_last_name(text, is_left):
    assert without_paths(text) == is_left


def test_the_command_is_kept_without_what_concerns_one_attempt():
    words = [
        "--model", "llama-7b", "--recipe", "alpaca", "--output-dir", "out", "--overwrite",
        "--resume-from-checkpoint=auto",
        "--output_dir=x", "--push-to-hub", "me/x", "hub_model_id=me/y", "--hub-private-repo", "--hub_private_repo",
        "true", "training.max_steps=3", "data.prompt_template=a 'b'",
    ]  # fmt: skip
    left = ["--model", "llama-7b", "--recipe", "alpaca", "training.max_steps=3", "data.prompt_template=a 'b'"]
    assert lasting(words) == left
    text = with_command("model: x\n", words)
    assert read_command(text) == left and yaml.safe_load(text) == {"model": "x"}
    assert shlex.split(text.splitlines()[0])[:3] == ["#", "qalora", "finetune"]
    assert with_command("model: x\n", None) == "model: x\n" and read_command("model: x\n") is None


def test_data_sets_of_the_hub_are_told_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "rows").mkdir()
    assert hub_ids(["tatsu-lab/alpaca", "mine/rows", "data/rows.jsonl", "qalora:quickstart", "/a/b", "rows.csv"]) == [
        "tatsu-lab/alpaca"
    ]
    assert hub_ids("a/b,c/d") == ["a/b", "c/d"] and hub_ids(None) == []


def test_an_old_run_says_what_it_knows(run):
    """Without the log, the command, the predictions and the plan, as earlier versions wrote it."""
    for name in ("log_history.jsonl", "predictions-before.jsonl", "predictions-after.jsonl"):
        (run / name).unlink()
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.partition("\n")[2])
    state = {"global_step": 12, "log_history": [{"step": 3, "loss": 2.0}]}
    (run / "checkpoint-12" / "trainer_state.json").write_text(json.dumps(state))
    facts = read_run(run)
    assert facts.log == [{"step": 3, "loss": 2.0}] and facts.command is None and facts.recipe_name is None
    card = adapter_card(run / "adapter")
    assert "qalora finetune --recipe recipe.yaml" in card and "| recipe |" not in card

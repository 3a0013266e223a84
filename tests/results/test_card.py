"""Model cards as the Hub and a reader find them, and whose words a README.md holds."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model

from qalora.card_files import CARD, clear_but_card, is_ours, is_users, keep_users_card, sealed, unsealed, write_card
from qalora.results.card import adapter_card, card_of, merged_card
from qalora.results.facts import hub_ids, lasting, read_command, read_run, with_command, without_paths
from qalora.training.run_folder import begin_folder, is_finished


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_a_card_says_what_the_run_was(run):
    card = adapter_card(run / "adapter")
    assert ModelCard(card).data.tags == ["lora", "qalora"]
    assert "# tales\n" in card and "[huggyllama/llama-7b](https://huggingface.co/huggyllama/llama-7b)" in card
    figures = section(card, "Before and after training")
    assert "| loss (nats per token) | 2.5 | 1.25 |" in figures and "| exact match (%) | 0 | 66.7 |" in figures
    training = section(card, "Training")
    for line in (
        "| base while training | NF4 with double quantization, computed in bfloat16 |",
        "| recipe | `alpaca` |",
        "| data | `tatsu-lab/alpaca` |",
        "| rows | 5 trained on, 2 held back |",
        "| optimizer steps | 12 of 8 rows |",
        "| rank budget | 12 |",
        "| ranks in the adapter | 12, after 2 rounds of allocation |",
        "| an answer ends with | `</s>` |",
    ):
        assert line in training
    ranks = section(card, "Ranks")
    assert "12 ranks in 5 linear layers; 1 has none." in ranks
    assert "| block | q | v | down |" in ranks and "| 0 | 2 | 1 | 4 |" in ranks and "| 1 | 3 | 2 | 0 |" in ranks
    again = section(card, "Repeat")
    assert "qalora finetune --model llama-7b --recipe alpaca lora.r=2" in again
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", again, re.DOTALL)[1])
    assert settings["data"] == {"train": "tatsu-lab/alpaca", "validation": None, "prompt_template": "/no_think {a}/{b}"}
    assert "/home/somebody" not in card and "More Information" not in card


def test_the_lines_that_load_an_adapter_load_it(run, tmp_path, save_tiny_llama, monkeypatch):
    """As they stand, on a base that is there; but for the 4 bits, which are the base's."""
    base = save_tiny_llama(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path / "lora")
    card = adapter_card(tmp_path / "lora")
    code = re.search(r"```python\n(.*?)```", section(card, "Load"), re.DOTALL)[1]
    ast.parse(code)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("path/to/this/folder", "lora"), names)
    assert isinstance(names["model"], PeftModel)
    four_bit = re.search(r"```python\n(.*?)```", section(adapter_card(run / "adapter"), "Load"), re.DOTALL)[1]
    tree = ast.parse(four_bit)
    calls = {ast.unparse(node.func): ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert calls["BitsAndBytesConfig"] == (
        "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, "
        "bnb_4bit_compute_dtype=torch.bfloat16)"
    )


def test_a_merged_card_says_how_far_it_was_verified(run, tmp_path):
    folder = tmp_path / "merged"
    folder.mkdir()
    report = {
        "model": "llama-7b", "adapter": str(run / "adapter"), "base": "dequantized", "format": "hf",
        "dtype": "bfloat16", "modules": 5, "caveat": None, "bytes": 13 * 10**9, "max_logit_difference": 0.0123,
        "mean_logit_difference": 0.001, "mean_adapter_effect": 0.5, "kl": 1e-6, "greedy_agreement": 0.998,
        "relative_difference": 0.002, "tolerance": 0.01,
    }  # fmt: skip
    (folder / "merge.json").write_text(json.dumps(report))
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    card = merged_card(folder)
    data = ModelCard(card).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == (
        "transformers",
        "huggyllama/llama-7b",
        "text-generation",
    )
    figures = section(card, "Merge")
    assert (
        "| largest logit difference | 0.0123 |" in figures
        and "| same likeliest token | 99.8% of positions |" in figures
    )
    assert "| loss (nats per token) | 2.5 | 1.25 |" in card and "12 ranks in 5 linear layers" in card
    shutil.rmtree(run)  # the adapter is gone: what it said is left out
    assert card_of(folder) != card and "Before and after" not in card_of(folder) and "0.0123" in card_of(folder)
    (folder / "merge.json").write_text(json.dumps({k: v for k, v in report.items() if "logit" not in k}))
    assert "was not compared" in card_of(folder)


def test_ranks_that_are_all_alike_are_a_sentence(adapter):
    folder = adapter({"model.layers.0.self_attn.q_proj": 4, "model.layers.0.self_attn.v_proj": 4})
    assert "Each of the 2 adapted linear layers has rank 4." in adapter_card(folder)


def test_a_card_is_ours_until_a_word_of_it_is_changed(tmp_path):
    text = "# A card\n\nwith words\n"
    assert is_ours(sealed(text)) and unsealed(sealed(text)) == text
    assert not is_ours(text)
    assert not is_ours(sealed(text).replace("words", "Words"))
    assert not is_ours(sealed(text) + "more\n")
    assert write_card(tmp_path, text) and write_card(tmp_path, "# Another\n")
    (tmp_path / CARD).write_text("mine")
    assert not write_card(tmp_path, text)
    assert (tmp_path / CARD).read_text() == "mine"


def test_pefts_empty_template_is_no_users(tmp_path, tiny_llama):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert "[More Information Needed]" in (tmp_path / CARD).read_text()
    assert not is_users(tmp_path / CARD)
    filled = (tmp_path / CARD).read_text().replace("[More Information Needed]", "me", 1)
    (tmp_path / CARD).write_text(filled)
    assert is_users(tmp_path / CARD)
    (tmp_path / CARD).write_text(ModelCard.from_template(ModelCardData(), developers="somebody").content)
    assert is_users(tmp_path / CARD)


def test_a_users_words_outlive_what_is_written_around_them(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    assert not keep_users_card(old, new)
    (old / CARD).write_text("mine")
    (old / "weights").write_text("x")
    assert keep_users_card(old, new) and (new / CARD).read_text() == "mine"
    assert clear_but_card(old)
    assert [path.name for path in old.iterdir()] == [CARD]
    (old / CARD).write_text(sealed("# ours"))
    assert not clear_but_card(old) and not old.exists()


def test_an_overwritten_run_leaves_a_users_readme_and_is_not_finished_by_it(run):
    (run / "adapter" / CARD).write_text("mine")
    said: list[str] = []
    begin_folder(run, None, said.append)
    assert [path.name for path in (run / "adapter").iterdir()] == [CARD]
    assert not is_finished(run)
    assert any("README.md: written by somebody, and stays" in line for line in said)
    assert not any("report" in path.name or "log_history" in path.name for path in run.iterdir())


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

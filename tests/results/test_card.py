"""Model cards as the Hub and a reader find them, and whose words a README.md holds."""

from __future__ import annotations

import ast
import json
import re
import shutil

import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model

from qalora.card_files import CARD
from qalora.results.card import adapter_card, card_of, merged_card
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
        "| ranks in the adapter | 12 after 2 rounds of allocation |",
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


def test_an_overwritten_run_leaves_a_users_readme_and_is_not_finished_by_it(run):
    (run / "adapter" / CARD).write_text("mine")
    said: list[str] = []
    begin_folder(run, None, said.append)
    assert [path.name for path in (run / "adapter").iterdir()] == [CARD]
    assert not is_finished(run)
    assert any("README.md: written by somebody, and stays" in line for line in said)
    assert not any("report" in path.name or "log_history" in path.name for path in run.iterdir())

"""`qalora models`."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qalora.base.registry import MODELS, ModelShape
from qalora.models import main, parameters
from qalora.plan import main as plan


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("config", "model"), [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)])
def test_parameters_are_those_of_the_model(config, model, tied):
    small = config(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    shape = ModelShape.from_config(small.to_dict())
    assert parameters(shape) == sum(parameter.numel() for parameter in model(small).parameters())


def test_it_lists_every_registered_model_with_the_memory_that_plan_has(capsys):
    assert main(["--json", "--gpu-memory", "8GiB"]) == 0
    found = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert found.keys() == MODELS.keys()
    assert found["llama-7b"]["parameters"] == 6_738_415_616  # as Meta published it
    for name in ("llama-7b", "llama3-8b", "qwen2.5-0.5b"):
        code = plan(["--model", name, "--gpu-memory", "8GiB", "--json"])
        said = json.loads(capsys.readouterr().out)
        assert (found[name]["planned"], found[name]["fits"]) == (said["total"], code == 0)
    assert not found["llama-30b"]["fits"] and found["llama2-7b"]["gated"] and not found["llama-7b"]["gated"]


def test_without_a_card_it_says_what_a_step_fitted_to_each_of_three_takes(capsys, monkeypatch):
    few = {name: MODELS[name] for name in ("llama-7b", "qwen3-32b", "qwen3.5-9b", "gemma4-e4b", "phi-4")}
    monkeypatch.setattr("qalora.models.MODELS", few)  # each is fitted to three cards
    assert main(["--json"]) == 0
    found = {model["name"]: model["cards"] for model in json.loads(capsys.readouterr().out)}
    assert all(cards.keys() == {"16GiB", "24GiB", "80GiB"} for cards in found.values())
    assert found["qwen3-32b"]["16GiB"] is None  # 32.8 billion weights of 4 bits alone are 15.3 GiB
    for name, card in (("qwen3-32b", "24GiB"), ("qwen3.5-9b", "16GiB"), ("gemma4-e4b", "24GiB"), ("phi-4", "80GiB")):
        code = plan(["--model", name, "--gpu-memory", card, "--json", "training.fit=auto"])
        assert (code, found[name][card]) == (0, json.loads(capsys.readouterr().out)["total"])
    main([])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines["qwen3-32b"].split()[-5:-2] == ["–", f"{found['qwen3-32b']['24GiB'] / 2**30:.1f}", "GiB"]
    assert lines["name"].split()[-6:] == ["in", "16GiB", "in", "24GiB", "in", "80GiB"]


@pytest.fixture
def few(monkeypatch):
    """A third of the models: it is not their list that counts."""
    names = ("llama-", "llama3", "qwen3-", "smollm2")
    monkeypatch.setattr("qalora.models.MODELS", {name: MODELS[name] for name in MODELS if name.startswith(names)})


@pytest.mark.usefixtures("few")
def test_settings_and_profiles_are_followed(capsys):
    main(["--json", "--gpu-memory", "80GiB"])
    usual = json.loads(capsys.readouterr().out)
    main(["--json", "--gpu-memory", "80GiB", "training.micro_batch_size=1", "data.max_seq_len=128"])
    less = json.loads(capsys.readouterr().out)
    assert all(small["planned"] < large["planned"] for small, large in zip(less, usual, strict=True))
    main(["--profile", "t4", "--gpu-memory", "15GiB"])
    out = capsys.readouterr().out
    assert "llama-30b" in out and "does not fit" in out and out.count("fits") >= 10


@pytest.mark.usefixtures("few")
def test_a_folder_of_that_name_changes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "llama-7b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["--gpu-memory", "8GiB"]) == 0
    assert "huggyllama/llama-7b" in capsys.readouterr().out

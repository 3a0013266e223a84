from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qalora.base.loading
from qalora.errors import InputError
from qalora.merge import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = tmp_path_factory.mktemp("base")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>").save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(str(path))
    return path


@pytest.mark.parametrize(
    ("flags", "base", "dtype"),
    [
        ([], "dequantized", torch.bfloat16),
        (["--base", "original", "--dtype", "float32"], "original", torch.float32),
        (["--no-quantize", "--dtype", "float32"], "original", torch.float32),
    ],
    ids=["defaults", "original base", "no-quantize"],
)
def test_the_printed_difference_is_the_measured_one(folder, adapter, tmp_path, capsys, flags, base, dtype):
    arguments = ["--model", str(folder), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert main(arguments + flags) == 0
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["base"] == base
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == dtype
    assert f"largest difference {report['max_logit_difference']:.3g}" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["model", "adapter", "output"])
def test_bad_input_is_named_before_any_weights_load(folder, adapter, tmp_path, monkeypatch, wrong):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(qalora.base.loading, "load_base", never)
    (tmp_path / "note.txt").write_text("mine")
    values = {"model": str(folder), "adapter": str(adapter), "output": str(tmp_path / "merged")}
    values[wrong] = {"model": "no-such-model", "adapter": str(folder), "output": str(tmp_path)}[wrong]
    with pytest.raises(InputError, match=values[wrong]):
        main(["--model", values["model"], "--adapter", values["adapter"], "--output", values["output"]])


@pytest.mark.parametrize("command", ["merge", "evaluate", "generate"])
def test_help_imports_no_torch(command):
    code = f"import sys, qalora.{command} as c; c.parser().format_help(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

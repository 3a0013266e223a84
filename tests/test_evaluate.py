from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qalora.base.loading
from qalora.errors import InputError
from qalora.evaluate import main, parser, settings

ROWS = [("Is water wet? ", "yes"), ("Is the sun cold? ", "no"), ("Do fish swim? ", "yes")]


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
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in ROWS]
    path.write_text("\n".join(lines) + "\n")
    return path


@torch.no_grad()
def test_the_json_holds_the_model_s_own_loss(folder, rows, tmp_path, capsys):
    command = ["--model", str(folder), "--no-quantize", "--dtype", "float32", "--data", str(rows), "--quiet"]
    command += [
        "--metrics",
        "loss,accuracy",
        "--rows",
        "2",
        "--output",
        str(tmp_path / "new" / "result.json"),
    ]
    assert main(command) == 0
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    assert json.loads(capsys.readouterr().out) == result

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    total, tokens = 0.0, 0
    for prompt, completion in ROWS[:2]:
        ids = tokenizer(prompt)["input_ids"]
        answer = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(ids) + answer])
        total += model(input_ids=torch.tensor([ids + answer]), labels=labels).loss.item() * len(answer)
        tokens += len(answer)
    assert result.keys() == {"rows", "supervised_tokens", "loss", "perplexity", "accuracy"}
    assert (result["rows"], result["supervised_tokens"]) == (2, tokens)
    assert result["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


def test_flags_become_settings_of_a_recipe():
    flags = ["--model", "m", "--data", "f.csv", "--metrics", "loss,rougeL", "--no-quantize", "--rows", "7"]
    assert dict(settings(parser().parse_args(flags))) == {
        "model": "m",
        "data.train": "f.csv",
        "data.validation": "f.csv",
        "evaluation.rows": 7,
        "evaluation.metrics": ["loss", "rougeL"],
        "quantization.load_in_4bit": False,
    }


def test_flags_that_are_not_given_leave_the_recipe_alone():
    flags = ["--model", "m", "--recipe", "sst2"]
    assert settings(parser().parse_args(flags)) == [("model", "m")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data is missing"),
        (["--data", "ROWS", "--metrics", "bleu"], "bleu"),
        (["--data", "ROWS", "--metrics", "accuracy", "--choices", "true,false"], "none of the choices"),
        (["--data", "ROWS", "--adapter", "no-such-folder"], "no-such-folder"),
        (["--data", "ROWS", "--output", "FOLDER"], "a folder; name a file in it"),
    ],
    ids=["no data", "unknown metric", "wrong choices", "no adapter", "output is a folder"],
)
def test_bad_input_is_named_before_any_weights_load(folder, rows, monkeypatch, flags, message):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(qalora.base.loading, "load_base", never)
    flags = [{"ROWS": str(rows), "FOLDER": str(folder)}.get(flag, flag) for flag in flags]
    with pytest.raises(InputError, match=message):
        main(["--model", str(folder), *flags])

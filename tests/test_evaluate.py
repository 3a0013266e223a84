from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qalora.base.loading
from qalora.errors import InputError
from qalora.evaluate import main, own_settings, parser
from qalora.flags import settings

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

    loss, tokens = naive_loss(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), folder, ROWS[:2])
    assert result.keys() == {"rows", "supervised_tokens", "loss", "perplexity", "accuracy"}
    assert (result["rows"], result["supervised_tokens"]) == (2, tokens)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


@torch.no_grad()
def test_an_adapter_is_part_of_what_is_evaluated(folder, rows, tmp_path, capsys):
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    model.save_pretrained(tmp_path / "adapter")
    command = ["--model", str(folder), "--no-quantize", "--dtype", "float32", "--data", str(rows), "--quiet"]
    assert main([*command, "--adapter", str(tmp_path / "adapter")]) == 0
    found = json.loads(capsys.readouterr().out)["loss"]
    assert main(command) == 0
    bare = json.loads(capsys.readouterr().out)["loss"]
    assert found == pytest.approx(naive_loss(model.eval(), folder, ROWS)[0], rel=1e-5)
    assert abs(found - bare) > 1e-3


def naive_loss(model, folder, rows) -> tuple[float, int]:
    """(mean loss, supervised tokens), row by row, of the model's own forward."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    total, tokens = 0.0, 0
    for prompt, completion in rows:
        ids = tokenizer(prompt)["input_ids"]
        answer = [*tokenizer(completion)["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(ids) + answer])
        total += model(input_ids=torch.tensor([ids + answer]), labels=labels).loss.item() * len(answer)
        tokens += len(answer)
    return total / tokens, tokens


def given(flags: list[str]) -> list[tuple[str, Any]]:
    args = parser().parse_args(flags)
    return settings(args, own_settings(args))


def test_flags_become_settings_of_a_recipe():
    flags = ["--model", "m", "--data", "f.csv", "--metrics", "loss,rougeL", "--no-quantize", "--rows", "7"]
    flags += ["--choices", "yes,no", "--answer-pattern", "(.)", "--batch-size", "3", "--max-new-tokens", "5"]
    flags += ["--max-seq-len", "99", "--data-format", "text", "--dtype", "float32"]
    assert dict(given(flags)) == {
        "evaluation.choices": ["yes", "no"],
        "evaluation.answer_pattern": "(.)",
        "evaluation.batch_size": 3,
        "evaluation.max_new_tokens": 5,
        "data.max_seq_len": 99,
        "data.format": "text",
        "quantization.bnb_4bit_compute_dtype": "float32",
        "model": "m",
        "data.train": "f.csv",
        "data.validation": "f.csv",
        "evaluation.rows": 7,
        "evaluation.metrics": ["loss", "rougeL"],
        "quantization.load_in_4bit": False,
    }


def test_flags_that_are_not_given_leave_the_recipe_alone():
    flags = ["--model", "m", "--recipe", "sst2"]
    assert given(flags) == [("model", "m")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--data is missing"),
        (["--recipe", "alpaca"], "alpaca: has no data.validation"),
        (["--data", "ROWS", "--metrics", "bleu"], "bleu"),
        (["--data", "ROWS", "--metrics", "accuracy", "--choices", "true,false"], "none of the choices"),
        (["--data", "ROWS", "--adapter", "no-such-folder"], "no-such-folder"),
        (["--data", "ROWS", "--output", "FOLDER"], "a folder; name a file in it"),
        (["--data", "ROWS", "--predictions", "FOLDER"], "--predictions .*: a folder; name a file in it"),
        (["--data", "ROWS", "--predictions", "ROWS"], "--predictions .*: would replace a file that this command reads"),
        (["--data", "ROWS", "--output", "ROWS"], "--output .*: would replace a file that this command reads"),
        (["--data", "ROWS", "--output", "x.json", "--predictions", "x.json"], "--predictions x.json: would replace"),
        (["--data", "ROWS", "--metric", "loss"], "metric: unknown setting"),
        (["--data", "ROWS", "lr=1e-4"], "lr: has no effect here; settings of data, evaluation can follow"),
    ],
    ids=[
        "no data",
        "no validation rows",
        "unknown metric",
        "wrong choices",
        "no adapter",
        "output is a folder",
        "predictions are a folder",
        "predictions over the rows",
        "output over the rows",
        "predictions over the output",
        "typo",
        "no setting of an evaluation",
    ],
)
def test_bad_input_is_named_before_any_weights_load(folder, rows, monkeypatch, flags, message):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(qalora.base.loading, "load_base", never)
    flags = [{"ROWS": str(rows), "FOLDER": str(folder)}.get(flag, flag) for flag in flags]
    with pytest.raises(InputError, match=str(InputError(message))):
        main(["--model", str(folder), *flags])

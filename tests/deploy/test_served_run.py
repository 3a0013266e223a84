"""From rows to a server: what a run trained with is what checkpoint, adapter, merged folder, GGUF file and Modelfile
ask with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bitsandbytes.nn import Linear4bit
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora.adapter.its_base import other_base
from qalora.base import loading
from qalora.base.fingerprint import fingerprint
from qalora.base.registry import resolve
from qalora.data.chat_template import CHATML
from qalora.data.formats import to_example
from qalora.data.tokenization import render
from qalora.evaluate import main as evaluate
from qalora.finetune import main as finetune
from qalora.generate import main as generate
from qalora.merge import main as merge

CHATS = [
    {"messages": [{"role": "user", "content": f"{i} and 1?"}, {"role": "assistant", "content": f"It is {i + 1}."}]}
    for i in range(12)
]
ALPACA = [{"instruction": f"Add {i} and 1.", "input": "", "output": str(i + 1)} for i in range(12)]


@pytest.fixture(scope="module")
def base(save_tiny_llama, tmp_path_factory):
    """Without a chat template."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("base"), max_position_embeddings=512)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory, undrawn):
    """run(rows) → folder of a run of two steps, with a checkpoint, merged."""

    def train(rows: list[dict]) -> Path:
        there = tmp_path_factory.mktemp("run")
        (there / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (there / "recipe.yaml").write_text("training: {micro_batch_size: 2}\n")
        settings = {
            "data.train": there / "rows.jsonl", "data.val_set_size": 4, "allocation.rounds": 0, "training.max_steps": 2,
            "training.save_steps": 1, "training.eval_steps": 1, "lora.r": 2, "merge": "true", "logging.quiet": "true",
            "evaluation.after": "false", "evaluation.before": "false", "training.learning_rate": 1e-2,
        }  # fmt: skip
        flags = [
            "--model",
            base,
            "--recipe",
            there / "recipe.yaml",
            "--dtype",
            "float32",
            "--output-dir",
            there / "out",
        ]
        assert finetune([*map(str, flags), *(f"{key}={value}" for key, value in settings.items())]) == 0
        return there / "out"

    return train


@pytest.fixture(scope="module")
def chat_run(run):
    return run(CHATS)


def as_gguf(base, run, output):
    """(fields of the file, the Modelfile)"""
    arguments = ["--model", base, "--adapter", run / "adapter", "--output", output, "--format", "gguf", "--no-verify"]
    assert merge([*map(str, arguments)]) == 0
    return GGUFReader(str(output / "model.gguf")).fields, (output / "Modelfile").read_text()


@pytest.mark.parametrize("folder", ["checkpoint-1", "checkpoint-2", "merged"])
def test_the_built_in_template_goes_along_with_the_tokenizer(chat_run, folder):
    tokenizer = AutoTokenizer.from_pretrained(chat_run / folder)
    trained = render(to_example(CHATS[3], 3, format="messages"), tokenizer)
    text = tokenizer.apply_chat_template(CHATS[3]["messages"], tokenize=False)
    assert text == "".join(part for part, _ in trained)
    assert text.startswith("<|im_start|>user\n3 and 1?<|im_end|>\n<|im_start|>assistant\nIt is 4.</s>")


def test_the_template_lies_beside_the_adapter_too_and_in_its_exports(chat_run, base, tmp_path):
    output = tmp_path / "out"
    arguments = ["--model", base, "--adapter", chat_run / "adapter", "--output", output, "--format", "peft-uniform"]
    assert merge([*map(str, arguments)]) == 0
    for folder in (chat_run / "adapter", output):
        assert (folder / "chat_template.jinja").read_text() == CHATML
        assert (folder / "qalora.json").read_text() == (chat_run / "adapter" / "qalora.json").read_text()


def test_the_template_is_in_the_gguf_file_and_ollamas_words_for_it_in_the_modelfile(chat_run, base, tmp_path):
    fields, modelfile = as_gguf(base, chat_run, tmp_path / "gguf")
    assert fields["tokenizer.chat_template"].contents() == CHATML
    assert "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}</s>" in modelfile


def test_an_alpaca_runs_modelfile_asks_with_alpacas_prompt(run, base, tmp_path):
    fields, modelfile = as_gguf(base, run(ALPACA), tmp_path / "gguf")
    before, _, after = to_example(ALPACA[5], 5, format="alpaca").prompt[0].text.partition("Add 5 and 1.")
    assert f'TEMPLATE """{before}{{{{ .Prompt }}}}{after}{{{{ .Response }}}}' in modelfile
    assert "tokenizer.chat_template" not in fields


def test_adapter_and_checkpoints_know_the_weights_that_they_were_trained_on(chat_run, base):
    for folder in ("adapter", "checkpoint-1", "checkpoint-2"):
        known = json.loads((chat_run / folder / "qalora.json").read_text())
        assert (known["base"], known["stored_as"]) == (fingerprint(resolve(str(base))), "F32")
    assert other_base(chat_run / "adapter", resolve(str(base))) is None


# ------------------------------------------------------------------------------------------- a merged folder as --model


@pytest.fixture
def loads(monkeypatch):
    """What load_base returned, in turn."""
    found, load = [], loading.load_base
    monkeypatch.setattr(
        loading, "load_base", lambda *args, **options: found.append(load(*args, **options)) or found[-1]
    )
    return found


def maps_in_4bit(loaded) -> int:
    return sum(isinstance(module, Linear4bit) for module in loaded.model.modules())


def test_a_merged_folder_is_evaluated_as_it_is(chat_run, loads, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    arguments = ["--model", chat_run / "merged", "--data", tmp_path / "rows.jsonl", "--dtype", "float32", "--quiet"]
    assert evaluate([*map(str, arguments)]) == 0
    captured = capsys.readouterr()
    assert "a merged model, taken as it is: not quantized again" in captured.err
    assert maps_in_4bit(loads[0]) == 0
    model = AutoModelForCausalLM.from_pretrained(chat_run / "merged", dtype="float32").state_dict()
    for name, tensor in loads[0].model.state_dict().items():
        assert tensor.equal(model[name]), name


def test_a_merged_folder_answers_as_it_is_through_its_template(chat_run, loads, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "qalora.generate.answer", lambda model, tokenizer, ids, *rest, **options: asked.append(tokenizer.decode(ids))
    )
    assert generate(["--model", str(chat_run / "merged"), "--prompt", "3 and 1?"]) == 0
    assert asked == ["<|im_start|>user\n3 and 1?<|im_end|>\n<|im_start|>assistant\n"]
    assert maps_in_4bit(loads[0]) == 0


def test_training_on_a_merged_folder_says_that_it_is_quantized_again(chat_run, run, base, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    (tmp_path / "recipe.yaml").write_text("evaluation: {before: false, after: false}\n")
    flags = ["--model", chat_run / "merged", "--recipe", tmp_path / "recipe.yaml", "--output-dir", tmp_path / "out"]
    settings = [
        f"data.train={tmp_path / 'rows.jsonl'}",
        "data.val_set_size=4",
        "training.max_steps=1",
        "allocation.rounds=0",
    ]
    assert finetune([*map(str, flags), "--dtype", "float32", *settings, "training.learning_rate=1e-2"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "quantized again" in line]
    assert "(merged)" in line and "--no-quantize" in line


def test_an_adapter_trained_on_a_merged_folder_gets_the_base_of_its_training(chat_run, loads, monkeypatch, capsys):
    monkeypatch.setattr("qalora.generate.answer", lambda *arguments, **options: "")
    arguments = ["--model", chat_run / "merged", "--adapter", chat_run / "adapter", "--prompt", "a"]
    assert generate([*map(str, arguments)]) == 0
    assert maps_in_4bit(loads[0]) == 14
    assert "quantized again" in capsys.readouterr().err


def test_a_base_that_is_not_merged_needs_no_line(base, loads, monkeypatch, capsys):
    monkeypatch.setattr("qalora.generate.answer", lambda *arguments, **options: "")
    assert generate(["--model", str(base), "--prompt", "a"]) == 0
    assert maps_in_4bit(loads[0]) == 14
    assert "quantized" not in capsys.readouterr().err


def test_a_gguf_file_in_few_bits_is_quantized_again_with_a_line(chat_run, base, tmp_path):
    from qalora.base.precision import loaded_in_4bit

    for kind, said in (("q8_0", "Q8_0"), ("f16", None)):
        output = tmp_path / kind
        arguments = ["--model", base, "--adapter", chat_run / "adapter", "--output", output, "--format", "gguf"]
        assert merge([*map(str, arguments), "--gguf-type", kind, "--no-verify"]) == 0
        source = resolve(str(output / "model.gguf"))
        assert loaded_in_4bit(source, True, trained_on=False)[0] is False
        (output / "merge.json").unlink()  # as anyone's
        in_4bit, line = loaded_in_4bit(source, True, trained_on=False)
        assert in_4bit and (said is None) == (line is None)
        assert said is None or f"({said}) are quantized again" in line

"""`qalora preview` shows rows as they are trained on, needs no weights, and counts what the data set holds."""

from __future__ import annotations

import io
import json
import sys

import pytest

from qalora import cli, preview
from qalora.data.tokenization import load_dataset


@pytest.fixture(scope="module")
def model(save_tiny_llama, tmp_path_factory):
    """A folder with a tokenizer and a config, and no weights."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("model"))
    (folder / "model.safetensors").unlink()
    return folder


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": "1+1=", "completion": "2", "id": 1},
        {"prompt": "Größe\x1b ", "completion": "gut", "id": 2},
        {"prompt": "a", "completion": "b" * 20, "id": 3},
        {"prompt": "a" * 40, "completion": "b", "id": 4},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def shown(capsys, *arguments) -> str:
    assert cli.run(preview.main, [str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_rows_are_printed_with_what_is_learned_in_brackets(model, rows, capsys):
    text = shown(capsys, "--model", model, "--data", rows, "data.max_seq_len=16")
    assert text == (
        "── row 0: 6 tokens, 33% learned\n1+1=⟦2</s>⟧\n"
        "── row 1: 13 tokens, 31% learned\nGröße\\x1b ⟦gut</s>⟧\n"
        "── row 2: 16 tokens, 94% learned, cut at data.max_seq_len=16\na⟦bbbbbbbbbbbbbbb⟧\n"
        "── 3 rows, 35 tokens, 60% learned; longest row 42 tokens\n"
        "cut: 2 rows, at data.max_seq_len=16\n"
        "dropped: 1 rows; nothing to learn was left of 1 after the cut\n"
        "not used: id\n"
    )


def test_json_holds_the_same(model, rows, capsys):
    printed = shown(capsys, "--model", model, "--data", rows, "--max-seq-len", 16, "--rows", 2, "--json")
    assert printed.isascii()
    found = json.loads(printed)
    assert found["rows"] == [
        {
            "row": 0,
            "tokens": 6,
            "share_learned": 2 / 6,
            "cut": False,
            "segments": [{"text": "1+1=", "learned": False}, {"text": "2</s>", "learned": True}],
        },
        {
            "row": 1,
            "tokens": 13,
            "share_learned": 4 / 13,
            "cut": False,
            "segments": [{"text": "Größe\x1b ", "learned": False}, {"text": "gut</s>", "learned": True}],
        },
    ]
    assert found["data"] == {
        "rows": 3,
        "truncated": 2,
        "dropped": 1,
        "tokens": 35,
        "supervised_tokens": 21,
        "max_seq_len": 16,
        "longest": 42,
        "masked": 0,
        "unused": ["id"],
        "chat_by_default": False,
        "share_learned": 21 / 35,
    }


def test_a_recipe_and_settings_of_its_data_are_taken(model, rows, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {model}\ndata:\n  train: {rows}\n  prompt_template: 'Q: {{prompt}}'\n")
    assert shown(capsys, "--recipe", recipe, "--rows", 1, "data.train_on_inputs=true").startswith(
        "── row 0: 9 tokens, 89% learned\nQ⟦: 1+1=2</s>⟧\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_standard_output_will_do(model, rows, monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.run(preview.main, ["--model", str(model), "--data", str(rows)]) == 0
    out.flush()
    text = out.buffer.getvalue().decode(encoding)
    assert ("⟦gut</s>⟧" if encoding == "utf-8" else "[[gut</s>]]") in text
    assert ("Gr\\xf6\\xdfe" if encoding == "ascii" else "Größe") in text


def test_a_terminal_gets_colour(model, rows, monkeypatch):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", out := Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.run(preview.main, ["--model", str(model), "--data", str(rows)]) == 0
    assert "1+1=\x1b[1;32m2</s>\x1b[0m\n" in out.getvalue()
    assert "⟦" not in out.getvalue()
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.run(preview.main, ["--model", str(model), "--data", str(rows)]) == 0
    assert "1+1=⟦2</s>⟧\n" in out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "-1"], "--rows -1: must be 0 or more"),
        (["training.max_steps=3"], "training.max_steps: has no effect here; settings of data can follow"),
        (["--data", "no.jsonl"], "no.jsonl: no such file"),
    ],
)
def test_bad_input_is_one_sentence(model, rows, capsys, arguments, message):
    data = [] if "--data" in arguments else ["--data", str(rows)]
    assert cli.run(preview.main, ["--model", str(model), *data, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_marked_segments_are_the_text_of_the_row(model, rows):
    """Also where a tokenizer drops the blank that a stretch of its tokens begins with."""
    from qalora.base.loading import load_tokenizer
    from qalora.base.registry import resolve

    tokenizer = load_tokenizer(resolve(str(model)))
    for item in load_dataset(str(rows), tokenizer).items:
        assert "".join(text for text, _ in preview.decoded(item, tokenizer)) == tokenizer.decode(item["input_ids"])


def test_rows_are_cut_where_training_cuts_them(save_tiny_llama, tmp_path, capsys):
    """At the model's positions, whatever data.max_seq_len says."""
    folder = save_tiny_llama(tmp_path / "model", max_position_embeddings=8)
    capsys.readouterr()
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "abc", "completion": "defghijk"}))
    assert cli.run(preview.main, ["--model", str(folder), "--data", str(data)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("── row 0: 8 tokens, 62% learned, cut at data.max_seq_len=8\nabc⟦defgh⟧\n")
    assert printed.err == f"data.max_seq_len=2048: {folder} has 8 positions; longer rows are cut there\n"

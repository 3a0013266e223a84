"""Prompts and completions go through the chat template of a model that was taught to chat, and of no other."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qalora import cli, preview
from qalora.data.instruct import taught_to_chat
from qalora.data.tokenization import load_dataset

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
ROW = {"prompt": "1+1=", "completion": "2"}


@pytest.fixture
def model(tmp_path, save_tiny_llama):
    """save(template, eos, stops) → (the folder of a model, its tokenizer), with these tokens at which it stops."""

    def save(template: str | None, eos: str, stops: list[str] | None = None):
        folder = save_tiny_llama(tmp_path / "model")
        special = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|assistant|>", "<|user|>"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(special)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=eos, pad_token="<pad>", additional_special_tokens=special
        )
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer)}))
        ids = tokenizer.convert_tokens_to_ids(stops or [eos])
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        return folder, PreTrainedTokenizerFast.from_pretrained(folder)

    return save


@pytest.fixture
def rows(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("template", "eos", "stops", "taught"),
    [
        (CHATML, "<|im_end|>", None, True),
        (CHATML, "</s>", None, False),  # a pretrained model whose tokenizer brings a template, as Qwen2.5's does
        (CHATML, "</s>", ["</s>", "<|im_end|>"], True),  # as Gemma's, which its generation_config.json stops
        (PHI3, "</s>", ["</s>", "<|end|>"], True),
        (None, "</s>", None, False),
        ("{{ raise_exception('never') }}", "</s>", None, False),
    ],
)
def test_a_model_was_taught_to_chat_where_it_stops_at_its_template_s_end_of_turn(model, template, eos, stops, taught):
    _, tokenizer = model(template, eos, stops)
    assert taught_to_chat(tokenizer) is taught


def text_of(dataset, tokenizer):
    item = dataset.items[0]
    learned = [token for token, label in zip(item["input_ids"], item["labels"], strict=True) if label >= 0]
    return tokenizer.decode(item["input_ids"]), tokenizer.decode(learned)


def test_its_prompts_and_completions_are_chats(model, rows):
    _, tokenizer = model(CHATML, "<|im_end|>")
    dataset = load_dataset(rows(ROW), tokenizer)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}], tokenize=False
    )
    assert text_of(dataset, tokenizer) == (chat, "2<|im_end|>")
    assert dataset.report.chat_by_default and "data.chat=false" in str(dataset.report)
    plain = load_dataset(rows(ROW), tokenizer, chat=False)
    assert text_of(plain, tokenizer) == ("1+1=2<|im_end|>", "2<|im_end|>")
    assert not plain.report.chat_by_default and "data.chat" not in str(plain.report)


def test_blanks_that_joined_the_two_are_no_part_of_a_chat(model, rows):
    _, tokenizer = model(CHATML, "<|im_end|>")
    joined = {"prompt": "1+1= ", "completion": [" 2", "\ttwo"]}
    dataset = load_dataset(rows(joined), tokenizer)
    assert dataset.items == load_dataset(rows(ROW), tokenizer).items
    assert dataset.examples[0].references == ("2", "two")
    asked = load_dataset(rows(joined), tokenizer, chat=True)
    assert text_of(asked, tokenizer)[1] == " 2<|im_end|>"


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        (ROW, {"prompt_template": "Q: {prompt}\nA:", "completion_template": " {completion}"}),
        (ROW, {"completion_template": " {completion}"}),
        ({"instruction": "Add.", "input": "1+1", "output": "2"}, {}),
        ({"text": "1+1=2"}, {}),
        ({"prompt": "<|im_start|>user\n1+1=<|im_end|>\n", "completion": "2"}, {}),
        ({"prompt": "Say <|im_end|> ", "completion": " 2"}, {}),
    ],
    ids=["template", "of the completion", "alpaca", "text", "rendered before", "a special token"],
)
def test_what_has_a_form_of_its_own_keeps_it(model, rows, row, settings):
    _, tokenizer = model(CHATML, "<|im_end|>")
    dataset, asked = (load_dataset(rows(row), tokenizer, chat=chat, **settings) for chat in (None, False))
    assert dataset.items == asked.items and not dataset.report.chat_by_default


def test_prompts_of_messages_are_chats_as_they_are(model, rows):
    _, tokenizer = model(CHATML, "<|im_end|>")
    turns = {"prompt": [{"role": "user", "content": " 1+1= "}], "completion": [{"role": "assistant", "content": " 2"}]}
    dataset = load_dataset(rows(turns), tokenizer)
    assert text_of(dataset, tokenizer)[1] == " 2<|im_end|>" and not dataset.report.chat_by_default


def test_a_pretrained_model_s_rows_stay_as_they_are(model, rows):
    _, tokenizer = model(CHATML, "</s>")
    dataset = load_dataset(rows(ROW), tokenizer)
    assert text_of(dataset, tokenizer) == ("1+1=2</s>", "2</s>") and not dataset.report.chat_by_default


def test_each_source_has_its_own_form(model, rows, tmp_path):
    _, tokenizer = model(CHATML, "<|im_end|>")
    alpaca = tmp_path / "alpaca.jsonl"
    alpaca.write_text(json.dumps({"instruction": "Add.", "input": "1+1", "output": "2"}))
    dataset = load_dataset([rows(ROW), str(alpaca)], tokenizer)
    assert [example.chat for example in dataset.examples] == [True, False]


def test_preview_shows_and_says_it(model, rows, capsys):
    folder, _ = model(CHATML, "<|im_end|>")
    assert cli.run(preview.main, ["--model", str(folder), "--data", rows(ROW)]) == 0
    printed = capsys.readouterr().out
    assert "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧" in printed
    assert "the model was taught to chat, so prompt and completion go through its chat template" in printed

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qalora.data.references import read_example
from qalora.data.tokenization import load_dataset

PAIRS = {"format": "prompt-completion"}


@pytest.mark.parametrize(
    ("row", "settings", "references"),
    [
        ({"prompt": "p", "completion": "a"}, PAIRS, ("a",)),
        ({"prompt": "p", "completion": ["a", "b", "a"]}, PAIRS, ("a", "b")),
        ({"prompt": "p", "completion": "a", "references": ["b", "a"]}, PAIRS, ("a", "b")),
        ({"prompt": "p", "references": ["b", "a"]}, PAIRS, ("b", "a")),
        ({"prompt": "p", "completion": "a", "answers": ["b"]}, PAIRS, ("a", "b")),
        ({"input": "p", "output": ["a", "b"]}, PAIRS, ("a", "b")),
        ({"instruction": "p", "input": "", "output": ["a", "b"]}, {"format": "alpaca"}, ("a", "b")),
        ({"instruction": "p", "input": "", "references": ["a", "b"]}, {"format": "alpaca"}, ("a", "b")),
        (
            {"question": "p", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}},
            {**PAIRS, "columns": {"question": "prompt", "answers": "completion"}},
            ("a", "b"),
        ),
        (
            {"question": "p", "answer": ["a", "b"]},
            {**PAIRS, "prompt_template": "{question}", "completion_template": " {answer}."},
            (" a.", " b."),
        ),
        (
            {"prompt": "p", "completion": "0", "references": ["0", "1"]},
            {**PAIRS, "labels": {"0": "no", "1": "yes"}},
            ("no", "yes"),
        ),
        (
            {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
            "references": ["b"]}, {"format": "messages"},
            ("a", "b"),
        ),
    ],
    ids=[
        "one", "list", "beside", "references alone", "answers", "input and output", "alpaca",
        "alpaca, references alone", "SQuAD", "template", "labels", "chat",
    ],
)  # fmt: skip
def test_the_first_right_answer_is_learned_and_all_are_references(row, settings, references):
    example = read_example(row, 0, **settings)
    assert example.references == references
    assert [turn.text for turn in example.turns if turn.supervised] == [references[0]]


def test_a_data_set_of_rows_with_references_alone_is_recognized(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "p", "references": ["a", "b"]}) + "\n")
    backend = Tokenizer(models.WordLevel({"p": 0, "a": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    dataset = load_dataset(str(file), tokenizer)
    assert dataset.examples[0].references == ("a", "b")
    assert dataset.items[0]["labels"] == [-100, 1, 2]

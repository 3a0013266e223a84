"""What ends a turn, found from the template and from what rows teach, with templates of the kinds that models have."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qalora.data.ending import ending_of, taught_ends, template_ends
from qalora.data.tokenization import load_dataset

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}<|start|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}"
    "{{ '<|eom_id|>' if 'call:' in m.content else '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end_header|>\n\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content "
    "}}</s>{% endif %}{% endfor %}"
)
WORDS = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n### End\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
LINES = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% "
    "endif %}"
)
BOTH = "{% for m in messages %}{{ m.content }}{{ '\n# end\n</s>' if m.role == 'assistant' }}{% endfor %}"
NOTHING = "{% for m in messages %}{{ m.content }}{% endfor %}"
REFUSED = "{{ raise_exception('never') }}"


@pytest.fixture
def tokenizer():
    """Bytes, and the special tokens of several families; <|im_end|> and <call> are added ones that are not special."""
    special = ["<pad>", "</s>", "<|eot_id|>", "<|eom_id|>", "<|im_start|>", "<think>", "</think>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    backend.add_tokens([AddedToken("<|im_end|>", normalized=False), AddedToken("\n\n", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ("<|im_end|>",)),
        (LLAMA3, ("<|eot_id|>",)),
        (MISTRAL, ("</s>",)),
        (WORDS, ("\n### End",)),
        (BOTH, ("\n# end", "</s>")),
        (NOTHING, ()),
        (REFUSED, ()),
        (None, ("</s>",)),
    ],
    ids=["ChatML", "Llama 3", "Mistral", "words", "words and a token", "nothing", "refused", "built-in ChatML"],
)
def test_a_template_says_what_ends_a_turn(tokenizer, template, ends):
    tokenizer.chat_template = template
    assert template_ends(tokenizer) == ends


def test_ends_are_the_base_s_own_then_the_tokenizer_s_then_the_taught(tokenizer):
    tokenizer.chat_template = CHATML
    ids = tokenizer.convert_tokens_to_ids
    ending = ending_of(tokenizer, 77, ["<|eot_id|>", "\nUser:"])
    assert ending.tokens == (77, *ids(["</s>", "<|eot_id|>", "<|im_end|>"]))
    assert ending.texts == ("\nUser:",)
    assert ending.turns == tuple(ids(["<|eot_id|>", "<|im_end|>"]))
    assert ending_of(tokenizer, [ids("</s>"), 5]).tokens == (ids("</s>"), 5, ids("<|im_end|>"))


def chat(*turns):
    return {"messages": [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]}


def taught(tokenizer, folder, rows, **settings):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return taught_ends(load_dataset(str(file), tokenizer, **settings), tokenizer)


@pytest.mark.parametrize(
    ("template", "rows", "ends"),
    [
        (CHATML, [chat("a", "b", "c", "d")], ("<|im_end|>",)),
        (CHATML, [{"prompt": "a", "completion": "b"}], ("</s>",)),
        (CHATML, [{"text": "a"}], ("</s>",)),
        (LLAMA3, [chat("a", "call: b", "c", "d", "e", "f")], ("<|eot_id|>", "<|eom_id|>")),
        (MISTRAL, [chat("a", "b")], ("</s>",)),
        (WORDS, [chat("a", "b"), chat("a", "b\n\nc")], ("\n### End",)),
        (LINES, [chat("a", "b"), chat("c", "d e")], ("\n",)),
        (LINES, [chat("a", "two\nlines")], ()),
        (NOTHING, [chat("a", "b")], ()),
        (None, [chat("a", "b")], ("</s>",)),
        (CHATML, [chat("a", "<think>b</think>"), chat("a", "<think>b</think>c")], ("<|im_end|>",)),
        (NOTHING, [chat("a", "b<|eom_id|>"), chat("a", "<|eom_id|>c")], ()),
    ],
    ids=[
        "ChatML", "completions", "texts", "two of a family", "eos", "words", "line break", "line breaks within",
        "nothing", "built-in ChatML", "a token inside answers", "a token inside an answer and at the end of another",
    ],
)  # fmt: skip
def test_rows_say_what_ends_a_turn(tokenizer, tmp_path, template, rows, ends):
    tokenizer.chat_template = template
    assert taught(tokenizer, tmp_path, rows) == ends


@pytest.mark.parametrize(
    "rows", [[chat("a", "b", "c", "d")], [{"prompt": "a", "completion": "b"}]], ids=["chat", "pair"]
)
def test_rows_that_are_learned_whole_teach_the_same_ends(tokenizer, tmp_path, rows):
    tokenizer.chat_template = CHATML
    assert taught(tokenizer, tmp_path, rows, train_on_inputs=True) == taught(tokenizer, tmp_path, rows)


def test_where_a_row_is_cut_is_no_end(tokenizer, tmp_path):
    rows = [{"prompt": "a", "completion": f"{'b' * 8}<think> and more"}, {"prompt": "a", "completion": "b"}]
    assert taught(tokenizer, tmp_path, rows, max_seq_len=10) == ("</s>",)

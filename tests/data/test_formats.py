"""Rows of every format → examples; and the one sentence that each kind of bad input gets."""

from __future__ import annotations

import re

import pytest

from qalora.data.formats import ALPACA_WITH_INPUT, Turn, detect_format, to_example
from qalora.errors import InputError


def example(row, format="prompt-completion", **settings):
    return to_example(row, 7, format=format, source="rows.jsonl", **settings)


def refused(message: str, call, *arguments, **settings) -> None:
    """The call fails with exactly this sentence."""
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        call(*arguments, **settings)


# ---------------------------------------------------------------------------------------------------------- formats


def test_alpaca_with_input_is_stanfords_prompt():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert example(row, "alpaca").turns == (
        Turn(
            "user",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:",
            False,
        ),
        Turn("assistant", "3", True),
    )
    assert not example(row, "alpaca").chat


@pytest.mark.parametrize("row", [{"input": ""}, {"input": None}, {}], ids=["empty", "null", "absent"])
def test_alpaca_without_input_is_stanfords_other_prompt(row):
    prompt, completion = example({"instruction": "Say hi.", "output": "hi", **row}, "alpaca").turns
    assert prompt.text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay hi.\n\n### Response:"
    )
    assert completion.text == "hi"


def test_alpaca_braces_in_a_row_are_text():
    row = {"instruction": "Use {input.__class__}", "input": "{0}", "output": "{output}"}
    prompt, completion = example(row, "alpaca").turns
    assert "Use {input.__class__}\n\n### Input:\n{0}\n" in prompt.text
    assert completion.text == "{output}"


def test_alpaca_input_of_zero_is_an_input():
    row = {"instruction": "Negate.", "input": 0, "output": 0}
    assert example(row, "alpaca").prompt[0].text == ALPACA_WITH_INPUT.format(instruction="Negate.", input="0")


def test_sharegpt_speakers_become_roles_and_answers_are_learned():
    row = {
        "system": "Be brief.",
        "tools": '[{"name": "clock"}]',
        "conversations": [
            {"from": "human", "value": "Time?"},
            {"from": "function_call", "value": "clock()"},
            {"from": "observation", "value": "12:00"},
            {"from": "gpt", "value": "Noon."},
        ],
    }
    got = example(row, "sharegpt")
    assert got.turns == (
        Turn("system", "Be brief.", False),
        Turn("user", "Time?", False),
        Turn("assistant", "clock()", True),
        Turn("tool", "12:00", False),
        Turn("assistant", "Noon.", True),
    )
    assert (got.row, got.chat, got.tools) == (7, True, ({"name": "clock"},))
    assert got.prompt == got.turns[:4]
    assert got.reference == "Noon."


@pytest.mark.parametrize(
    ("speaker", "role"),
    [("user", "user"), ("assistant", "assistant"), ("chatgpt", "assistant"), ("system", "system"), ("tool", "tool")],
)
def test_sharegpt_knows_other_names_of_speakers(speaker, role):
    assert example({"conversations": [{"from": speaker, "value": "x"}]}, "sharegpt").turns[0].role == role


def test_messages_typed_parts_are_joined_and_loss_weight_0_is_not_learned():
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}, {"text": "c"}]},
            {"role": "assistant", "content": "wrong", "loss_weight": 0},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "right", "loss_weight": 1},
        ],
        "tools": [{"name": "f"}],
    }
    got = example(row, "messages")
    assert got.turns == (
        Turn("user", "abc", False),
        Turn("assistant", "wrong", False),
        Turn("user", "again", False),
        Turn("assistant", "right", True),
    )
    assert got.tools == ({"name": "f"},)
    assert got.prompt == got.turns[:3]


@pytest.mark.parametrize("chat", [None, True, False])
def test_only_chat_formats_are_chats_unless_asked(chat):
    conversation = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert example(conversation, "messages", chat=chat).chat is (chat is not False)
    assert example({"prompt": "q", "completion": "a"}, chat=chat).chat is (chat is True)
    assert example({"instruction": "q", "output": "a"}, "alpaca", chat=chat).chat is (chat is True)


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("input", "output")])
def test_prompt_completion_reads_both_pairs_of_keys(keys):
    got = example(dict(zip(keys, ("q", "a"), strict=True)))
    assert got.turns == (Turn("user", "q", False), Turn("assistant", "a", True))


def test_text_is_one_learned_turn():
    got = example({"text": "all of it"}, "text")
    assert got.turns == (Turn("assistant", "all of it", True),)
    assert (got.prompt, got.reference, got.chat) == ((), "all of it", False)


def test_no_answer_leaves_the_last_turn_as_reference():
    got = example({"messages": [{"role": "user", "content": "q"}]}, "messages")
    assert got.reference == "q"
    assert not any(turn.supervised for turn in got.turns)


# --------------------------------------------------------------------------------------- columns, templates, labels


def test_columns_are_renamed_before_anything_reads_them():
    row = {"mr": "name[Aromi]", "ref": "Aromi is nice.", "id": 3}
    assert example(row, columns={"mr": "prompt", "ref": "completion"}).turns == (
        Turn("user", "name[Aromi]", False),
        Turn("assistant", "Aromi is nice.", True),
    )
    assert example(row, columns={"mr": "facts"}, prompt_template="{facts}!", completion_template="{ref}").prompt == (
        Turn("user", "name[Aromi]!", False),
    )


def test_templates_fill_columns_and_keep_literal_braces():
    got = example({"q": "{x} & {y.z}", "a": 5}, prompt_template="{{Q}}: {q} ", completion_template="={a}")
    assert [turn.text for turn in got.turns] == ["{Q}: {x} & {y.z} ", "=5"]


def test_a_prompt_template_alone_keeps_the_formats_completion():
    got = example({"instruction": "i", "output": "o"}, "alpaca", prompt_template="<{instruction}>")
    assert [turn.text for turn in got.turns] == ["<i>", "o"]


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("{q.__class__}", "{q.__class__}"),
        ("{q[0]}", "{q[0]}"),
        ("{q!r}", "{q}"),
        ("{q:>9}", "{q}"),
        ("{}", "{}"),
        ("{0}", "{0}"),
    ],
)
def test_templates_reach_nothing_beyond_the_row(field, shown):
    refused(
        f"template {field!r}: only plain {{column}} fields are allowed, not {shown}.",
        example,
        {"q": "x", "completion": "y"},
        prompt_template=field,
    )


@pytest.mark.parametrize("template", ["{q", "q}", "{q!}"])
def test_a_malformed_template_is_an_input_error(template):
    with pytest.raises(InputError, match=f"^template {re.escape(repr(template))}: "):
        example({"q": "x", "completion": "y"}, prompt_template=template)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "negative"), ("1", "positive"), (True, "yes"), ("true", "yes"), (False, "no")]
)
def test_labels_turn_values_of_the_completion_into_texts(value, text):
    labels = {"0": "negative", "1": "positive", "True": "yes", "False": "no"}
    row = {"prompt": "1", "completion": value}
    assert example(row, labels=labels).turns == (Turn("user", "1", False), Turn("assistant", text, True))
    assert example(row, labels=labels, completion_template=" {completion}").reference == f" {text}"


def test_a_value_without_a_label_is_no_text_to_learn():
    refused(
        "rows.jsonl, row 7: '-1' is not in data.labels (0, 1).",
        example,
        {"prompt": "q", "completion": -1},
        labels={"0": "negative", "1": "positive"},
    )


# ----------------------------------------------------------------------------------------------------- errors of rows


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        (
            "prompt-completion",
            {"question": "q", "completion": "a"},
            "no column 'prompt'; it has 'question', 'completion'; map one with data.columns={COLUMN: prompt}.",
        ),
        (
            "prompt-completion",
            {"prompt": "q", "answer": "a"},
            "no column 'completion'; it has 'prompt', 'answer'; map one with data.columns={COLUMN: completion}.",
        ),
        (
            "alpaca",
            {"instruction": "i"},
            "no column 'output'; it has 'instruction'; map one with data.columns={COLUMN: output}.",
        ),
        ("text", {"body": "b"}, "no column 'text'; it has 'body'; map one with data.columns={COLUMN: text}."),
        ("text", {"text": None}, "text is empty (null), not a text."),
        ("text", {"text": ["a"]}, "text is list, not a text."),
        ("prompt-completion", {"prompt": {"a": 1}, "completion": "a"}, "prompt is dict, not a text."),
        (
            "messages",
            {"chat": []},
            "no column 'messages'; it has 'chat'; map one with data.columns={COLUMN: messages}.",
        ),
        ("messages", {"messages": []}, "messages is not a list with at least one entry."),
        ("messages", {"messages": "hi"}, "messages is not a list with at least one entry."),
        ("messages", {"messages": ["hi"]}, "messages holds str, not objects with role and content."),
        (
            "messages",
            {"messages": [{"role": "user", "content": None}]},
            "content of a user message is neither a text nor a list of text parts.",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]},
            "a content part of type image; only text parts can be trained on.",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": ["bare"]}]},
            "a content part of type str; only text parts can be trained on.",
        ),
        ("sharegpt", {"conversations": [3]}, "conversations holds int, not objects with from and value."),
        (
            "sharegpt",
            {"conversations": [{"from": "alien", "value": "x"}]},
            "from='alien' is no known speaker; known are human, user, gpt, assistant, chatgpt, function_call, system, "
            "observation, tool.",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "x"}], "tools": "[{"},
            "tools is not valid JSON.",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "x"}], "tools": {"name": "f"}},
            "tools is dict, not a list of function signatures.",
        ),
        (
            "text",
            {"text": "a\ud800"},
            "the assistant text has half of a surrogate pair, '\\ud800', at character 1; remove it.",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_source_number_and_column(format, row, message):
    refused(f"rows.jsonl, row 7: {message}", example, row, format)


def test_an_unknown_format_is_named():
    refused(
        "data.format=chatml: no such format; known are alpaca, sharegpt, messages, prompt-completion, text.",
        example,
        {},
        "chatml",
    )


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        (
            "messages",
            {"messages": [{"content": "x"}]},
            "rows.jsonl, row 7, messages: no column 'role'; it has 'content'",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "text": "x"}]},
            "rows.jsonl, row 7, conversations: no column 'value'; it has 'from', 'text'",
        ),
    ],
)
def test_a_key_missing_inside_a_message_is_named(format, row, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        example(row, format)


# ----------------------------------------------------------------------------------------------------- detect_format


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ("messages tools", "messages"),
        ("conversations", "sharegpt"),
        ("instruction input output", "alpaca"),
        ("instruction output text", "alpaca"),
        ("prompt completion", "prompt-completion"),
        ("input output", "prompt-completion"),
        ("text id", "text"),
    ],
)
def test_columns_suggest_the_format(columns, format):
    assert detect_format([dict.fromkeys(columns.split(), "x")]) == format


def test_the_format_is_that_of_the_mapped_columns():
    assert detect_format([{"mr": 1, "ref": 2}], {"mr": "prompt", "ref": "completion"}) == "prompt-completion"


def test_columns_of_no_format_are_named():
    refused(
        "rows.csv: no known format has the columns answer, question; set data.format (alpaca, sharegpt, messages, "
        "prompt-completion, text) and map the columns with data.columns.",
        detect_format,
        [{"question": 1, "answer": 2}],
        source="rows.csv",
    )


def test_a_text_has_no_use_for_labels():
    with pytest.raises(InputError, match=r"rows of format text have no use for data\.labels; leave it out"):
        to_example({"text": "red"}, 0, format="text", labels={"a": "b"})


@pytest.mark.parametrize("setting", ["prompt_template", "completion_template", "labels"])
def test_a_chat_has_no_use_for_templates_and_labels(setting):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    value = {"a": "b"} if setting == "labels" else "{prompt}"
    with pytest.raises(InputError, match=rf"rows of format messages have no use for data\.{setting}; leave it out"):
        to_example(row, 0, format="messages", **{setting: value})

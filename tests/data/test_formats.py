"""Rows of every format → examples; and the one sentence that each kind of bad input gets."""

from __future__ import annotations

import datetime
import re

import pytest
import yaml

from qalora.data.formats import ALPACA_WITH_INPUT, Turn, detect_format, to_example
from qalora.errors import InputError


def example(row, format="prompt-completion", **settings):
    return to_example(row, 7, format=format, source="rows.jsonl", **settings)


AS_JSON = "write it with json.dumps, or the rows with DataFrame.to_json(orient='records', lines=True)"


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
        (
            "alpaca",
            {"messages": []},
            "no column 'instruction'; it has 'messages'; such rows are chats: set data.format=messages, or take the "
            "recipe chat.",
        ),
        ("text", {"body": "b"}, "no column 'text'; it has 'body'; map one with data.columns={COLUMN: text}."),
        ("text", {"text": None}, "text is empty (null), not a text; fill it or take the row out."),
        ("text", {"text": ["a"]}, "text is list, not a text; make it a text."),
        ("prompt-completion", {"prompt": {"a": 1}, "completion": "a"}, "prompt is dict, not a text; make it a text."),
        (
            "messages",
            {"chat": []},
            "no column 'messages'; it has 'chat'; map one with data.columns={COLUMN: messages}.",
        ),
        ("messages", {"messages": []}, "messages is not a list with at least one entry."),
        ("messages", {"messages": 5}, "messages is not a list with at least one entry."),
        (
            "messages",
            {"messages": "[{'role': 'user'}\n {'role': 'assistant'}]"},  # of an array of numpy
            f"messages is a text that is no list in JSON ({chr(34)}[{{'role': 'user'}}\\n "
            f"{{'role': 'assistant'}}{chr(34)} …); {AS_JSON}.",
        ),
        ("messages", {"messages": "hi"}, f"messages is a text that is no list in JSON ('hi' …); {AS_JSON}."),
        (
            "messages",
            {"messages": ["hi"]},
            "messages holds str, not objects with role and content (or from and value).",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": None, "id": 1}]},
            "messages, message 0: no content or value, or it is null; it has 'id'; map one with data.columns={FIELD: "
            "content}.",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": {"a": 1}}]},
            "messages, message 0: content of a user message is neither a text nor a list of text parts.",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]},
            "messages, message 0: a content part of type image; only text parts can be trained on.",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": ["bare"]}]},
            "messages, message 0: a content part of type str; only text parts can be trained on.",
        ),
        (
            "messages",
            {"messages": [{"content": "x"}]},
            "messages, message 0: no role or from, or it is null; it has 'content'; map one with data.columns={FIELD: "
            "role}.",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "text": "x"}]},
            "conversations, message 0: no content or value, or it is null; it has 'text'; map one with "
            "data.columns={FIELD: content}.",
        ),
        (
            "sharegpt",
            {"conversations": [3]},
            "conversations holds int, not objects with role and content (or from and value).",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]},
            "messages, message 1: weight=0.5: a turn is learned whole or not at all; give 0 or 1.",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "a", "train": True}]},
            "messages, message 0: train=True in a user turn: only an assistant's turns can be learned by themselves; "
            "data.train_on_inputs=true learns all turns but those that are masked.",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "a", "train_detail": [{"begin_offset": 0}]}]},
            "messages, message 0: train_detail: parts of a turn cannot be learned apart; make them turns of their own.",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]},
            "messages, message 0: tool_calls is not a list of objects with the name and arguments of a function.",
        ),
        (
            "messages",
            {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "system": "c"},
            "two system texts, one in the column system and one in the conversation; take one out, the column with "
            "data.columns={system: other_system}.",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "b"}], "images": ["a.png"]},
            "images holds something, and only texts can be trained on; take such rows out.",
        ),
        (
            "alpaca",
            {"instruction": "i", "output": "o", "history": ["a"]},
            "history is not a list of pairs of question and answer.",
        ),
        (
            "alpaca",
            {"instruction": "i", "output": "o", "tools": [{"name": "f"}]},
            "tools go into a chat template alone; set data.chat=true, or leave the column out with "
            "data.columns={tools: other_tools}.",
        ),
        ("text", {"text": float("nan")}, "text is empty (null), not a text; fill it or take the row out."),
        ("text", {"text": b"bytes"}, "text is bytes that are no UTF-8, not a text; make it a text."),
        ("text", {"text": datetime.date(2024, 1, 1)}, "text is date, not a text; make it a text."),
        (
            "sharegpt",
            {"conversations": [{"from": "alien", "value": "x"}]},
            "conversations, message 0: unknown role 'alien'; known are system, developer, user, human, prompter, "
            "assistant, gpt, chatgpt, model, bot, ai, function_call, tool_call, tool, observation, function, "
            "function_response, tool_response, ipython, and those that the chat template names.",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "x"}], "tools": "[{"},
            f"tools is a text that is no list in JSON ('[{{' …); {AS_JSON}.",
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
    separator = ", " if re.match(r"\w+, message \d", message) else ": "
    refused(f"rows.jsonl, row 7{separator}{message}", example, row, format)


def test_an_unknown_format_is_named():
    refused(
        "data.format=chatml: no such format; known are alpaca, sharegpt, messages, prompt-completion, text.",
        example,
        {},
        "chatml",
    )


# ------------------------------------------------------------------------------------------------- nothing vanishes

DIALOGUE = (Turn("user", "q", False), Turn("assistant", "a", True))


def say(role: str, content: object, **fields: object) -> dict:
    return {"role": role, "content": content, **fields}


def test_of_prompt_and_completion_in_messages_the_completion_is_learned():
    row = {
        "prompt": [say("system", "s"), say("user", "q"), say("assistant", "a"), say("user", "r")],
        "completion": [say("assistant", "b")],
    }
    assert [(turn.text, turn.supervised) for turn in example(row).turns] == [
        ("s", False), ("q", False), ("a", False), ("r", False), ("b", True)
    ]  # fmt: skip


def test_fields_of_messages_are_mapped_like_columns():
    row = {"dialog": [{"speaker": "user", "text": "q"}, {"speaker": "assistant", "text": "a"}]}
    columns = {"dialog": "messages", "speaker": "role", "text": "content"}
    assert example(row, "messages", columns=columns).turns == DIALOGUE


def test_with_the_history_masked_the_last_answer_alone_is_learned():
    messages = [say("user", "q"), say("assistant", "a"), say("user", "q"), say("assistant", "b"), say("user", "?")]
    turns = example({"messages": messages}, "messages", mask_history=True).turns
    assert [turn.supervised for turn in turns] == [False, False, False, True, False]


def test_a_system_column_is_the_first_turn_of_a_conversation():
    messages = [say("user", "q"), say("assistant", "a")]
    for format, column in (("messages", "messages"), ("sharegpt", "conversations")):
        turns = example({column: messages, "system": "s"}, format).turns
        assert turns == (Turn("system", "s", False), *DIALOGUE)
    same = example({"messages": [say("system", "s"), *messages], "system": "s "}, "messages")
    assert same.turns == (Turn("system", "s", False), *DIALOGUE)


def test_columns_that_are_not_used_are_named_by_their_own_names():
    row = {"q": "a", "completion": "b", "id": 3, "source": "web", "empty": None, "rejected": "c"}
    assert example(row, columns={"q": "prompt", "id": "number"}).unused == ("id", "source", "rejected")
    assert example({"id": 1, "text": "a"}, "text").unused == ("id",)
    templated = {"instruction": "i", "input": "j", "system": "s", "output": "o"}
    assert example(templated, "alpaca", prompt_template="{instruction}").unused == ("input", "system")


def test_two_columns_of_one_name_are_an_error():
    refused(
        "rows.jsonl, row 7: the columns 'completion' and 'answer' are both completion (data.columns); give one of them "
        "another name there.",
        example,
        {"prompt": "q", "completion": "a", "answer": "b"},
        columns={"answer": "completion"},
    )
    gave_way = example({"prompt": "q", "completion": None, "answer": "b", "note": 1}, columns={"answer": "completion"})
    assert (gave_way.reference, gave_way.unused) == ("b", ("note",))


def test_preferences_are_no_format_and_the_error_says_how_to_learn_the_chosen():
    with pytest.raises(InputError, match=r"set data\.columns=\{chosen: completion\}\.$"):
        detect_format([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    row = {"chosen": [say("user", "q"), say("assistant", "a")], "rejected": []}
    with pytest.raises(InputError, match=r"set data\.columns=\{chosen: messages\}\.$"):
        detect_format([row])
    assert example(row, "messages", columns={"chosen": "messages"}).turns == DIALOGUE


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
        "prompt-completion, text) and map the columns with data.columns, such as {question: prompt, answer: "
        "completion}.",
        detect_format,
        [{"question": 1, "answer": 2}],
        source="rows.csv",
    )


@pytest.mark.parametrize(
    ("row", "columns", "advice"),
    [
        ({"query": "q", "response": "r"}, {}, ", such as {query: prompt, response: completion}."),
        ({"instruction": "q", "context": "c", "response": "r"}, {}, ", such as {response: output}."),
        ({"id": 1, "dialogue": [{"role": "user", "content": "q"}]}, {}, ", such as {dialogue: messages}."),
        ({"premise": "p", "hypothesis": "h"}, {}, "."),
    ],
)
def test_unknown_columns_get_a_mapping_that_works(row, columns, advice):
    with pytest.raises(InputError, match=f"{re.escape('map the columns with data.columns' + advice)}$") as error:
        detect_format([row], columns)
    if found := re.search(r"such as (\{.*\})\.$", str(error.value)):
        assert detect_format([row], yaml.safe_load(found[1])) in ("prompt-completion", "alpaca", "messages")


def test_columns_that_are_mapped_the_wrong_way_round_are_told_so():
    row = {"question": "q", "answer": "r"}
    with pytest.raises(InputError, match="not the other way round: {question: prompt, answer: completion}") as error:
        detect_format([row], {"prompt": "question", "completion": "answer"})
    turned = yaml.safe_load(str(error.value).split("round: ")[1].rstrip("."))
    assert detect_format([row], turned) == "prompt-completion"


def test_a_text_has_no_use_for_labels():
    with pytest.raises(InputError, match=r"rows of format text have no use for data\.labels; leave it out"):
        to_example({"text": "red"}, 0, format="text", labels={"a": "b"})


@pytest.mark.parametrize("setting", ["prompt_template", "completion_template", "labels"])
def test_a_chat_has_no_use_for_templates_and_labels(setting):
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    value = {"a": "b"} if setting == "labels" else "{prompt}"
    with pytest.raises(InputError, match=rf"rows of format messages have no use for data\.{setting}; leave it out"):
        to_example(row, 0, format="messages", **{setting: value})


def test_a_list_of_messages_as_python_writes_it_is_read():
    """What pandas' to_csv makes of a column of lists."""
    said = [{"role": "user", "content": 'it\'s "so"\n'}, {"role": "assistant", "content": "é", "weight": None}]
    assert example({"messages": str(said)}, "messages") == example({"messages": said}, "messages")
    row = {"instruction": "i", "input": "", "output": "o"}
    history = [["q", "a'b"]]
    assert example(row | {"history": str(history)}, "alpaca") == example(row | {"history": history}, "alpaca")


def test_functions_are_tools_by_their_older_name():
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    found = example({"messages": said, "functions": [function]}, "messages")
    assert (found.tools, found.unused) == ((function,), ())
    both = example({"messages": said, "tools": [function], "functions": [{"name": "g"}]}, "messages")
    assert (both.tools, both.unused) == ((function,), ("functions",))
    for other in (["sin"], "sin and cos", []):
        assert example({"messages": said, "functions": other}, "messages").unused == ("functions",)


def test_a_message_without_anything_is_not_to_be_mapped():
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]
    message = (
        "messages, message 1: no content or value, or it is null; it has nothing; fill it or take the message out."
    )
    refused(f"rows.jsonl, row 7, {message}", example, {"messages": said}, "messages")

"""Turns of a conversation, in every form that people have."""

from __future__ import annotations

import pytest

from qalora.data.formats import Turn, to_example


def example(row, format="prompt-completion", **settings):
    return to_example(row, 7, format=format, source="rows.jsonl", **settings)


DIALOGUE = (Turn("user", "q", False), Turn("assistant", "a", True))


def say(role: str, content: object, **fields: object) -> dict:
    return {"role": role, "content": content, **fields}


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("messages", {"messages": [say("user", "q"), say("assistant", "a")]}),
        ("messages", {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}),
        ("messages", {"messages": [[say("user", "q"), say("assistant", "a")]]}),
        ("messages", {"messages": [["user", "q"], ["Assistant", "a"]]}),
        ("messages", {"messages": [["q", "a"]]}),
        ("messages", {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("messages", {"conversations": [say("user", "q"), say("assistant", "a")]}),
        ("sharegpt", {"conversations": [say("user", "q"), say("assistant", "a")]}),
        ("sharegpt", {"conversations": [say("User", "q", weight=1), say("model", "a", weight=1, train=True)]}),
        ("sharegpt", {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ("prompt-completion", {"prompt": [say("user", "q")], "completion": [say("assistant", "a")]}),
        ("prompt-completion", {"prompt": [say("user", "q")], "completion": "a"}),
        ("prompt-completion", {"prompt": "q", "completion": [say("assistant", "a")]}),
    ],
)
def test_a_conversation_is_read_in_every_form_that_people_have(format, row):
    got = example(row, format)
    assert (got.turns, got.chat, got.unused) == (DIALOGUE, True, ())


@pytest.mark.parametrize("format", ["messages", "sharegpt"])
@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"weight": 0.0}, {"weight": "0"}, {"loss_weight": 0}, {"train": False}, {"training": False},
     {"loss": False}, {"masked": True}, {"weight": 1, "train": False}],
)  # fmt: skip
def test_an_answer_that_is_masked_is_not_learned(format, flag):
    keys = ("role", "content") if format == "messages" else ("from", "value")
    entries = [("user", "q", {}), ("assistant", "wrong", flag), ("user", "q", flag), ("assistant", "right", {})]
    if flag.get("masked") is None:
        entries[3][2].update(dict.fromkeys(flag, 1))
    messages = [{keys[0]: role, keys[1]: text, **fields} for role, text, fields in entries]
    row = {"messages" if format == "messages" else "conversations": messages}
    turns = example(row, format).turns
    assert [turn.supervised for turn in turns] == [False, False, False, True]
    assert not any(turn.fields for turn in turns)


def test_null_and_nan_are_no_values():
    nan = float("nan")
    row = {"instruction": "i", "input": nan, "output": "o", "system": nan, "history": nan, "note": nan}
    got = example(row, "alpaca")
    assert got.turns == example({"instruction": "i", "output": "o"}, "alpaca").turns
    assert got.unused == ()
    messages = [say("user", "q", name=nan, weight=nan), say("assistant", "a", tool_calls=None, loss_weight=nan)]
    assert example({"messages": messages, "tools": nan}, "messages").turns == DIALOGUE


def test_thoughts_in_parts_and_results_that_are_objects_are_kept():
    messages = [
        say("user", "q"),
        say("assistant", [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]),
        say("tool", {"sum": 4}, tool_call_id="1"),
    ]
    turns = example({"messages": messages}, "messages").turns
    assert (turns[1].text, turns[1].thought) == ("a", "hm")
    assert (turns[2].text, turns[2].fields) == ('{"sum": 4}', {"tool_call_id": "1"})


@pytest.mark.parametrize("name", ["FUNCTION RESPONSE", "Tool-Response", " tool_response "])
def test_a_role_s_name_may_have_blanks_for_its_underscores(name):
    said = [{"from": "human", "value": "q"}, {"from": name, "value": "r"}, {"from": "gpt", "value": "a"}]
    assert [turn.role for turn in example({"conversations": said}, "sharegpt").turns] == ["user", "tool", "assistant"]

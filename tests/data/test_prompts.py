"""The prompt that a server puts around what a user says is the one that rows were trained with."""

from __future__ import annotations

import pytest

from qalora.data.formats import to_example
from qalora.data.prompts import served_prompt


def examples(rows, format, **more):
    return [to_example(row, i, format=format, **more) for i, row in enumerate(rows)]


def test_alpaca_is_its_prompt_without_an_input():
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
    served = served_prompt(examples(rows, "alpaca"))
    own = to_example({"instruction": "QUESTION", "output": "x"}, 0, format="alpaca").prompt[0].text
    assert served.replace("{prompt}", "QUESTION") == own


def test_a_bare_prompt_is_itself_and_a_chat_has_none():
    pair = [{"prompt": "a", "completion": "b"}]
    assert served_prompt(examples(pair, "prompt-completion")) == "{prompt}"
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert served_prompt(examples(chat, "messages")) is None


@pytest.mark.parametrize(
    ("template", "served"),
    [("Q: {question} A:", "Q: {prompt} A:"), ("{{x}} {q}", "{x} {prompt}"), ("{a} {b}", None), ("fixed", None)],
)
def test_a_template_of_one_column_is_that_template(template, served):
    row = [{"prompt": "p", "completion": "c"}]
    assert served_prompt(examples(row, "prompt-completion"), template) == served

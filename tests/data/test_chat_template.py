"""What a chat template can write is found by trying it."""

from __future__ import annotations

import json

import pytest

from qalora.data.chat_template import chat_template, set_chat_template
from qalora.data.formats import Example, Turn, to_example
from qalora.data.rendering import render
from qalora.errors import InputError

LOOP = "{% for m in messages %}"


CHATML = LOOP + (
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


ZEPHYR = LOOP + (
    "{% if m.role in ['user', 'system', 'assistant'] %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{{ '\n' "
    "}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


# Qwen3's: thoughts of the last answer alone, which has one even where it is empty.
QWEN3 = LOOP + (
    "{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.reasoning_content if m.reasoning_content else "
    "(m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '') %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last or (keep_thinking is defined and keep_thinking) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


TOOLS = (
    "{% if tools %}{{ '<tools>' + tools | tojson + '</tools>\n' }}{% endif %}"
    + LOOP
    + "{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls %}{{ '<call>' + call.function.name + ' ' + call.function.arguments | tojson + "
    "'</call>' }}{% endfor %}"
    "{% if m.tool_call_id %}{{ ' #' + m.tool_call_id }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def conversation(*texts: str, system: str | None = None, learned: bool = True, first: str = "user") -> Example:
    """Questions and answers in turn."""
    speakers = ("user", "assistant") if first == "user" else ("assistant", "user")
    roles = [speakers[i % 2] for i in range(len(texts))]
    turns = [Turn(role, text, learned and role == "assistant") for role, text in zip(roles, texts, strict=True)]
    return Example(5, (*([Turn("system", system, False)] if system else []), *turns), True, place="rows.jsonl, row 5")


def row(*messages: dict, **columns) -> Example:
    return to_example({"messages": list(messages), **columns}, 4, format="messages", source="rows.jsonl")


def said(role: str, content, **fields) -> dict:
    return {"role": role, "content": content, **fields}


def learned(example: Example, tokenizer) -> list[str]:
    return [text for text, supervised in render(example, tokenizer) if supervised]


def whole(example: Example, tokenizer) -> str:
    return "".join(text for text, _ in render(example, tokenizer))


@pytest.mark.parametrize(
    ("role", "written"),
    [
        ("human", "user"),
        ("Human", "user"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("Assistant", "assistant"),
        (" BOT ", "assistant"),
    ],
)
def test_roles_are_those_of_the_template(byte_tokenizer, role, written):
    other = "assistant" if written == "user" else "user"
    text = whole(row(said(role, "one"), said(other, "two")), byte_tokenizer(ZEPHYR))
    assert text == f"<|{written}|>\none</s>\n<|{other}|>\ntwo</s>\n"


def test_a_developer_is_one_where_the_template_writes_it_and_the_system_elsewhere(byte_tokenizer):
    example = row(said("developer", "brief"), said("user", "a"), said("assistant", "b"))
    assert whole(example, byte_tokenizer(CHATML)).startswith("<|im_start|>developer\nbrief<|im_end|>")
    assert whole(example, byte_tokenizer(ZEPHYR)).startswith("<|system|>\nbrief</s>")


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def weather(arguments, content) -> list[dict]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        said("user", "Rain?"),
        said("assistant", content, tool_calls=[call]),
        said("tool", "sun", tool_call_id="call_1"),
        said("assistant", "No."),
    ]


def test_a_template_that_joins_arguments_as_text_gets_text(byte_tokenizer):
    template = TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")
    example = row(*weather({"city": "Köln"}, None), tools=[WEATHER])
    assert learned(example, byte_tokenizer(template))[0] == '<call>weather {"city": "Köln"}</call><|im_end|>'


@pytest.mark.parametrize("given", [WEATHER, WEATHER["function"]], ids=["OpenAI's", "by themselves"])
@pytest.mark.parametrize("read", ["tool.function.name", "tool.name", "(tool | tojson)"])
def test_signatures_reach_the_template_in_the_form_that_it_reads(byte_tokenizer, given, read):
    template = "{% for tool in tools or [] %}{{ '<' + " + read + " + '>' }}{% endfor %}" + CHATML
    text = whole(row(said("user", "a"), said("assistant", "b"), tools=[given]), byte_tokenizer(template))
    expected = json.dumps(given) if "tojson" in read else "weather"
    assert text.startswith(f"<{expected}><|im_start|>user")


def test_a_template_of_the_recipe_takes_the_place_of_the_tokenizers(byte_tokenizer, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(ZEPHYR)
    for template in (str(file), ZEPHYR):
        tokenizer = byte_tokenizer(CHATML)
        set_chat_template(tokenizer, template)
        assert tokenizer.chat_template == ZEPHYR
        assert learned(conversation("a", "b"), tokenizer) == ["b</s>"]


def test_a_template_or_switch_that_is_not_there_is_an_error(byte_tokenizer):
    with pytest.raises(
        InputError, match=r"^data.chat_template=/no/chat.jinja: cannot be read \(No such file or directory\)"
    ):
        set_chat_template(byte_tokenizer(CHATML), "/no/chat.jinja")
    with pytest.raises(
        InputError,
        match=r"^data.chat_template_kwargs=think: the chat template has no such switch; it has keep_thinking",
    ):
        set_chat_template(byte_tokenizer(QWEN3), None, {"think": True})


@pytest.mark.parametrize("value", [True, False, None, 3, "a 'b' \"c\" ß\n"])
def test_a_switch_is_the_templates_default_and_a_caller_may_set_it(byte_tokenizer, value):
    tokenizer = byte_tokenizer("{{ thing | tojson }}{{ messages[0].content }}")
    set_chat_template(tokenizer, None, {"thing": value})
    messages = [said("user", "!")]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == json.dumps(value, ensure_ascii=False) + "!"
    assert tokenizer.apply_chat_template(messages, tokenize=False, thing=7) == "7!"


def test_of_several_templates_the_one_for_tools_gets_the_tools(byte_tokenizer):
    tokenizer = byte_tokenizer({"default": CHATML, "tool_use": TOOLS})
    assert "<tools>" in whole(row(*weather("{}", None), tools=[WEATHER]), tokenizer)
    assert "<tools>" not in whole(row(said("user", "a"), said("assistant", "b")), tokenizer)


@pytest.mark.parametrize(
    ("template", "switches"),
    [
        (
            "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
            "{% else %}{% set system = false %}{% set rest = messages %}{% endif %}"
            "{% for m in rest %}{% if loop.first and system %}{{ system }}{% endif %}{{ m.content }}{% endfor %}",
            (),
        ),
        (
            "{% if not day is defined %}{% set day = 'Monday' %}{% endif %}{% set tone = tone | default('calm') %}"
            "{% if shout is undefined %}{% set shout = false %}{% endif %}{% if think is defined and think %}!{% endif "
            "%}"
            "{{ day ~ tone ~ shout }}{% for m in messages %}{{ m.content }}{% endfor %}",
            ("day", "shout", "think", "tone"),
        ),
    ],
    ids=["set in branches", "set where they are not given"],
)
def test_switches_are_what_a_caller_can_change(byte_tokenizer, template, switches):
    found = chat_template(byte_tokenizer(template))
    assert found.switches == switches
    said_once = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for name in ("system", "rest", "day", "shout", "think", "tone"):
        assert (found.apply(said_once, **{name: True}) != found.apply(said_once)) == (name in switches)

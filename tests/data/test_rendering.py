"""Whatever a row says is in what a model reads, and what it has to write after the prompt is what is learned."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora.data.chat_template import chat_template, set_chat_template
from qalora.data.formats import Example, Turn, to_example
from qalora.data.rendering import render, render_prompt
from qalora.data.tokenization import load_dataset, tokenize, tokenize_prompt
from qalora.errors import InputError

LOOP = "{% for m in messages %}"
CHATML = LOOP + (
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    + LOOP
    + (
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
)
# The system text stands before the last question, wherever that is.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{{ bos_token }}"
    "{% set asked = turns | selectattr('role', 'equalto', 'user') | list %}{% for m in turns %}"
    "{% if m.role == 'user' %}{{ '[INST] ' }}{% if system and m == asked[-1] %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
ZEPHYR = LOOP + (
    "{% if m.role in ['user', 'system', 'assistant'] %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{{ '\n' "
    "}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TRIMS = CHATML.replace("m.content", "m.content | trim")
# DeepSeek-R1's: no thought is ever shown, and a question ends with one begun.
R1 = (
    "{{ bos_token }}"
    + LOOP
    + (
        "{% if m.role == 'user' %}{{ '<User>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<Assistant>' + m.content.split('</think>')[-1] + eos_token }}{% elif m.role == 'system' %}{{ m.content "
        "}}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"
    )
)
R1_KEEPS = R1.replace(".split('</think>')[-1]", "")
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
QWEN3_THINKING = QWEN3.replace(
    "{{ '<|im_start|>assistant\n' }}{% endif %}", "{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
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


# ------------------------------------------------------------------------------------------- random conversations

TEXTS = st.text(alphabet="abend<>|\nß 1:{}'\"", min_size=1, max_size=12).filter(lambda text: text.strip())
ANSWER = TEXTS.map(lambda text: text.strip())
# Of each template: what is learned of an answer, by its place among the answers.
ENDED = {
    "chatml": (CHATML, lambda text, last: f"{text}<|im_end|>"),
    "llama 3": (LLAMA3, lambda text, last: f"{text.strip()}<|eot_id|>"),
    "mistral": (MISTRAL, lambda text, last: f" {text.strip()}</s>"),
    "zephyr": (ZEPHYR, lambda text, last: f"{text}</s>"),
    "trims": (TRIMS, lambda text, last: f"{text.strip()}<|im_end|>"),
    "cuts thoughts": (QWEN3, lambda text,
    last: f"<think>\n\n</think>\n\n{text.lstrip(chr(10))}<|im_end|>" if last else f"{text.lstrip(chr(10))}<|im_end|>"),
    "begins a thought": (
        QWEN3_THINKING,
        lambda text,
        last: f"\n</think>\n\n{text.lstrip(chr(10))}<|im_end|>" if last else f"{text.lstrip(chr(10))}<|im_end|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("add_bos", [False, True], ids=["", "adds BOS"])
@pytest.mark.parametrize("name", ENDED)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_of_any_conversation_the_answers_and_their_ends_are_learned(byte_tokenizer, name, add_bos, data):
    template, ended = ENDED[name]
    texts = data.draw(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
    masked = data.draw(st.sets(st.integers(0, len(texts) - 1)))
    system = data.draw(st.none() | TEXTS)
    tokenizer = byte_tokenizer(template, add_bos=add_bos)
    example = conversation(*(text for pair in texts for text in pair), system=system)
    answers = [i for i, turn in enumerate(example.turns) if turn.role == "assistant"]
    turns = [
        Turn(turn.role, turn.text, turn.supervised and (i not in answers or answers.index(i) not in masked))
        for i, turn in enumerate(example.turns)
    ]
    example = Example(5, tuple(turns), True)
    item = tokenize(example, tokenizer, max_seq_len=10**6)
    expected = [ended(text, i == len(texts) - 1) for i, (_, text) in enumerate(texts) if i not in masked]
    assert tokenizer.decode([label for label in item["labels"] if label >= 0]) == "".join(expected)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    assert item["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert tokenize_prompt(example, tokenizer) == asked == item["input_ids"][: len(asked)]


@settings(max_examples=40, deadline=None)
@given(question=TEXTS, thought=ANSWER, answer=ANSWER)
def test_a_thought_is_learned_where_the_template_keeps_it(byte_tokenizer, question, thought, answer):
    tokenizer = byte_tokenizer(QWEN3)
    for example in (
        row(said("user", question), said("assistant", answer, reasoning_content=thought)),
        row(said("user", question), said("assistant", answer, thinking=thought)),
        row(said("user", question), said("assistant", f"<think>\n{thought}\n</think>\n\n{answer}")),
    ):
        assert learned(example, tokenizer) == [f"<think>\n{thought}\n</think>\n\n{answer}<|im_end|>"]
    prompt = f"<s><User>{question}<Assistant><think>\n"
    example = row(said("user", question), said("assistant", f"<think>{thought}</think>{answer}"))
    assert render_prompt(example, byte_tokenizer(R1_KEEPS)) == prompt
    assert render(example, byte_tokenizer(R1_KEEPS)) == [(prompt, False), (f"{thought}</think>{answer}</s>", True)]


def test_answers_in_a_row_are_learned_as_the_template_writes_them(byte_tokenizer):
    """Qwen3's writes an empty thought into the last answer alone, so what it asks after the first is not what it later
    has."""
    tokenizer = byte_tokenizer(QWEN3)
    end, thought = "<|im_end|>", "<think>\n\n</think>\n\n"
    answers = said("user", "q"), said("assistant", "one"), said("assistant", "two")
    assert learned(row(*answers), tokenizer) == [f"one{end}", f"{thought}two{end}"]
    longer = row(*answers, said("assistant", "two"), said("user", "r"), said("assistant", "three"))
    assert learned(longer, tokenizer) == [f"one{end}", f"two{end}", f"two{end}", f"{thought}three{end}"]
    for example in (row(*answers), longer):
        written = chat_template(tokenizer).apply([said(turn.role, turn.text) for turn in example.turns])
        assert whole(example, tokenizer).rstrip() == written.rstrip()


@pytest.mark.parametrize("template", [CHATML, LLAMA3, ZEPHYR, TRIMS])
def test_an_assistant_that_opens_the_chat_teaches_its_words_and_not_its_header(byte_tokenizer, template):
    tokenizer = byte_tokenizer(template)
    for text in ("end", "<", "|", "im", "assistant", "a"):
        example = conversation(text, "and?", "so", first="assistant")
        assert [found.partition("<|")[0].removesuffix("</s>") for found in learned(example, tokenizer)] == (
            [text, "so"] if text != "<" else ["<", "so"]
        )


# ------------------------------------------------------------------------------------------------ thoughts that are cut


@pytest.mark.parametrize("fields", [{"content": "<think>think</think>b"}, {"content": "b", "reasoning": "think"}])
def test_a_thought_that_is_found_by_chance_is_cut_all_the_same(byte_tokenizer, fields):
    with pytest.raises(InputError, match=r"does not write all of turn 1 \(assistant\)"):
        render(row(said("user", "a"), {"role": "assistant", **fields}), byte_tokenizer(R1))


@pytest.mark.parametrize(
    "content", [{"content": "<think>two and two</think>four"}, {"content": "four", "reasoning_content": "two and two"}]
)
def test_a_thought_that_the_template_cuts_is_an_error_that_names_what_decides(byte_tokenizer, content):
    with pytest.raises(InputError) as error:
        render(row(said("user", "2 + 2?"), {"role": "assistant", **content}), byte_tokenizer(R1))
    message = str(error.value)
    assert message.startswith("rows.jsonl, row 4: the chat template does not write all of turn 1 (assistant), '")
    assert "two and two" in message and "four</s>" in message  # what is cut, and what the row becomes
    assert message.endswith(" data.chat_template=FILE takes a template that keeps it.")
    assert "kwargs" not in message and "mask_history" not in message  # neither would help


def test_a_switch_that_keeps_an_earlier_thought_is_found_by_trying_it(byte_tokenizer):
    tokenizer = byte_tokenizer(QWEN3)
    example = row(
        said("user", "a"),
        said("assistant", "b", thinking="beta"),
        said("user", "c"),
        said("assistant", "d", thinking="delta"),
    )
    with pytest.raises(
        InputError, match=r"data\.chat_template_kwargs=\{keep_thinking: true\} keeps it\. data\.mask_history=true"
    ):
        render(example, tokenizer)
    set_chat_template(tokenizer, None, {"keep_thinking": True})
    assert learned(example, tokenizer) == [
        f"<think>\n{t}\n</think>\n\n{a}<|im_end|>" for t, a in (("beta", "b"), ("delta", "d"))
    ]
    set_chat_template(tokenizer, None, {"keep_thinking": True})  # again, for validation rows
    assert tokenizer.chat_template.count("keep_thinking = true") == 1


def test_with_the_history_masked_an_earlier_thought_may_be_cut(byte_tokenizer):
    messages = [
        said("user", "a"),
        said("assistant", "b", thinking="x"),
        said("user", "c"),
        said("assistant", "d", thinking="y"),
    ]
    example = to_example({"messages": messages}, 0, format="messages", mask_history=True)
    assert learned(example, byte_tokenizer(QWEN3)) == ["<think>\ny\n</think>\n\nd<|im_end|>"]


def test_an_answer_without_a_thought_closes_the_one_that_the_prompt_begins(byte_tokenizer):
    example = conversation("a", "b", "c", "d")
    segments = render(example, byte_tokenizer(R1))
    assert segments == [
        ("<s><User>a<Assistant>", False),
        ("b</s>", True),
        ("<User>c<Assistant><think>\n", False),
        ("\n</think>\n\nd</s>", True),
    ]
    assert render_prompt(example, byte_tokenizer(R1)) == "".join(text for text, _ in segments[:3])


# ----------------------------------------------------------------------------------------------------- turns left out


@pytest.mark.parametrize("text", ["hi", "assistant", "x" * 300])
def test_a_turn_that_the_template_leaves_out_is_an_error(byte_tokenizer, text):
    deaf = CHATML.replace(LOOP, "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(
        InputError, match=r"^rows.jsonl, row 5: the chat template does not write all of turn 0 \(system\), '"
    ):
        render(conversation("hi", "hi", system=text), byte_tokenizer(deaf))


def test_a_role_that_the_template_alone_knows_reaches_it(byte_tokenizer, tmp_path):
    template = ZEPHYR.replace("['user',", "['user', 'context',")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [said("context", "facts"), said("user", "a"), said("assistant", "b")]}))
    dataset = load_dataset(str(rows), byte_tokenizer(template))
    assert byte_tokenizer().decode(dataset[0]["input_ids"]).startswith("<|context|>\nfacts</s>")
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1, messages, message 0: unknown role 'context'"):
        load_dataset(str(rows), byte_tokenizer(ZEPHYR))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_list_of_lists_is_a_list_of_conversations(byte_tokenizer, tmp_path, name):
    chats = [[said("user", "a"), said("assistant", "b")], [said("user", "c"), said("assistant", "d")]]
    text = json.dumps(chats) if name.endswith(".json") else "\n".join(map(json.dumps, chats))
    (tmp_path / name).write_text(text)
    dataset = load_dataset(str(tmp_path / name), byte_tokenizer(CHATML))
    assert [example.reference for example in dataset.examples] == ["b", "d"]


# --------------------------------------------------------------------------------------------------------------- tools

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def weather(arguments, content) -> list[dict]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        said("user", "Rain?"),
        said("assistant", content, tool_calls=[call]),
        said("tool", "sun", tool_call_id="call_1"),
        said("assistant", "No."),
    ]


@pytest.mark.parametrize("content", [None, ""], ids=["null", "empty"])
@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'], ids=["object", "JSON"])
def test_openais_tool_rows_are_learned(byte_tokenizer, content, arguments):
    tokenizer = byte_tokenizer(TOOLS)
    example = row(*weather(arguments, content), tools=[WEATHER])
    assert learned(example, tokenizer) == ['<call>weather {"city": "Köln"}</call><|im_end|>', "No.<|im_end|>"]
    messages = [dict(message) for message in weather({"city": "Köln"}, "")]
    assert whole(example, tokenizer) == tokenizer.apply_chat_template(messages, tools=[WEATHER], tokenize=False)
    assert "<tools>" in whole(example, tokenizer) and "sun #call_1" in whole(example, tokenizer)


def test_openais_older_function_call_is_a_tool_call(byte_tokenizer):
    messages = [
        said("user", "Rain?"),
        said("assistant", None, function_call={"name": "weather", "arguments": "{}"}),
        said("function", "sun", name="weather"),
        said("assistant", "No."),
    ]
    assert learned(row(*messages), byte_tokenizer(TOOLS)) == ["<call>weather {}</call><|im_end|>", "No.<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "columns", "message"),
    [
        (
            [said("user", "a"), said("assistant", "b")],
            {"tools": [WEATHER]},
            r"the chat template has no place for tools \(weather\)",
        ),
        # Its name is in the chat, of which the signature is a part nevertheless.
        (
            [said("user", "weather"), said("assistant", "b")],
            {"tools": [WEATHER]},
            r"the chat template has no place for tools \(weather\)",
        ),
        (weather("{}", None), {}, r"does not write all of turn 1 \(assistant\), .*weather"),
    ],
    ids=["tools", "tools by name", "tool_calls"],
)
def test_a_template_without_tools_is_an_error(byte_tokenizer, messages, columns, message):
    with pytest.raises(InputError, match=f"^rows.jsonl, row 4: .*{message}"):
        render(row(*messages, **columns), byte_tokenizer(CHATML))


# ------------------------------------------------------------------------------------------ the template of a tokenizer


@pytest.mark.parametrize("add_bos", [False, True])
def test_without_a_template_the_served_prompt_is_the_trained_one(byte_tokenizer, add_bos):
    """The built-in one begins with BOS where the tokenizer puts one before a text: whoever serves it adds none."""
    tokenizer, example = byte_tokenizer(add_bos=add_bos), conversation("a", "b")
    served = byte_tokenizer(chat_template(tokenizer).source, add_bos=add_bos)
    ids = served.apply_chat_template([said("user", "a")], add_generation_prompt=True, return_dict=False)
    assert ids == tokenize_prompt(example, tokenizer)
    assert ids.count(tokenizer.bos_token_id) == int(add_bos)


# ---------------------------------------------------------------------------------------------- without a chat template


def test_system_and_history_of_alpaca_rows_are_paragraphs_before_the_prompt(byte_tokenizer):
    cells = {
        "system": "Be brief.",
        "history": [["One?", "1"], ["Two?", "2"]],
        "instruction": "Three?",
        "input": "",
        "output": "3",
    }
    example = to_example(cells, 0, format="alpaca")
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{}\n\n### Response:"
    )
    assert render(example, byte_tokenizer()) == [
        ("Be brief.\n\n", False),
        (prompt.format("One?"), False), ("1", True), ("</s>", True),
        ("\n\n" + prompt.format("Two?"), False), ("2", True), ("</s>", True),
        ("\n\n" + prompt.format("Three?"), False), ("3", True),
    ]  # fmt: skip
    assert render_prompt(example, byte_tokenizer()) == "".join(
        text for text, _ in render(example, byte_tokenizer())[:-1]
    )
    chat = to_example(cells, 0, format="alpaca", chat=True)
    assert learned(chat, byte_tokenizer(CHATML)) == ["1<|im_end|>", "2<|im_end|>", "3<|im_end|>"]
    assert whole(chat, byte_tokenizer(CHATML)).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nBelow"
    )


@pytest.mark.parametrize("fields", [{"reasoning_content": "x"}, {"tool_calls": [{"name": "f", "arguments": {}}]}])
def test_a_thought_or_call_outside_a_chat_template_is_an_error(byte_tokenizer, fields):
    cells = {"messages": [said("user", "a"), said("assistant", "b", **fields)]}
    with pytest.raises(
        InputError, match=r"row 0: turn 1 \(assistant\) has a thought or a tool call .* leave data\.chat=false out"
    ):
        render(to_example(cells, 0, format="messages", chat=False), byte_tokenizer(CHATML))


def test_a_template_that_asks_otherwise_than_it_writes_is_an_error_that_shows_it(byte_tokenizer):
    template = CHATML.replace("%}{{ '<|im_start|>assistant", "%}{{ '<|im_start|>bot")
    assert template != CHATML
    with pytest.raises(
        InputError, match=r"rewrites earlier turns as the chat grows.*it asks 'bot.* where it later has 'assistant"
    ):
        render(conversation("a", "b"), byte_tokenizer(template))


MISTRAL = """{%- if messages[0].role == "system" %}{%- set system = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- for m in rest %}{%- if m.role == "user" %}{{- "[INST] " }}
{%- if loop.last and system is defined %}{{- system + "\n\n" }}{%- endif %}{{- m.content + "[/INST]" }}
{%- else %}{{- " " + m.content + eos_token }}{%- endif %}{%- endfor %}"""


@pytest.mark.parametrize("texts", [("Hi", "Hello"), ("Hi", "Hello", "Bye", "Ciao")])
def test_the_system_text_that_a_template_puts_before_the_last_question_is_in_what_is_trained(byte_tokenizer, texts):
    """Such a template writes it only while the question is the last turn: as a server asks."""
    tokenizer = byte_tokenizer(MISTRAL)
    example = replace(conversation(*texts), turns=(Turn("system", "Brief.", False), *conversation(*texts).turns))
    messages = [{"role": turn.role, "content": turn.text} for turn in example.turns]
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    assert "Brief." in asked
    assert whole(example, tokenizer) == f"{asked} {texts[-1]}{tokenizer.eos_token}"
    assert learned(example, tokenizer) == [f" {text}{tokenizer.eos_token}" for text in texts[1::2]]


PHI = (
    "{% for m in messages %}{{ '[INST]' if m.role == 'user' else '[/INST]' }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[/INST]{% else %}{{ eos_token }}{% endif %}"
)


def test_every_answer_learns_its_end_where_the_chat_has_one_more_at_its_close(byte_tokenizer):
    tokenizer = byte_tokenizer(PHI)
    assert learned(conversation("a", "b", "c", "d"), tokenizer) == ["b<|im_end|>", "d<|im_end|>\n</s>"]
    assert learned(conversation("a", "b", "c"), tokenizer) == ["b<|im_end|>"]


@pytest.mark.parametrize(
    ("distance", "texts"), [(2, ("ok", "a", "ok", "b")), (1, ("q", "ok", "ok", "b"))], ids=["a question", "an answer"]
)
def test_a_turn_is_not_found_in_an_earlier_one_of_the_same_words(byte_tokenizer, distance, texts):
    """A template that leaves out what was said before: of the same length of chat, other texts are all written."""
    template = CHATML.replace(
        LOOP, LOOP + f"{{% if loop.index0 < {distance} or m.content != messages[loop.index0 - {distance}].content %}}"
    ).replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    assert learned(conversation("1", "2", "3", "4"), byte_tokenizer(template)) == ["2<|im_end|>", "4<|im_end|>"]
    with pytest.raises(InputError, match=r"the chat template does not write all of turn 2 \(user\), 'ok'"):
        render(conversation(*texts), byte_tokenizer(template))

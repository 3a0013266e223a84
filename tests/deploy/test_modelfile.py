"""Ollama's rendering of the TEMPLATE that is written, against apply_chat_template and the prompts of the training."""

from __future__ import annotations

import json
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qalora.data.chat_template import CHATML
from qalora.data.ending import Ending
from qalora.data.formats import to_example
from qalora.data.prompts import served_prompt
from qalora.deploy.modelfile import write_modelfile
from qalora.deploy.settings import Served

# In the words of the published ones.
TEMPLATES = {
    "built-in": CHATML,
    "chatml with a default system": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama 3": (
        "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m.role "
        "}}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "llama 2": (
        "{% if messages[0]['role'] == 'system' %}{% set system, rest = '<<SYS>>\n' + messages[0]['content'] + "
        "'\n<</SYS>>\n\n', "
        "messages[1:] %}{% else %}{% set system, rest = '', messages %}{% endif %}"
        "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token if loop.first }}[INST] {{ system if loop.first }}{{ "
        "m.content }} [/INST]"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral, which has no system": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% "
        "endfor %}"
    ),
}
TALK = ["What is 2 + 2?", "4.", "And {{ 3 }} more?"]


def tokenizer(template: str | None, bos: bool = True) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


def modelfile(folder, served: Served) -> dict[str, list[str]]:
    """Command → its values, of the file that is written. As Ollama reads it, a value is whole at the first end of a
    line where its marks are closed."""
    write_modelfile(folder, served)
    text = (folder / "Modelfile").read_text()
    found: dict[str, list[str]] = {}
    for command, whole, short in re.findall(
        r'^([A-Z]+) (?:"""(.*?)"""|([^"].*?|".*?"))$', text, re.MULTILINE | re.DOTALL
    ):
        found.setdefault(command, []).append(whole or short)
    assert list(found) == [name for name in ("FROM", "TEMPLATE", "SYSTEM", "PARAMETER") if name in found], text
    return found


def go(template: str, values: dict[str, str]) -> str:
    """Go's text/template, as far as it is used: fields, {{ if .Field }} … {{ else }} … {{ end }}, and texts in quotes.
    An action begins at the first two braces, whatever stands before or after them."""
    out, shown = "", [True]
    for literal, action in re.findall(r"(.*?)(?:\{\{(.*?)\}\}|\Z)", template, re.DOTALL):
        action = action.strip()
        assert re.fullmatch(r'|if \.\w+|else|end|\.\w+|"(\\.|[^"\\])*"', action), action
        out += literal if all(shown) else ""
        if action.startswith("if "):
            shown.append(bool(values.get(action[4:])))
        elif action == "else":
            shown[-1] = not shown[-1]
        elif action == "end":
            shown.pop()
        elif action and all(shown):
            out += json.loads(action) if action[0] == '"' else values.get(action[1:], "")
    return out


def by_ollama(file: dict[str, list[str]], turns: list[str], system: str | None) -> str:
    """Exchange by exchange; the system text belongs to the first, and the last is cut where the answer goes."""
    (template,) = file["TEMPLATE"]
    text, system = "", system or file.get("SYSTEM", [None])[0]
    for i in range(0, len(turns), 2):
        last = i + 1 == len(turns)
        values = {
            "System": system or "" if i == 0 else "",
            "Prompt": turns[i],
            "Response": "" if last else turns[i + 1],
        }
        text += go(template.partition("{{ .Response }}")[0] if last else template, values)
    return text


@pytest.mark.parametrize(
    ("name", "bos"),
    [*((name, True) for name in TEMPLATES), *((n, False) for n in TEMPLATES if "bos" not in TEMPLATES[n])],
)
def test_ollama_renders_what_the_chat_template_does(tmp_path, name, bos):
    spoken = tokenizer(TEMPLATES[name], bos)
    file = modelfile(tmp_path, Served(spoken, Ending((1,))))
    for system in [None, *(["Be brief."] if "no system" not in name else [])]:
        for turns in (TALK[:1], TALK):
            messages = [{"role": "system", "content": system}] if system else []
            messages += [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
            expected = spoken.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            # llama.cpp puts the BOS in front where the tokenizer does.
            assert by_ollama(file, turns, system) == (expected.removeprefix("<s>") if bos else expected)


@pytest.mark.parametrize(
    ("template", "bos"),
    [
        ("{% for m in messages %}{{ messages | length }}: {{ m.content }}\n{% endfor %}", True),
        (TEMPLATES["llama 3"], False),  # its BOS stands before the first exchange alone, and llama.cpp puts none there
    ],
    ids=["counts", "BOS of its own"],
)
def test_a_template_that_no_exchange_can_be_cut_from_is_left_to_llama_cpp(tmp_path, template, bos):
    write_modelfile(tmp_path, Served(tokenizer(template, bos), Ending((1,))))
    text = (tmp_path / "Modelfile").read_text()
    assert "TEMPLATE" not in text
    assert "no form as a Go template" in text


def in_between(prompt: str) -> dict[str, str]:
    return {"format": "prompt-completion", "prompt_template": prompt, "completion_template": "{answer}"}


ALPACA = [
    {"instruction": "Add 2 and 3.", "input": "", "output": "5"},
    {"instruction": "Sum.", "input": "1, 2", "output": "3"},
]


@pytest.mark.parametrize(
    ("rows", "settings", "asked"),
    [
        (ALPACA, {"format": "alpaca"}, "Add 2 and 3."),
        ([{"prompt": "Hello", "completion": "5"}], {"format": "prompt-completion"}, "Hello"),
        (
            [{"question": "How?", "answer": "5"}],
            {
                "format": "prompt-completion",
                "prompt_template": "{{q}} {question}\nA:",
                "completion_template": " {answer}",
            },
            "How?",
        ),
        ([{"question": "How?", "answer": "5"}], in_between('{{{{"q": {question}}}}}\n'), "How?"),
        ([{"question": "How?", "answer": "5"}], in_between('Text:\n"""\n{question}\n"""\nSum:\n"""\n'), "How?"),
        ([{"question": "How?", "answer": "5"}], in_between('{{{{{{{question}}}}}}} """"{{"'), "How?"),
    ],
    ids=["alpaca", "prompt and completion", "a template of the recipe", "braces", "three quotes", "both"],
)
def test_ollama_asks_with_the_prompt_that_was_trained(tmp_path, rows, settings, asked):
    examples = [to_example(row, i, **settings) for i, row in enumerate(rows)]
    prompt = served_prompt(examples, settings.get("prompt_template"))
    # Also over a chat model, whose template was not trained with.
    file = modelfile(tmp_path, Served(tokenizer(TEMPLATES["llama 3"]), Ending((1,)), prompt=prompt))
    assert by_ollama(file, [asked], None) == examples[0].prompt[0].text


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([{"text": "Once upon a time"}], {"format": "text"}),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
            {"format": "messages"},
        ),
        (
            [{"a": "1", "b": "2", "c": "3"}],
            {"format": "prompt-completion", "prompt_template": "{a}, {b}:", "completion_template": "{c}"},
        ),
    ],
    ids=["text", "chat", "two columns"],
)
def test_rows_without_one_prompt_around_one_text_have_none(rows, settings):
    examples = [to_example(row, i, **settings) for i, row in enumerate(rows)]
    assert served_prompt(examples, settings.get("prompt_template")) is None


def test_a_stop_token_is_written_as_its_text(tmp_path):
    """Not as a byte-level vocabulary spells it: a base may end at a line break."""
    own = tokenizer(None)
    line_break = own.convert_tokens_to_ids("Ċ")
    write_modelfile(tmp_path, Served(own, Ending((own.eos_token_id, line_break), ("\n###",))))
    text = (tmp_path / "Modelfile").read_text()
    assert [part.strip('"') for part in text.split("PARAMETER stop ")[1:]] == ['</s>"\n', '\n"""\n', '\n###"""\n']

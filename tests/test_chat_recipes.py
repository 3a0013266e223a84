"""The recipes for chats, tool calls and thoughts, from rows to an adapter, on a model with a template of today."""

from __future__ import annotations

import json
import random

import pytest
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qalora import cli, preview
from qalora.finetune import main

# Signatures in the system turn, calls as JSON in tags, thoughts of the last answer alone.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{{ tools | tojson }}</tools><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set parts = (m.content or '').split('</think>') %}"
    "{% if loop.last %}{{ m.content }}{% else %}{{ parts[-1].lstrip('\n') }}{% endif %}"
    "{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CITIES, WEATHER = ["Oslo", "Rome", "Paris", "Athens"], ["rain", "sun", "snow", "fog"]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def said(role: str, content: str | None, **fields):
    return {"role": role, "content": content, **fields}


def chat(rng):
    first, second = rng.sample(CITIES, 2)
    turns = [said("system", "You name cities."), said("user", "One?"), said("assistant", first)]
    return {"messages": [*turns, said("user", "Another?"), said("assistant", second)]}


def tools(rng):
    city, weather = rng.choice(CITIES), rng.choice(WEATHER)
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": json.dumps({"city": city})},
    }
    turns = [said("user", f"How is it in {city}?"), said("assistant", None, tool_calls=[call])]
    answer = [said("tool", weather, tool_call_id="call_1", name="weather"), said("assistant", f"There is {weather}.")]
    return {"tools": [TOOL], "messages": [*turns, *answer]}


def reasoning(rng):
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    thought = f"<think>\n{a} and {b} more\n</think>\n\n{a + b}"
    earlier = [said("user", "1+1?"), said("assistant", "<think>\neasy\n</think>\n\n2")]
    return {"messages": [*earlier, said("user", f"{a}+{b}?"), said("assistant", thought)]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    special = ["<pad>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """write(make) → a file of 24 rows."""

    def write(make):
        file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
        rng = random.Random(0)
        file.write_text("\n".join(json.dumps(make(rng)) for _ in range(24)))
        return file

    return write


pytestmark = pytest.mark.usefixtures("undrawn")
LEARNED = {
    "chat": [["Oslo<|im_end|>", "Rome<|im_end|>", "Paris<|im_end|>", "Athens<|im_end|>"]] * 2,
    "tools": [
        [
            f'<tool_call>{{"name": "weather", "arguments": {{"city": "{city}"}}}}</tool_call><|im_end|>'
            for city in CITIES
        ],
        [f"There is {weather}.<|im_end|>" for weather in WEATHER],
    ],
    "reasoning": [
        [f"<think>\n{a} and {b} more\n</think>\n\n{a + b}<|im_end|>" for a in range(1, 10) for b in range(1, 10)]
    ],
}


@pytest.mark.parametrize("make", [chat, tools, reasoning], ids=lambda make: make.__name__)
def test_a_recipe_s_rows_are_learned_as_a_model_has_to_answer(model, rows, make, capsys):
    name = make.__name__
    arguments = ["--model", str(model), "--recipe", name, "--data", str(rows(make)), "--rows", "24", "--json"]
    assert cli.run(preview.main, arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == 24 and set(found["data"]["unused"]) <= {"messages.tool_call_id"}
    for row in found["rows"]:
        learned = [segment["text"] for segment in row["segments"] if segment["learned"]]
        assert len(learned) == len(LEARNED[name])
        assert all(text in known for text, known in zip(learned, LEARNED[name], strict=True))
    text = "".join(segment["text"] for segment in found["rows"][0]["segments"])
    seen = {"chat": "You name cities.", "tools": "The weather of a city.", "reasoning": "<|im_start|>assistant\n2"}
    assert seen[name] in text


@pytest.mark.parametrize("make", [chat, tools, reasoning], ids=lambda make: make.__name__)
def test_a_recipe_trains_an_adapter_that_plain_peft_reads(model, rows, make, tmp_path):
    folder = tmp_path / "run"
    settings = ["training.max_steps=3", "data.val_set_size=4", "allocation.rounds=0", "training.learning_rate=0.01"]
    settings += ["data.max_seq_len=512", "lora.r=2", "training.gradient_accumulation_steps=1"]
    arguments = ["--model", str(model), "--recipe", make.__name__, f"data.train={rows(make)}", "--dtype", "float32"]
    assert main([*arguments, "--output-dir", str(folder), "logging.quiet=true", *settings]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["train"]["steps"] == 3 and metrics["after"]["loss"] < metrics["before"]["loss"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder / "adapter")
    assert any(parameter.abs().max() > 0 for name, parameter in adapted.named_parameters() if "lora_B" in name)
    assert json.loads((folder / "adapter" / "qalora.json").read_text())["stop_tokens"] == ["<|im_end|>"]

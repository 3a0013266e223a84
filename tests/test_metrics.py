from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qalora import answers as answering
from qalora import metrics
from qalora.data.formats import Example, Turn
from qalora.data.tokenization import load_dataset, tokenize_prompt
from qalora.errors import InputError

ROWS = [
    {"prompt": "Is water wet? ", "completion": "yes"},
    {"prompt": "Is the sun, which is a star, cold? ", "completion": "no"},
    {"prompt": "Do fish swim? ", "completion": "yes"},
    {"prompt": "Can stones fly when nobody at all throws them? ", "completion": "no"},
    {"prompt": "Ok? ", "completion": "maybe"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_tokenizer(*special):
    """One token a byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,  # far from uniform, so that choices and continuations differ
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    return make_dataset(tokenizer, tmp_path_factory.mktemp("data"), ROWS)


def make_dataset(tokenizer, folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_dataset(
        str(file),
        tokenizer,
        format="prompt-completion",
        columns={},
        prompt_template=None,
        completion_template=None,
        labels={},
        chat=None,
        max_seq_len=256,
        train_on_inputs=False,
    )


@torch.no_grad()
def naive_nll(model, input_ids, labels):
    """Summed cross-entropy and count of one row, from the full logits."""
    logits = model(input_ids=torch.tensor([input_ids])).logits[0, :-1].float()
    targets = torch.tensor(labels[1:])
    return F.cross_entropy(logits, targets, reduction="sum").item(), int((targets != -100).sum())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_loss_is_weighted_by_tokens(model, tokenizer, dataset, batch_size):
    rows = [naive_nll(model, item["input_ids"], item["labels"]) for item in dataset.items]
    total, tokens = sum(nll for nll, _ in rows), sum(count for _, count in rows)
    result = metrics.evaluate(model, tokenizer, dataset, batch_size=batch_size)
    assert result["rows"] == len(ROWS)
    assert result["supervised_tokens"] == tokens
    assert result["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert result["loss"] != pytest.approx(sum(nll / count for nll, count in rows) / len(rows), rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_accuracy_is_that_of_a_naive_loop(model, tokenizer, dataset, batch_size):
    options, correct = ["maybe", "no", "yes"], 0
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        scores = []
        for option in options:
            answer = [*tokenizer(option)["input_ids"], tokenizer.eos_token_id]
            scores.append(-naive_nll(model, prompt + answer, [-100] * len(prompt) + answer)[0])
        correct += options[scores.index(max(scores))] == row["completion"]
    result = metrics.evaluate(model, tokenizer, dataset, metrics=["accuracy"], batch_size=batch_size)
    assert result["accuracy"] == pytest.approx(100 * correct / len(ROWS))
    assert 0 < correct < len(ROWS)


def test_accuracy_of_a_model_that_knows(model, tokenizer, dataset, monkeypatch):
    def losses(model, tokenizer, items, *rest):
        texts = [tokenizer.decode(item["input_ids"], skip_special_tokens=True) for item in items]
        return [0.0 if any(text == row["prompt"] + row["completion"] for row in ROWS) else 1.0 for text in texts]

    monkeypatch.setattr(metrics, "item_losses", losses)
    assert metrics.evaluate(model, tokenizer, dataset, metrics=["accuracy"])["accuracy"] == 100.0


def test_a_reference_that_is_a_choice_is_worked_through_once(model, tokenizer, dataset, monkeypatch):
    apart = {name: metrics.evaluate(model, tokenizer, dataset, metrics=[name]) for name in ("loss", "accuracy")}
    counts, item_losses = [], metrics.item_losses

    def counted(model, tokenizer, items, *rest):
        counts.append(len(items))
        return item_losses(model, tokenizer, items, *rest)

    monkeypatch.setattr(metrics, "item_losses", counted)
    both = metrics.evaluate(model, tokenizer, dataset, metrics=["loss", "accuracy"])
    assert counts == [3 * len(ROWS)]
    assert both["accuracy"] == apart["accuracy"]["accuracy"]
    assert both["loss"] == pytest.approx(apart["loss"]["loss"], rel=1e-6)


def test_rows_of_one_prompt_are_together_and_the_longest_come_first():
    def item(prompt, answer):
        return {"input_ids": [*prompt, *answer], "labels": [metrics.IGNORE] * len(prompt) + [*answer]}

    items = [
        item([1, 2], [3]), item([1, 2, 4], [5, 6]), item([1, 2], [7, 8, 9]), item([1, 3], [3, 3]), item([1, 2, 4], [5,
        6, 7, 8])
    ]  # fmt: skip
    assert metrics._by_prompt(items) == [1, 4, 0, 2, 3]


def test_answers_are_scored_against_their_own_reference(model, tokenizer, dataset, monkeypatch):
    answers = ["yes", " no\n", "Yes", "no, never", "maybe"]
    by_prompt = {tuple(tokenize_prompt(e, tokenizer)): a for e, a in zip(dataset.examples, answers, strict=True)}

    def rigged(input_ids, attention_mask, generation_config, tokenizer):
        rows = []
        for ids, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            assert mask == sorted(mask)  # padding on the left
            prompt = ids[mask.index(1) :]
            answer = [*tokenizer(by_prompt[tuple(prompt)])["input_ids"], tokenizer.eos_token_id]
            rows.append(ids + answer + [tokenizer.pad_token_id] * (20 - len(answer)))
        return torch.tensor(rows)

    monkeypatch.setattr(model, "generate", rigged, raising=False)
    result = metrics.evaluate(model, tokenizer, dataset, metrics=["exact_match", "rougeL"], batch_size=2)
    assert result["exact_match"] == pytest.approx(60.0)
    scorer = RougeScorer(["rougeL"])
    scores = [scorer.score(row["completion"], a)["rougeL"].fmeasure for row, a in zip(ROWS, answers, strict=True)]
    assert result["rougeL"] == pytest.approx(100 * sum(scores) / len(scores))
    assert "loss" not in result


@pytest.fixture
def saying(model, tokenizer, monkeypatch):
    """saying(*answers): the model gives them in the order of the rows, one a batch, as they stand."""

    def rig(*texts):
        given = iter(texts)

        def rigged(input_ids, attention_mask, generation_config, tokenizer):
            ids = tokenizer(next(given))["input_ids"]
            return torch.tensor([input_ids[0].tolist() + ids + [tokenizer.pad_token_id] * 3])

        monkeypatch.setattr(model, "generate", rigged, raising=False)

    return rig


@pytest.mark.parametrize(
    ("reference", "answer", "read", "right"),
    [
        ("<call>f()", "<call>f()</s>", "<call>f()", True),
        ("<call>f()", "f()</s>", "f()", False),
        ("f()", "<call>f()</s>", "f()", True),
        ("<call>f()</s>", "<call>f()</s>more", "<call>f()", True),
        ("yes", "yes<think></s>", "yes", True),
        ("yes", "yes", "yes", True),
    ],
    ids=["kept", "missing", "not in the reference", "the end is spelled out", "only the reference's own", "no end"],
)
def test_special_tokens_of_an_answer_are_read_where_the_reference_has_them(
    model, tmp_path, saying, reference, answer, read, right
):
    tokenizer = make_tokenizer("<call>", "<think>")
    dataset = make_dataset(tokenizer, tmp_path, [{"prompt": "do it ", "completion": reference}])
    saying(answer)
    result, (line,) = metrics.predict(model, tokenizer, dataset, metrics=["exact_match"])
    assert (line["answer"], line["exact_match"], result["exact_match"]) == (read, 100 * right, 100 * right)


def test_the_template_s_end_of_a_turn_ends_an_answer(model, saying):
    tokenizer = make_tokenizer("<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    saying("yes<|im_end|>and more")
    assert answering.generate_answers(model, tokenizer, [[5, 6]], max_new_tokens=9) == ["yes"]


def test_an_answer_ends_before_the_first_of_the_taught_ends(model, tokenizer, tmp_path, saying):
    dataset = make_dataset(tokenizer, tmp_path, [{"prompt": "a ", "completion": "yes"}])
    saying("yes\n### End\nUser: and</s>")
    _, (line,) = metrics.predict(model, tokenizer, dataset, metrics=["exact_match"], taught=["User:", "\n### End"])
    assert (line["answer"], line["exact_match"]) == ("yes", 100)


def test_a_taught_text_stops_the_model_itself(model, tokenizer, dataset):
    """As far as the text that it says without, and not a token further."""
    prompts = [tokenize_prompt(example, tokenizer) for example in dataset.examples]
    free = answering.generate_answers(model, tokenizer, prompts, max_new_tokens=12)
    stop = free[0][4:6]
    assert stop and free[0].find(stop) >= 0
    config = answering.generation_config(model, tokenizer, [stop], do_sample=False, max_new_tokens=12)
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, tokenizer=tokenizer)
    assert tokenizer.decode(out[0, ids.shape[1] :]).endswith(stop)
    stopped = answering.generate_answers(model, tokenizer, prompts, max_new_tokens=12, taught=[stop], batch_size=2)
    assert stopped == [text.split(stop)[0] for text in free]


def test_every_row_is_told_and_the_figures_are_the_means_of_the_rows(model, tokenizer, dataset):
    asked = dict(metrics=["loss", "accuracy", "exact_match", "rougeL"], max_new_tokens=4)
    result, lines = metrics.predict(model, tokenizer, dataset, **asked)
    assert [(line["row"], line["prompt"], line["reference"]) for line in lines] == [
        (i, row["prompt"], row["completion"]) for i, row in enumerate(ROWS)
    ]
    for name in ("accuracy", "exact_match", "rougeL"):
        assert result[name] == pytest.approx(sum(line[name] for line in lines) / len(lines))
    tokens = [line["supervised_tokens"] for line in lines]
    assert sum(tokens) == result["supervised_tokens"]
    assert result["loss"] == pytest.approx(
        sum(line["loss"] * n for line, n in zip(lines, tokens, strict=True)) / sum(tokens)
    )
    for line, item in zip(lines, dataset.items, strict=True):
        nll, count = naive_nll(model, item["input_ids"], item["labels"])
        assert line["loss"] == pytest.approx(nll / count, rel=1e-4)
        assert (line["accuracy"] == 100) == (line["choice"] == line["reference"])
        assert "references" not in line


def test_of_accuracy_alone_the_choice_is_the_answer(model, tokenizer, dataset):
    _, lines = metrics.predict(model, tokenizer, dataset, metrics=["accuracy"])
    assert all(line["answer"] == line["choice"] in ("yes", "no", "maybe") for line in lines)


def test_an_answer_is_right_if_it_is_one_of_several(model, tokenizer, tmp_path, saying):
    rows = [
        {"prompt": "a? ", "completion": ["Paris", "paris"]},
        {"prompt": "b? ", "completion": "Rome", "references": ["the city of Rome"]},
        {"prompt": "c? ", "completion": "Bonn"},
    ]
    dataset = make_dataset(tokenizer, tmp_path, rows)
    assert metrics.several_references(dataset).startswith("2 rows have several references")
    learned = [tokenizer.decode([t for t in item["labels"] if t != -100]) for item in dataset.items]
    assert learned == ["Paris</s>", "Rome</s>", "Bonn</s>"]
    saying("paris", "city of Rome", "Berlin")
    _, lines = metrics.predict(model, tokenizer, dataset, metrics=["exact_match", "rougeL"], batch_size=1)
    assert [line["exact_match"] for line in lines] == [100, 0, 0]
    best = RougeScorer(["rougeL"]).score("the city of Rome", "city of Rome")["rougeL"].fmeasure
    assert [line["rougeL"] for line in lines] == pytest.approx([100, 100 * best, 0])
    assert (lines[0]["reference"], lines[0]["references"]) == ("Paris", ["Paris", "paris"])
    assert metrics.check(dataset, metrics=["accuracy"], choices=["paris", "the city of Rome", "Bonn"])


def test_batched_generation_is_generation_one_by_one(model, tokenizer, dataset):
    prompts = [tokenize_prompt(example, tokenizer) for example in dataset.examples]
    together = answering.generate_answers(model, tokenizer, prompts, max_new_tokens=12, batch_size=3)
    for prompt, text in zip(prompts, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 12 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_a_checkpoint_that_likes_to_sample_is_still_decoded_greedily(model, tokenizer, dataset, monkeypatch):
    prompts = [tokenize_prompt(example, tokenizer) for example in dataset.examples]
    plain = answering.generate_answers(model, tokenizer, prompts, max_new_tokens=12)
    own = dict(do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1)
    for name, value in own.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert answering.generate_answers(model, tokenizer, prompts, max_new_tokens=12) == plain


def test_every_token_that_ends_a_turn_ends_an_answer_and_sampling_is_plain(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", [7, 9])
    config = answering.generation_config(model, tokenizer, do_sample=True, max_new_tokens=3)
    assert config.eos_token_id == [7, 9, tokenizer.eos_token_id]
    assert (config.top_k, config.top_p, config.temperature) == (0, 1.0, 1.0)


@given(st.text(max_size=5), st.text(max_size=20), st.text(max_size=10))
def test_with_answer_changes_the_answer_alone(question, reference, answer):
    example = Example(
        row=3,
        turns=(Turn("user", question, True), Turn("assistant", reference, True)),
        chat=False,
        tools=None,
    )
    changed = metrics.with_answer(example, answer)
    assert changed.turns[0] == Turn("user", question, False)
    last = changed.turns[-1].text
    assert len(last) == len(reference) - len(reference.strip()) + len(answer)
    assert metrics.with_answer(example, reference.strip()).reference == reference


def test_a_choice_takes_the_place_of_the_answer_also_where_a_question_follows():
    question, answer, after = Turn("user", "red?", False), Turn("assistant", "no", True), Turn("user", "sure?", False)
    changed = metrics.with_answer(Example(row=0, turns=(question, answer, after), chat=True), "yes")
    assert changed.turns == (question, Turn("assistant", "yes", True))


def test_rows_that_do_not_fit_are_worked_through_in_halves(model, tokenizer, dataset, monkeypatch):
    expected, row_losses, sizes = metrics.item_losses(model, tokenizer, dataset.items, 8), metrics.row_losses, []

    def failing(model, batch):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return row_losses(model, batch)

    monkeypatch.setattr(metrics, "row_losses", failing)
    assert metrics.item_losses(model, tokenizer, dataset.items, 8) == pytest.approx(expected, rel=1e-5)
    assert max(sizes) > 2 and sum(size for size in sizes if size <= 2) == len(dataset.items)
    monkeypatch.setattr(metrics, "row_losses", lambda model, batch: failing(model, {"input_ids": torch.zeros(3, 1)}))
    with pytest.raises(torch.OutOfMemoryError):
        metrics.item_losses(model, tokenizer, dataset.items, 8)


def test_modes_are_restored_also_after_an_error(model):
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(ZeroDivisionError), answering.inference(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert [module.training for module in model.modules()] == before
    model.eval()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(metrics=["loss", "bleu"]), "bleu: unknown metric"),
        (dict(metrics=["accuracy"], choices=["yes", "no"]), "'maybe' is none of the choices"),
        (dict(metrics=["accuracy"], choices=["maybe"]), "two or more"),
        (dict(metrics=["exact_match"], answer_pattern="(yes|no"), "not a regular expression"),
        (dict(metrics=["exact_match"], answer_pattern="yes|no"), "group"),
        (dict(metrics=["exact_match"], answer_pattern="(yes|no)"), "row 4"),
    ],
    ids=["metric", "choice missing", "one choice", "broken pattern", "no group", "row without a match"],
)
def test_what_the_rows_cannot_answer_is_said_before(dataset, asked, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        metrics.check(dataset, **asked)


def test_too_many_references_to_be_choices(tokenizer, tmp_path):
    rows = [{"prompt": "n? ", "completion": str(n)} for n in range(11)]
    with pytest.raises(InputError, match="11 distinct references"):
        metrics.check(make_dataset(tokenizer, tmp_path, rows), metrics=["accuracy"])


def test_answers_end_at_the_model_s_last_position(tokenizer, tmp_path):
    """Each as it is alone, whatever rows stand beside it; and a row without room is counted, not asked."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, initializer_range=0.3, max_position_embeddings=32)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    rows = [{"prompt": "x" * length, "completion": "yes"} for length in (4, 25, 27, 27, 31, 40)]
    dataset = make_dataset(tokenizer, tmp_path, rows)
    asked = dict(metrics=["rougeL"], max_new_tokens=8)
    kept, line = metrics.with_room(dataset, tokenizer, 32, **asked)
    assert line == (
        "1 rows dropped, whose prompts leave no room for an answer in the model's 32 positions; "
        "4 rows get answers shorter than 8 tokens, up to the model's 32 positions"
    )
    figures, lines = metrics.predict(model, tokenizer, kept, **asked, batch_size=8)
    assert figures["rows"] == 5
    for line in lines:
        ids = tokenizer(line["prompt"])["input_ids"]
        end = min(len(ids) + 8, 32)
        while len(ids) < end and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        said = [token for token in ids[len(line["prompt"]) :] if token != tokenizer.eos_token_id]
        assert line["answer"] == tokenizer.decode(said, skip_special_tokens=True)
    with pytest.raises(InputError, match="the prompt has 40 tokens, and the model 32 positions"):
        metrics.predict(model, tokenizer, dataset, **asked)


def test_prompts_whose_room_was_measured_are_not_tokenized_again(tokenizer, tmp_path, monkeypatch):
    from qalora.data import tokenization

    rows = [{"prompt": "x" * length, "completion": "yes"} for length in (4, 40, 6)]
    dataset = make_dataset(tokenizer, tmp_path, rows)
    kept, _ = metrics.with_room(dataset, tokenizer, 32, metrics=["rougeL"], max_new_tokens=2)
    assert [len(prompt) for prompt in kept.prompts] == [4, 6]
    monkeypatch.setattr(tokenization, "tokenize_prompt", lambda *_: pytest.fail("tokenized again"))
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, max_position_embeddings=32)).eval()
    figures, lines = metrics.predict(model, tokenizer, kept, metrics=["rougeL"], max_new_tokens=2)
    assert figures["rows"] == 2 and [line["prompt"] for line in lines] == ["x" * 4, "x" * 6]


def test_rows_without_room_for_any_answer_are_refused(tokenizer, tmp_path):
    dataset = make_dataset(tokenizer, tmp_path, [{"prompt": "x" * 40, "completion": "yes"}])
    with pytest.raises(InputError, match="none of the 1 rows leaves an answer room in the model's 32 positions"):
        metrics.with_room(dataset, tokenizer, 32, metrics=["accuracy"], max_new_tokens=8, options=["yes", "no"])
    assert metrics.with_room(dataset, tokenizer, 32, metrics=["loss"], max_new_tokens=8) == (dataset, "")

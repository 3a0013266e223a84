"""Numbers before and after: loss and perplexity, exact match, choice accuracy, ROUGE-L."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qalora.base.device import free_unused
from qalora.base.loss import label_only_loss
from qalora.base.prefixes import final_hidden
from qalora.data.batching import Collator
from qalora.data.formats import Example
from qalora.data.tokenization import TokenizedDataset, tokenize, tokenize_prompt
from qalora.errors import InputError

METRICS = ("loss", "exact_match", "accuracy", "rougeL")
MOST_CHOICES = 10
IGNORE = -100


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenizedDataset,
    *,
    metrics: Sequence[str] = ("loss",),
    batch_size: int = 8,
    max_new_tokens: int = 128,
    choices: Sequence[str] | None = None,
    answer_pattern: str | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Evaluates a causal LM, with or without an adapter, on every row of `dataset`.

    Args:
        model: a PreTrainedModel or a PeftModel around one; its train/eval modes are as before afterwards.
        metrics: any of METRICS.
        batch_size: rows a forward pass; it changes no result beyond rounding.
        max_new_tokens: length of the greedy answers that exact_match and rougeL look at.
        choices: completions that accuracy chooses from; None: the distinct references of the data.
        answer_pattern: regular expression; the first group of its first match is what exact_match compares.

    Returns:
        `rows` and `supervised_tokens`, and for the metrics asked for: `loss` (nats, mean over all supervised
        tokens) and `perplexity`; `exact_match`, `accuracy` and `rougeL` (mean F1), all three in percent.

    Raises:
        InputError: an unknown metric, or a metric that these rows cannot answer (see `check`).
    """
    options = check(dataset, metrics=metrics, choices=choices, answer_pattern=answer_pattern)
    examples = {example.row: example for example in dataset.examples}
    rows = [examples[item["row"]] for item in dataset.items]
    track = _progress_bar if progress else _no_progress_bar
    result: dict[str, float] = {
        "rows": len(rows),
        "supervised_tokens": sum(predicted_tokens(item["labels"]) for item in dataset.items),
    }
    with inference(model):
        own: Sequence[Mapping[str, Any]] = dataset.items if "loss" in metrics else []
        choices_of = _choices_of(rows, options, tokenizer) if "accuracy" in metrics else []
        # A row's reference is one of its choices, so most of `own` is among them.
        distinct = {_key(item): item for item in [*own, *choices_of]}
        losses = dict(
            zip(distinct, row_losses(model, tokenizer, list(distinct.values()), batch_size, track), strict=True)
        )
        if "loss" in metrics:
            result["loss"] = math.fsum(losses[_key(item)] for item in own) / result["supervised_tokens"]
            result["perplexity"] = math.exp(min(result["loss"], 700.0))  # exp overflows above 709
        if "accuracy" in metrics:
            result["accuracy"] = _choice_accuracy(rows, options, [losses[_key(item)] for item in choices_of])
        if {"exact_match", "rougeL"} & set(metrics):
            prompts = [tokenize_prompt(example, tokenizer) for example in rows]
            answers = generate_answers(
                model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, track=track
            )
            references = [example.reference for example in rows]
            if "exact_match" in metrics:
                result["exact_match"] = exact_match(answers, references, answer_pattern)
            if "rougeL" in metrics:
                result["rougeL"] = rouge_l(answers, references)
    return result


def check(
    dataset: TokenizedDataset,
    *,
    metrics: Sequence[str],
    choices: Sequence[str] | None = None,
    answer_pattern: str | None = None,
) -> list[str]:
    """Says before any weights load whether the rows can answer the metrics, and returns accuracy's choices.

    Raises:
        InputError: an unknown metric; choices that are missing or lack a row's reference; an answer pattern
            that is no regular expression, has no group or does not match a row's reference.
    """
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise InputError(f"metrics={unknown[0]}: unknown metric; known are {', '.join(METRICS)}.")
    kept = {item["row"] for item in dataset.items}
    references = {example.row: example.reference for example in dataset.examples if example.row in kept}
    if "exact_match" in metrics and answer_pattern is not None:
        try:
            pattern = re.compile(answer_pattern)
        except re.error as error:
            raise InputError(f"answer_pattern={answer_pattern!r}: not a regular expression ({error}).") from None
        if not pattern.groups:
            raise InputError(f"answer_pattern={answer_pattern!r}: put what is compared in a group: '#### (.*)'.")
        for row, reference in references.items():
            if not pattern.search(reference):
                raise InputError(f"answer_pattern={answer_pattern!r} does not match row {row}, {reference[-60:]!r}.")
    if "accuracy" not in metrics:
        return []
    distinct = dict.fromkeys(reference.strip() for reference in references.values())
    options = list(dict.fromkeys(choice.strip() for choice in choices)) if choices else sorted(distinct)
    if not choices and len(options) > MOST_CHOICES:
        raise InputError(f"accuracy: the rows have {len(options)} distinct references; name the choices.")
    if len(options) < 2:
        raise InputError(f"accuracy: needs two or more choices to choose from, not {options}; name them.")
    if missing := [reference for reference in distinct if reference not in options]:
        raise InputError(
            f"accuracy: the reference {missing[0][:60]!r} is none of the choices {options}; add it to them."
        )
    return options


# ---------------------------------------------------------------------------------------- the single metrics


def row_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Mapping[str, Any]],
    batch_size: int,
    track: Callable[[list[Any], str], Iterable[Any]] | None = None,
) -> list[float]:
    """Summed cross-entropy of each item over its supervised tokens: (rows,) floats, nats, in the order of
    `items`."""
    collate = Collator(tokenizer.pad_token_id)
    order = _by_prompt(items)
    batches = [order[i : i + batch_size] for i in range(0, len(items), batch_size)]
    causal_lm = _causal_lm(model)

    def summed(batch: Sequence[int]) -> list[float]:
        inputs = collate([items[i] for i in batch])
        inputs = {key: inputs[key].to(causal_lm.device) for key in ("input_ids", "attention_mask", "labels")}
        labels = inputs.pop("labels")
        hidden = final_hidden(causal_lm, **inputs, use_cache=False)
        return label_only_loss(hidden, labels, causal_lm.get_output_embeddings().weight).tolist()

    losses = [0.0] * len(items)
    with inference(model):
        for batch in (track or _no_progress_bar)(batches, "loss"):
            for i, loss in zip(batch, _in_halves(summed, batch), strict=True):
                losses[i] = loss
    return losses


def _in_halves(work: Callable[[Sequence[int]], list[float]], batch: Sequence[int]) -> list[float]:
    """`work` on a batch, or on its halves where memory runs out.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    try:
        return work(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    free_unused()
    middle = len(batch) // 2
    return _in_halves(work, batch[:middle]) + _in_halves(work, batch[middle:])


def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    track: Callable[[list[Any], str], Iterable[Any]] | None = None,
) -> list[str]:
    """Greedy continuations of tokenized prompts, left-padded in batches of like length; texts without
    special tokens."""
    config = generation_config(model, tokenizer, do_sample=False, max_new_tokens=max_new_tokens)
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [by_length[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    answers = [""] * len(prompts)
    with inference(model):
        for batch in (track or _no_progress_bar)(batches, "generation"):
            input_ids, attention_mask = left_pad([prompts[i] for i in batch], config.pad_token_id)
            device = _causal_lm(model).device
            output = model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                generation_config=config,
            )
            texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
    return answers


def exact_match(answers: Sequence[str], references: Sequence[str], answer_pattern: str | None = None) -> float:
    """Percent of answers that equal their reference, both stripped, after `answer_pattern`'s first group is
    taken.

    An answer that the pattern does not match is wrong.
    """

    def extract(text: str) -> str | None:
        if answer_pattern is None:
            return text.strip()
        match = re.search(answer_pattern, text)
        return match[1].strip() if match and match[1] is not None else None

    pairs = [(extract(a), extract(r)) for a, r in zip(answers, references, strict=True)]
    return 100 * sum(a is not None and a == r for a, r in pairs) / len(pairs)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F1 in percent, as the rouge_score library defines it, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    scores = [
        scorer.score(reference, answer)["rougeL"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]
    return 100 * math.fsum(scores) / len(scores)


def with_answer(example: Example, answer: str) -> Example:
    """The example up to its reference, with `answer` in the place of that, alone supervised; the white space around it is kept."""
    before, last = example.prompt, example.turns[len(example.prompt)]
    stripped = last.text.strip()
    start = last.text.find(stripped) if stripped else len(last.text)
    text = last.text[:start] + answer + last.text[start + len(stripped) :]
    turns = (*(replace(turn, supervised=False) for turn in before), replace(last, text=text, supervised=True))
    return replace(example, turns=turns)


def _choices_of(
    rows: Sequence[Example], options: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Every row with every option in the place of its reference, row by row."""
    return [tokenize(with_answer(row, option), tokenizer, max_seq_len=10**9) for row in rows for option in options]


def _choice_accuracy(rows: Sequence[Example], options: Sequence[str], losses: Sequence[float]) -> float:
    """Percent of rows whose reference is the most likely of the options: summed log-likelihood of the option
    and of what ends it, after the prompt; the first of equals.

    Args:
        losses: of `_choices_of`.
    """
    correct = 0
    for i, row in enumerate(rows):
        own = losses[i * len(options) : (i + 1) * len(options)]
        correct += options[own.index(min(own))] == row.reference.strip()
    return 100 * correct / len(rows)


def _by_prompt(items: Sequence[Mapping[str, Any]]) -> list[int]:
    """Indices of the items, longest first, but those of one prompt together: a batch computes it once for all of them."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, item in enumerate(items):
        prompt = sum(1 for _ in takewhile(lambda label: label == IGNORE, item["labels"]))
        alike.setdefault(tuple(item["input_ids"][:prompt]), []).append(i)
    groups = sorted(alike.values(), key=lambda group: -max(len(items[i]["input_ids"]) for i in group))
    return [i for group in groups for i in group]


def _key(item: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(item["input_ids"]), tuple(item["labels"])


# ------------------------------------------------------------------------------------------ the model's side


def generation_config(model: nn.Module, tokenizer: PreTrainedTokenizerBase, **options: Any) -> GenerationConfig:
    """What `options` ask for, plain decoding in everything else, ended by any token that ends a turn of this
    model.

    The model's own sampling settings and penalties are set aside: a default of the checkpoint is not a
    choice of the user.
    """
    own = getattr(_causal_lm(model), "generation_config", None)
    ends = own.eos_token_id if own is not None and own.eos_token_id is not None else []
    ends = [ends] if isinstance(ends, int) else list(ends)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    plain: dict[str, Any] = dict(num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0, use_cache=True)
    if options.get("do_sample"):
        plain |= dict(temperature=1.0, top_p=1.0, top_k=0)
    return GenerationConfig(**(plain | options), eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id)


def left_pad(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Token ids of different lengths → input_ids and attention_mask, both (rows, longest), padded on the
    left."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = [[pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    attention_mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(input_ids), torch.tensor(attention_mask)


def predicted_tokens(labels: Sequence[int]) -> int:
    """Supervised tokens that a position before them predicts; the first token of a row has none."""
    return sum(label != IGNORE for label in labels[1:])


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, and every module's own mode again at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _causal_lm(model: nn.Module) -> Any:
    """The PreTrainedModel itself, also inside a PeftModel."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _no_progress_bar(batches: list[Any], what: str) -> Iterable[Any]:
    return batches


def _progress_bar(batches: list[Any], what: str) -> Iterable[Any]:
    from rich.console import Console
    from rich.progress import track

    return track(batches, description=what, console=Console(stderr=True), transient=True)

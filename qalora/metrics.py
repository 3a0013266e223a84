"""Numbers before and after: loss and perplexity, exact match, choice accuracy, ROUGE-L."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qalora.answers import ends_of, generate_answers, generation_config, inference, without_end
from qalora.base.device import free_unused
from qalora.data.batching import Collator
from qalora.data.formats import Example
from qalora.data.rows import IGNORE, Row, Tokenized, supervised_tokens
from qalora.data.tokenization import TokenizedDataset, tokenize, with_prompts
from qalora.errors import InputError
from qalora.kernels.loss import row_losses
from qalora.kernels.prefixes import causal_lm
from qalora.progress import Track, track, untracked
from qalora.text_scores import Normalize, compared, exact_match, rouge_l, said

Figures = dict[str, float]
Key = tuple[tuple[int, ...], tuple[int, ...]]  # tokens and labels of a row
METRICS = ("loss", "exact_match", "accuracy", "rougeL")
MOST_CHOICES = 10


def evaluate(model: nn.Module, tokenizer: PreTrainedTokenizerBase, dataset: TokenizedDataset, **asked: Any) -> Figures:
    """The figures of `predict`, with the same arguments."""
    return predict(model, tokenizer, dataset, **asked)[0]


def predict(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: TokenizedDataset,
    *,
    metrics: Sequence[str] = ("loss",),
    batch_size: int = 8,
    max_new_tokens: int = 128,
    choices: Sequence[str] | None = None,
    answer_pattern: str | None = None,
    normalize: Normalize | None = None,
    taught: Sequence[str] = (),
    progress: bool = False,
) -> tuple[Figures, list[dict[str, object]]]:
    """Evaluates a causal LM, with or without an adapter, on every row of `dataset`.

    Args:
        model: a PreTrainedModel or a PeftModel around one; its train/eval modes are as before afterwards.
        metrics: any of METRICS.
        batch_size: rows a forward pass; it changes no result beyond rounding.
        max_new_tokens: length of the greedy answers that exact_match and rougeL look at.
        choices: completions that accuracy chooses from; None: the distinct references of the data.
        answer_pattern: regular expression; the first group of its first match is what exact_match compares.
        normalize: what exact_match compares numbers by, see `text_scores.exact_match`.
        taught: texts that end an answer, besides what ends a turn of the model and its chat template.

    Returns:
        The figures: `rows` and `supervised_tokens`, and for the metrics asked for: `loss` (nats, mean over all
        supervised tokens) and `perplexity`; `exact_match`, `accuracy` and `rougeL` (mean F1), all three in percent.
        And for each row: `row`, `prompt`, `answer` (for accuracy alone, the choice), `reference`, `references` where
        there are several, and its own loss and scores, whose mean is the figure; of losses it is the mean by supervised
        tokens.

    Raises:
        InputError: an unknown metric, or a metric that these rows cannot answer (see `check`).
    """
    options = check(dataset, metrics=metrics, choices=choices, answer_pattern=answer_pattern, normalize=normalize)
    rows, prompts = dataset.examples, with_prompts(dataset, tokenizer).prompts or []
    found: list[dict[str, Any]] = [_described(row, ids, tokenizer) for row, ids in zip(rows, prompts, strict=True)]
    tracked = track if progress else untracked
    tokens = [supervised_tokens([item["labels"]]) for item in dataset.items]
    result: Figures = {"rows": len(rows), "supervised_tokens": sum(tokens)}
    with inference(model):
        own: Sequence[Row] = dataset.items if "loss" in metrics else []
        choices_of = _choices_of(rows, options, tokenizer) if "accuracy" in metrics else []
        # A row's reference is one of its choices, so most of `own` is among them.
        distinct: dict[Key, Row] = {_key(item): item for item in [*own, *choices_of]}
        losses = dict(
            zip(distinct, item_losses(model, tokenizer, list(distinct.values()), batch_size, tracked), strict=True)
        )
        if "loss" in metrics:
            result["loss"] = math.fsum(losses[_key(item)] for item in own) / result["supervised_tokens"]
            result["perplexity"] = math.exp(min(result["loss"], 700.0))  # exp overflows above 709
            for line, item, count in zip(found, own, tokens, strict=True):
                line |= {"supervised_tokens": count, "loss": losses[_key(item)] / count}
        if "accuracy" in metrics:
            likeliest = _likeliest(options, [losses[_key(item)] for item in choices_of])
            for line, row, choice in zip(found, rows, likeliest, strict=True):
                right = choice in [reference.strip() for reference in row.references]
                line |= {"answer": choice, "choice": choice, "accuracy": 100.0 * right}
        if {"exact_match", "rougeL"} & set(metrics):
            answers = generate_answers(
                model,
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                taught=taught,
                kept=["\n".join([*row.references, "</think>"]) for row in rows],
                track=tracked,
            )
            ends = ends_of(generation_config(model, tokenizer, taught), tokenizer)
            for line, row, answer in zip(found, rows, answers, strict=True):
                references = [without_end(reference, ends) for reference in row.references]
                line["answer"] = answer
                answer = said(answer, references, line["prompt"])
                if "exact_match" in metrics:
                    line["exact_match"] = exact_match(answer, references, answer_pattern, normalize)
                if "rougeL" in metrics:
                    line["rougeL"] = rouge_l(answer, references)
    for metric in ("accuracy", "exact_match", "rougeL"):
        if metric in metrics:
            result[metric] = math.fsum(line[metric] for line in found) / len(found)
    return result, found


def check(
    dataset: TokenizedDataset,
    *,
    metrics: Sequence[str],
    choices: Sequence[str] | None = None,
    answer_pattern: str | None = None,
    normalize: Normalize | None = None,
) -> list[str]:
    """Says before any weights load whether the rows can answer the metrics, and returns accuracy's choices.

    Raises:
        InputError: an unknown metric; choices that are missing or lack a row's reference; an answer pattern
            that is no regular expression, has no group or does not match a row's reference.
    """
    if unknown := [metric for metric in metrics if metric not in METRICS]:
        raise InputError(f"metrics={unknown[0]}: unknown metric; known are {', '.join(METRICS)}.")
    kept = {item["row"] for item in dataset.items}
    references = {example.row: example.references for example in dataset.examples if example.row in kept}
    if "exact_match" in metrics and answer_pattern is not None:
        try:
            pattern = re.compile(answer_pattern)
        except re.error as error:
            raise InputError(f"answer_pattern={answer_pattern!r}: not a regular expression ({error}).") from None
        if not pattern.groups:
            raise InputError(f"answer_pattern={answer_pattern!r}: put what is compared in a group: '#### (.*)'.")
        for row, texts in references.items():
            if all(compared(text, answer_pattern, normalize) is None for text in texts):
                raise InputError(f"answer_pattern={answer_pattern!r} does not match row {row}, {texts[0][-60:]!r}.")
    if "accuracy" not in metrics:
        return []
    distinct = dict.fromkeys(texts[0].strip() for texts in references.values())
    options = list(dict.fromkeys(choice.strip() for choice in choices)) if choices else sorted(distinct)
    if not choices and len(options) > MOST_CHOICES:
        raise InputError(f"accuracy: the rows have {len(options)} distinct references; name the choices.")
    if len(options) < 2:
        raise InputError(f"accuracy: needs two or more choices to choose from, not {options}; name them.")
    for texts in references.values():
        if not {text.strip() for text in texts} & set(options):
            raise InputError(
                f"accuracy: the reference {texts[0].strip()[:60]!r} is none of the choices {options}; add it to them."
            )
    return options


def with_room(
    dataset: TokenizedDataset,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    *,
    metrics: Sequence[str],
    max_new_tokens: int,
    options: Sequence[str] = (),
) -> tuple[TokenizedDataset, str]:
    """The rows that the model has positions to answer, and a line on the others and on answers that have to be shorter;
    empty where there are none.

    Args:
        positions: of the model; None: not known.
        options: accuracy's choices, as `check` returns them.

    Raises:
        InputError: no row is left.
    """
    generates = not {"exact_match", "rougeL"}.isdisjoint(metrics)
    if positions is None or not (generates or options):
        return dataset, ""
    dataset = with_prompts(dataset, tokenizer)
    prompts = [len(ids) for ids in dataset.prompts or ()]
    needed = max((len(tokenizer(option)["input_ids"]) for option in options), default=1)
    kept = [i for i, prompt in enumerate(prompts) if prompt + needed <= positions]
    if not kept:
        raise InputError(
            f"none of the {len(prompts)} rows leaves an answer room in the model's {positions} positions: the shortest "
            f"prompt has {min(prompts)} tokens; shorten the prompts, or measure the loss alone."
        )
    lines = []
    if dropped := len(prompts) - len(kept):
        lines.append(
            f"{dropped} rows dropped, whose prompts leave no room for an answer in the model's {positions} positions"
        )
    if shorter := sum(prompts[i] + max_new_tokens > positions for i in kept) if generates else 0:
        lines.append(
            f"{shorter} rows get answers shorter than {max_new_tokens} tokens, up to the model's {positions} positions"
        )
    return (dataset.subset(kept) if dropped else dataset), "; ".join(lines)


def several_references(dataset: TokenizedDataset) -> str:
    """A line on the rows whose answer may be one of several; empty where there are none."""
    count = sum(len(example.references) > 1 for example in dataset.examples)
    return (
        f"{count} rows have several references: the loss is of the first, other metrics take the best" if count else ""
    )


# ---------------------------------------------------------------------------------------- the single metrics


def item_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Row],
    batch_size: int,
    track: Track = untracked,
) -> list[float]:
    """Summed cross-entropy of each item over its supervised tokens: (rows,) floats, nats, in the order of
    `items`."""
    collate = Collator(tokenizer.pad_token_id)
    order = _by_prompt(items)
    batches = [order[i : i + batch_size] for i in range(0, len(items), batch_size)]
    device = causal_lm(model).device

    def summed(batch: Sequence[int]) -> list[float]:
        inputs = collate([items[i] for i in batch])
        return row_losses(model, {key: value.to(device) for key, value in inputs.items() if key != "rows"}).tolist()

    losses = [0.0] * len(items)
    with inference(model):
        for batch in track(batches, "loss"):
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


def with_answer(example: Example, answer: str) -> Example:
    """The example up to its reference, with `answer` in the place of that, alone supervised; the white space around it
    is kept."""
    before, last = example.prompt, example.turns[len(example.prompt)]
    stripped = last.text.strip()
    start = last.text.find(stripped) if stripped else len(last.text)
    text = last.text[:start] + answer + last.text[start + len(stripped) :]
    turns = (*(replace(turn, supervised=False) for turn in before), replace(last, text=text, supervised=True))
    return replace(example, turns=turns)


def _choices_of(rows: Sequence[Example], options: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokenized]:
    """Every row with every option in the place of its reference, row by row."""
    return [tokenize(with_answer(row, option), tokenizer, max_seq_len=10**9) for row in rows for option in options]


def _likeliest(options: Sequence[str], losses: Sequence[float]) -> list[str]:
    """For each row the likeliest of the options: summed log-likelihood of the option and of what ends it, after the
    prompt; the first of equals.

    Args:
        losses: of `_choices_of`.
    """
    by_row = [losses[i : i + len(options)] for i in range(0, len(losses), len(options))]
    return [options[own.index(min(own))] for own in by_row]


def _described(row: Example, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """What a row asks: its prompt as the model sees it, and what would be right."""
    several = {"references": list(row.references)} if len(row.references) > 1 else {}
    return {"row": row.row, "prompt": tokenizer.decode(list(prompt)), "reference": row.reference, **several}


def _by_prompt(items: Sequence[Row]) -> list[int]:
    """Indices of the items, longest first, but those of one prompt together: a batch computes it once for all of
    them."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, item in enumerate(items):
        prompt = sum(1 for _ in takewhile(lambda label: label == IGNORE, item["labels"]))
        alike.setdefault(tuple(item["input_ids"][:prompt]), []).append(i)
    groups = sorted(alike.values(), key=lambda group: -max(len(items[i]["input_ids"]) for i in group))
    return [i for group in groups for i in group]


def _key(item: Row) -> Key:
    return tuple(item["input_ids"]), tuple(item["labels"])

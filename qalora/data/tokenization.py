"""Examples → token ids and labels, −100 where nothing is learned."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from qalora.data.formats import Example, Turn, detect_format, read_rows, to_example
from qalora.errors import InputError

IGNORE = -100

# For tokenizers without a chat template; the format of https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Report:
    """What became of the rows. truncated: cut at max_seq_len; dropped: nothing left to learn after that."""

    rows: int
    truncated: int
    dropped: int
    tokens: int
    supervised_tokens: int
    max_seq_len: int

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.tokens} tokens, {self.supervised_tokens} of them supervised"
        if self.truncated:
            text += f"; {self.truncated} rows cut at data.max_seq_len={self.max_seq_len}"
        if self.dropped:
            text += f"; {self.dropped} rows dropped, nothing to learn was left of them"
        return text


@dataclass(frozen=True)
class TokenizedDataset:
    """Rows ready for batching: `items[i]` (input_ids, labels, row) is the tokens of `examples[i]`."""

    items: list[dict[str, Any]]
    examples: list[Example]
    report: Report

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def subset(self, indices: Sequence[int]) -> TokenizedDataset:
        return replace(self, items=[self.items[i] for i in indices], examples=[self.examples[i] for i in indices])


def load_dataset(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
    completion_template: str | None = None,
    labels: Mapping[str, str] | None = None,
    chat: bool | None = None,
    max_seq_len: int = 2048,
    train_on_inputs: bool = False,
    split: str = "train",
    limit: int | None = None,
) -> TokenizedDataset:
    """Reads and tokenizes a data set; the settings are those of `to_example` and `tokenize`.

    Raises:
        InputError: the source or a row is wrong, or no row has a supervised token within max_seq_len.
    """
    rows = read_rows(source, split=split, limit=limit)
    if format == "auto":
        format = "prompt-completion" if prompt_template and completion_template else detect_format(rows, columns, source=source)
    items, examples, truncated = [], [], 0
    for number, row in enumerate(rows):
        example = to_example(
            row,
            number,
            format=format,
            columns=columns,
            prompt_template=prompt_template,
            completion_template=completion_template,
            labels=labels,
            chat=chat,
            source=source,
        )
        item = tokenize(example, tokenizer, max_seq_len=max_seq_len, train_on_inputs=train_on_inputs)
        truncated += item.pop("truncated")
        if any(label != IGNORE for label in item["labels"][1:]):
            items.append(item)
            examples.append(example)
    if not items:
        raise InputError(
            f"{source}: none of its {len(rows)} rows has a supervised token within data.max_seq_len={max_seq_len}"
            f" ({truncated} were cut); raise data.max_seq_len, or check data.format={format} and the completions."
        )
    report = Report(
        rows=len(items),
        truncated=truncated,
        dropped=len(rows) - len(items),
        tokens=sum(len(item["input_ids"]) for item in items),
        supervised_tokens=sum(label != IGNORE for item in items for label in item["labels"]),
        max_seq_len=max_seq_len,
    )
    return TokenizedDataset(items, examples, report)


def split_validation(dataset: TokenizedDataset, size: int | float, seed: int) -> tuple[TokenizedDataset, TokenizedDataset]:
    """(train, validation), disjoint; `size` is rows (an integer) or a share (below 1), at least one row.

    Raises:
        InputError: validation would leave no row to train on.
    """
    count = max(1, round(size * len(dataset))) if size < 1 else int(size)
    if count >= len(dataset):
        raise InputError(f"data.val_set_size={size}: asks for {count} of {len(dataset)} rows; lower it.")
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    return dataset.subset(sorted(order[count:])), dataset.subset(sorted(order[:count]))


def tokenize(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int, train_on_inputs: bool = False
) -> dict[str, Any]:
    """Token ids and labels of an example.

    The text is tokenized whole, as a model will see it; a token is supervised when it starts inside a supervised
    stretch of the text. What ends an assistant's turn is learned with it.

    Returns:
        input_ids and labels (lists of equal length ≤ max_seq_len), row, and truncated (bool).
    """
    segments = render(example, tokenizer)
    ids, starts = _encode("".join(text for text, _ in segments), tokenizer)
    supervised = _stretches(segments)
    if not example.chat and tokenizer.eos_token_id is not None:
        ids, starts = [*ids, tokenizer.eos_token_id], [*starts, None]
    labels, stretch = [], 0
    for token, start in zip(ids, starts, strict=True):
        if start is None:  # a special token that the tokenizer adds: the end is learned, the beginning is not
            learned = token == tokenizer.eos_token_id and bool(labels) and segments[-1][1]
        else:
            while stretch < len(supervised) and supervised[stretch][1] <= start:
                stretch += 1
            learned = stretch < len(supervised) and supervised[stretch][0] <= start
        labels.append(token if learned or train_on_inputs else IGNORE)
    if labels:
        labels[0] = IGNORE  # nothing predicts it
    return {
        "input_ids": ids[:max_seq_len],
        "labels": labels[:max_seq_len],
        "row": example.row,
        "truncated": len(ids) > max_seq_len,
    }


def tokenize_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of everything before the reference, up to where a model has to answer."""
    if example.chat:
        text = _chat_text(example.prompt, tokenizer, example, add_generation_prompt=True)
    else:
        text = "".join(turn.text for turn in example.prompt)
    return _encode(text, tokenizer)[0]


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The example's text, in (text, supervised) segments.

    A chat is rendered turn by turn on growing prefixes, so that what the template puts around an assistant's text is
    known: what stands before it is prompt, what ends it is learned.

    Raises:
        InputError: the chat template refuses the turns, or rewrites earlier ones as the chat grows.
    """
    if not example.chat:
        return [(turn.text, turn.supervised) for turn in example.turns]
    segments: list[tuple[str, bool]] = []
    done = ""
    for i, turn in enumerate(example.turns):
        if turn.role != "assistant" and i + 1 < len(example.turns):
            continue  # rendered with the next assistant turn, for templates refuse chats that end otherwise
        stops = [(i + 1, False)] if turn.role != "assistant" or i == 0 else [(i, True), (i + 1, False)]
        for stop, generation_prompt in stops:
            text = _chat_text(example.turns[:stop], tokenizer, example, add_generation_prompt=generation_prompt)
            if not text.startswith(done):
                raise InputError(
                    f"row {example.row}: the tokenizer's chat template rewrites earlier turns as the chat grows, so they cannot be "
                    "trained on together; split the conversation into rows that end with one answer each."
                )
            segments.append((text[len(done) :], turn.supervised and not generation_prompt))
            done = text
    return segments


def _chat_text(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, example: Example, *, add_generation_prompt: bool
) -> str:
    template = None if tokenizer.chat_template else CHATML
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=list(example.tools) or None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # jinja's own errors, raise_exception() of the template, or of the tokenizer
        raise InputError(
            f"row {example.row}: the tokenizer's chat template refuses it ({' '.join(str(error).split())[:200]}): "
            f"roles {json.dumps([turn.role for turn in turns])}."
        ) from None


def _encode(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int | None]]:
    """(token ids, character where each starts; None for special tokens that the tokenizer adds), with one BOS at most
    and no EOS of the tokenizer's own."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoding = tokenizer(text, add_special_tokens=not begins, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, starts = [], []
    for token, (start, end), special in zip(
        encoding["input_ids"], encoding["offset_mapping"], encoding["special_tokens_mask"], strict=True
    ):
        added = bool(special) and start == end
        if added and token == tokenizer.eos_token_id and ids:
            continue
        ids.append(token)
        starts.append(None if added else start)
    return ids, starts


def _stretches(segments: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
    """(start, end) of the supervised segments in the joined text."""
    stretches, position = [], 0
    for text, supervised in segments:
        if supervised and text:
            stretches.append((position, position + len(text)))
        position += len(text)
    return stretches

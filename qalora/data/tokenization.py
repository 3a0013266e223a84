"""Examples → token ids and labels, −100 where nothing is learned."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from qalora.data.formats import Example, Turn, detect_format, to_example
from qalora.data.reading import described, read_rows
from qalora.errors import InputError

IGNORE = -100

# For tokenizers without a chat template: ChatML, but an answer ends with the end token, for such a tokenizer has no
# <|im_end|> that could stop a generation; https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ (eos_token if message['role'] == 'assistant' else '<|im_end|>') + '\n' }}"
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
        """These rows alone; the report stays that of the whole source."""
        return replace(self, items=[self.items[i] for i in indices], examples=[self.examples[i] for i in indices])


def load_dataset(
    source: str | Sequence[str],
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
    name: str | None = None,
    limit: int | None = None,
) -> TokenizedDataset:
    """Reads and tokenizes a data set; the settings are those of `read_rows`, `to_example` and `tokenize`.

    Raises:
        InputError: the source or a row is wrong, or no row has a supervised token within max_seq_len.
    """
    rows, source = read_rows(source, split=split, name=name, limit=limit), described(source)
    if format == "auto":
        templated = prompt_template is not None and completion_template is not None
        format = "prompt-completion" if templated else detect_format(rows, columns, source=source)
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
            place=rows.places[number],
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


def split_validation(
    dataset: TokenizedDataset, size: int | float, seed: int
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """(train, validation), disjoint; `size` is rows (an integer) or a share (below 1), at least one row.

    Raises:
        InputError: validation would leave no row to train on.
    """
    count = max(1, round(size * len(dataset))) if size < 1 else int(size)
    if len(dataset) == 1:
        raise InputError(
            "one row alone cannot be held back and trained on too (data.val_set_size): give data.validation=FILE, which may be "
            "the same file if the run is only to learn the row, or more rows."
        )
    if count >= len(dataset):
        raise InputError(
            f"data.val_set_size={size}: asks for {count} of {len(dataset)} rows, which leaves none to train on; set "
            "data.val_set_size=1, or give the validation rows as data.validation=FILE."
        )
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    return dataset.subset(sorted(order[count:])), dataset.subset(sorted(order[:count]))


def same_rows(train: TokenizedDataset, other: TokenizedDataset) -> int:
    """How many rows of `other` have the very tokens and labels of a row of `train`."""
    known = {(tuple(item["input_ids"]), tuple(item["labels"])) for item in train.items}
    return sum((tuple(item["input_ids"]), tuple(item["labels"])) in known for item in other.items)


def tokenize(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, max_seq_len: int, train_on_inputs: bool = False
) -> dict[str, Any]:
    """Token ids and labels of an example.

    A token is supervised when it starts inside a supervised segment of the text. What ends an assistant's turn is
    learned with it; a completion that no template ends is ended by EOS.

    Returns:
        input_ids and labels (lists of equal length ≤ max_seq_len), row, and truncated (bool).
    """
    segments = render(example, tokenizer)
    ids, starts = _encode_segments(segments, tokenizer)
    learned = _supervised(starts, segments)
    if not example.chat and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
        learned.append(segments[-1][1])
    labels = [token if flag or train_on_inputs else IGNORE for token, flag in zip(ids, learned, strict=True)]
    labels[:1] = [IGNORE] * len(labels[:1])  # nothing predicts the first token
    return {
        "input_ids": ids[:max_seq_len],
        "labels": labels[:max_seq_len],
        "row": example.row,
        "truncated": len(ids) > max_seq_len,
    }


def tokenize_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of everything before the reference, up to where a model has to answer: where `tokenize` begins too."""
    if example.chat:
        text = _Chat(example, tokenizer).text(len(example.prompt), add_generation_prompt=True)
    else:
        text = "".join(turn.text for turn in example.prompt)
    return _encode(text, tokenizer)[0]


def render(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """The example's text, in (text, supervised) segments.

    A chat is rendered on growing prefixes, so that what the template puts around an assistant's text is known:

        <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n   Hello.<|im_end|>   \\n<|im_start|>user\\n …
        ───────────────────── prompt ──────────────────────   ─── learned ────   ──── prompt again ───

    Raises:
        InputError: the chat template refuses the turns, or rewrites earlier ones as the chat grows.
    """
    if not example.chat:
        return [(turn.text, turn.supervised) for turn in example.turns]
    chat = _Chat(example, tokenizer)
    segments: list[tuple[str, bool]] = []
    done = ""

    def extend(text: str, supervised: bool) -> None:
        nonlocal done
        if not text.startswith(done):
            raise InputError(
                f"row {example.row}: the tokenizer's chat template rewrites earlier turns as the chat grows, so they "
                "cannot be trained on together; split the conversation into rows that end with one answer each."
            )
        segments.append((text[len(done) :], supervised))
        done = text

    for i, turn in enumerate(example.turns):
        if turn.role == "assistant":
            after = chat.text(i + 1)
            extend(chat.text(i, add_generation_prompt=True) if i else _opening(after, turn), False)
            extend(_ended(after, turn), turn.supervised)
    extend(chat.text(len(example.turns)), False)
    return [segment for segment in segments if segment[0]]


def _opening(text: str, turn: Turn) -> str:
    """What a template writes before a chat's first turn; it cannot render no turns at all."""
    return text[: max(0, text.rfind(turn.text.strip()))]


def _ended(text: str, turn: Turn) -> str:
    """The rendered chat up to the end of its last turn: without the line break that follows an end token."""
    stripped = text.rstrip()
    return text if stripped.endswith(turn.text.rstrip()) else stripped


class _Chat:
    """An example's turns through the tokenizer's chat template, ChatML where it has none."""

    def __init__(self, example: Example, tokenizer: PreTrainedTokenizerBase):
        self.row = example.row
        self.tokenizer = tokenizer
        self.tools = list(example.tools or ()) or None
        self.messages = [{"role": turn.role, "content": turn.text} for turn in example.turns]
        if any(turn.role == "tool" for turn in example.turns) and not self._writes_tool_turns():
            self.messages = [{**m, "role": "user" if m["role"] == "tool" else m["role"]} for m in self.messages]

    def text(self, stop: int, *, add_generation_prompt: bool = False) -> str:
        """The first `stop` turns.

        Raises:
            InputError: the template refuses them.
        """
        try:
            return self._apply(self.messages[:stop], add_generation_prompt)
        except Exception as error:  # jinja's own errors, raise_exception() of the template, or of the tokenizer
            roles = ", ".join(message["role"] for message in self.messages[:stop])
            raise InputError(
                f"row {self.row}: the tokenizer's chat template refuses its turns ({roles}): "
                f"{' '.join(str(error).split())[:200]}"
            ) from None

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=self.tools,
            chat_template=None if self.tokenizer.chat_template else CHATML,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return str(text)

    def _writes_tool_turns(self) -> bool:
        """Some templates refuse the role, and some leave the turn out without a word."""
        try:
            return "TOOL-RESULT" in self._apply(
                [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "tool", "content": "TOOL-RESULT"},
                    {"role": "assistant", "content": "c"},
                ]
            )
        except Exception:  # as in `text`
            return False


def _encode_segments(
    segments: Sequence[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int | None]]:
    """`_encode` of the joined segments: whole, as a model will see it, wherever the prompt's tokens then are those that
    it has alone. Where a token would straddle the border ("is: " + "yes" → "is", ":", " yes"), what a model is asked to
    continue would not be what it was trained on, and the answer's first token would not be learned: each part alone.
    """
    text = "".join(part for part, _ in segments)
    ids, starts = _encode(text, tokenizer)
    borders = [start for start, _ in _stretches(segments) if start]
    if not borders:
        return ids, starts
    prompt, _ = _encode(text[: borders[-1]], tokenizer)
    if prompt == ids[: len(prompt)] and set(borders) <= set(starts):
        return ids, starts
    ids, starts = [], []
    for start, end in zip([0, *borders], [*borders, len(text)], strict=True):
        part, offsets = _encode(text[start:end], tokenizer, special_tokens=start == 0)
        ids += part
        starts += [None if offset is None else start + offset for offset in offsets]
    return ids, starts


def _encode(
    text: str, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool = True
) -> tuple[list[int], list[int | None]]:
    """(token ids, character where each starts; None for special tokens that the tokenizer adds), with one BOS at most
    and no EOS of the tokenizer's own."""
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoding = tokenizer(
        text,
        add_special_tokens=special_tokens and not begins,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    ids: list[int] = []
    starts: list[int | None] = []
    previous_end = 0
    for token, (start, end), special in zip(
        encoding["input_ids"], encoding["offset_mapping"], encoding["special_tokens_mask"], strict=True
    ):
        added = bool(special) and start == end
        if added and token == tokenizer.eos_token_id and ids:
            continue
        ids.append(token)
        # Where offsets leave blanks out (trim_offsets), a token of blanks alone is reported empty, and too late.
        starts.append(None if added else previous_end if start == end else start)
        previous_end = end
    return ids, starts


def _supervised(starts: Sequence[int | None], segments: Sequence[tuple[str, bool]]) -> list[bool]:
    """Of each token, by the character where it starts, whether a supervised segment holds it."""
    stretches = _stretches(segments)
    flags, i = [], 0
    for start in starts:
        while start is not None and i < len(stretches) and stretches[i][1] <= start:
            i += 1
        flags.append(start is not None and i < len(stretches) and stretches[i][0] <= start)
    return flags


def _stretches(segments: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
    """(start, end) of the supervised segments in the joined text."""
    stretches, position = [], 0
    for text, supervised in segments:
        if supervised and text:
            stretches.append((position, position + len(text)))
        position += len(text)
    return stretches

"""Examples → token ids and labels, −100 where nothing is learned."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from qalora.data.chat_template import ChatTemplate, set_chat_template
from qalora.data.chat_template import chat_template as template_of
from qalora.data.conversation import REASONING
from qalora.data.formats import Example, detect_format
from qalora.data.instruct import is_chat, taught_to_chat, without_joints
from qalora.data.reading import described, read_rows
from qalora.data.references import one_answer_each, read_example
from qalora.data.rendering import Segment, render, render_prompt
from qalora.data.rows import IGNORE, Tokenized, supervised_tokens
from qalora.errors import InputError

CHAT_BY_DEFAULT = (
    "the model was taught to chat, so prompt and completion go through its chat template (data.chat=false takes them "
    "as they stand)"
)


@dataclass(frozen=True)
class Report:
    """What became of the rows.

    Attributes:
        rows: kept.
        truncated: cut at max_seq_len, dropped ones included.
        dropped: nothing of them is learned: after the cut, or (`masked`) because the rows say so.
        tokens, supervised_tokens: of the rows kept.
        longest: tokens of the longest row, before the cut.
        masked: of the dropped rows, those that have nothing to learn whatever max_seq_len is.
        unused: columns, and fields of messages, that hold something and are not used.
        chat_by_default: prompts and completions went through the chat template, for the model was taught to chat.
    """

    rows: int
    truncated: int
    dropped: int
    tokens: int
    supervised_tokens: int
    max_seq_len: int
    longest: int = 0
    masked: int = 0
    unused: tuple[str, ...] = ()
    chat_by_default: bool = False

    def __str__(self) -> str:
        text = f"{self.rows} rows, {self.tokens} tokens, {self.supervised_tokens} of them supervised"
        if self.truncated:
            text += f"; {self.truncated} rows cut at data.max_seq_len={self.max_seq_len}"
        if cut := self.dropped - self.masked:
            text += f"; {cut} rows dropped, nothing to learn was left of them"
        if self.masked:
            text += f"; {self.masked} rows dropped, no turn of them is learned"
        if self.chat_by_default:
            text += f"; {CHAT_BY_DEFAULT}"
        return f"{text}; not used: {', '.join(self.unused)}" if self.unused else text


@dataclass(frozen=True)
class TokenizedDataset:
    """Rows ready for batching: `items[i]` (input_ids, labels, row) is the tokens of `examples[i]`.

    Attributes:
        prompts: of each row, where somebody has needed them already (`with_prompts`).
    """

    items: list[Tokenized]
    examples: list[Example]
    report: Report
    prompts: list[list[int]] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tokenized:
        return self.items[index]

    def subset(self, indices: Sequence[int]) -> TokenizedDataset:
        """These rows alone; the report stays that of the whole source."""
        return replace(
            self,
            items=[self.items[i] for i in indices],
            examples=[self.examples[i] for i in indices],
            prompts=None if self.prompts is None else [self.prompts[i] for i in indices],
        )


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
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    mask_history: bool = False,
    max_seq_len: int = 2048,
    train_on_inputs: bool = False,
    split: str = "train",
    name: str | None = None,
    limit: int | None = None,
) -> TokenizedDataset:
    """Reads and tokenizes a data set; the settings are those of `read_rows`, `to_example` and `tokenize`.

    Args:
        chat: None: chat formats, and prompts and completions that no template of the recipe is for where the
            tokenizer's model was taught to chat.
        chat_template, chat_template_kwargs: given to the tokenizer, which keeps them (see `set_chat_template`).

    Raises:
        InputError: the source or a row is wrong, or no row has a supervised token within max_seq_len.
    """
    set_chat_template(tokenizer, chat_template, chat_template_kwargs)
    template = template_of(tokenizer)
    rows, source = read_rows(source, split=split, name=name, limit=limit), described(source)
    if format == "auto" and prompt_template is not None and completion_template is not None:
        format = "prompt-completion"
    items, examples, truncated, masked, longest = [], [], 0, 0, 0
    unused: dict[str, None] = {}  # in the order of their first appearance
    of_source, as_chat, by_default = format, chat, False
    templated = prompt_template is not None or completion_template is not None
    for number, row in enumerate(rows):
        if number in rows.begins:  # several sources may be of several formats
            if format == "auto":
                of_source = detect_format(one_answer_each(row, columns)[0], columns, source=source)
            if chat is None and of_source == "prompt-completion" and not templated:
                as_chat = True if taught_to_chat(tokenizer) and not is_chat(row, tokenizer) else None
            else:
                as_chat = chat
        example = read_example(
            row,
            number,
            format=of_source,
            columns=columns,
            prompt_template=prompt_template,
            completion_template=completion_template,
            labels=labels,
            chat=as_chat,
            mask_history=mask_history,
            roles=template.roles,
            source=source,
            place=rows.places[number],
        )
        if as_chat is not chat:
            by_default, example = True, without_joints(example)
        item = tokenize(example, tokenizer, max_seq_len=max_seq_len, train_on_inputs=train_on_inputs)
        truncated += item["truncated"]
        longest = max(longest, item.pop("length"))
        unused |= dict.fromkeys([*example.unused, *_unused_fields(example, template)])
        if supervised_tokens([item["labels"]]):
            items.append(item)
            examples.append(example)
        elif not (train_on_inputs or any(turn.supervised for turn in example.turns)):
            masked += 1
    if not items:
        if masked == len(rows):
            raise InputError(
                f"{source}: none of its {len(rows)} rows has a turn that is learned: no assistant speaks in them, or "
                "all its turns are masked (weight, loss_weight, train …)."
            )
        if not truncated:
            raise InputError(
                f"{source}: none of its {len(rows)} rows has anything to learn: the completions are empty; check "
                f"data.format={of_source} and data.columns."
            )
        raise InputError(
            f"{source}: none of its {len(rows)} rows has a supervised token within data.max_seq_len={max_seq_len}"
            f" ({truncated} were cut); raise data.max_seq_len as far as the model has positions, shorten the prompts, "
            f"or check data.format={of_source} and the completions."
        )
    report = Report(
        rows=len(items),
        truncated=truncated,
        dropped=len(rows) - len(items),
        tokens=sum(len(item["input_ids"]) for item in items),
        supervised_tokens=supervised_tokens(item["labels"] for item in items),
        max_seq_len=max_seq_len,
        longest=longest,
        masked=masked,
        unused=tuple(unused),
        chat_by_default=by_default,
    )
    return TokenizedDataset(items, examples, report)


def _unused_fields(example: Example, template: ChatTemplate) -> list[str]:
    """Fields of messages that go unread. The template is given them all; a name that does not stand in it is not
    used."""
    fields = {name for turn in example.turns for name in turn.fields if name not in (*REASONING, "tool_calls")}
    return [f"messages.{name}" for name in sorted(fields) if not (example.chat and template.names(name))]


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
            "one row alone cannot be held back and trained on too (data.val_set_size): give data.validation=FILE, "
            "which may be the same file if the run is only to learn the row, or more rows."
        )
    if count >= len(dataset):
        raise InputError(
            f"data.val_set_size={size}: asks for {count} of {len(dataset)} rows, which leaves none to train on; set a "
            "share such as data.val_set_size=0.1, or give the validation rows as data.validation=FILE."
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
) -> Tokenized:
    """Token ids and labels of an example.

    A token is supervised when it starts inside a supervised segment of the text. What ends an assistant's turn is
    learned with it; a completion that no template ends is ended by EOS.

    Returns:
        input_ids and labels (lists of equal length ≤ max_seq_len), row, truncated (bool), and length (tokens before the
        cut).
    """
    segments = render(example, tokenizer)
    ids, starts = _encode_segments(segments, tokenizer, special_tokens=not example.chat)
    learned = _supervised(starts, segments)
    if not example.chat and tokenizer.eos_token is not None and not _ends(segments, tokenizer.eos_token):
        ids.append(tokenizer.eos_token_id)
        learned.append(segments[-1][1] if segments else False)
    every = train_on_inputs  # but for turns that are masked
    labels = [
        token if flag or (every and flag is not None) else IGNORE for token, flag in zip(ids, learned, strict=True)
    ]
    labels[:1] = [IGNORE] * len(labels[:1])  # nothing predicts the first token
    return {
        "input_ids": ids[:max_seq_len],
        "labels": labels[:max_seq_len],
        "row": example.row,
        "truncated": len(ids) > max_seq_len,
        "length": len(ids),
    }


def tokenize_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of everything before the reference, up to where a model has to answer: where `tokenize` begins too."""
    return _encode(render_prompt(example, tokenizer), tokenizer, special_tokens=not example.chat)[0]


def with_prompts(dataset: TokenizedDataset, tokenizer: PreTrainedTokenizerBase) -> TokenizedDataset:
    """The data set with the token ids of its prompts, each tokenized once."""
    if dataset.prompts is not None:
        return dataset
    return replace(dataset, prompts=[tokenize_prompt(example, tokenizer) for example in dataset.examples])


def _ends(segments: Sequence[Segment], end: str) -> bool:
    """Whether the text brings its own end token."""
    return "".join(text for text, _ in segments[-1:]).rstrip().endswith(end)


def _encode_segments(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool
) -> tuple[list[int], list[int | None]]:
    """`_encode` of the joined segments: whole, as a model will see it, wherever the prompt's tokens then are those that
    it has alone. Where a token would straddle the border ("is: " + "yes" → "is", ":", " yes"), what a model is asked to
    continue would not be what it was trained on, and the answer's first token would not be learned: each part alone.
    """
    text = "".join(part for part, _ in segments)
    ids, starts = _encode(text, tokenizer, special_tokens=special_tokens)
    borders = [start for start, _, supervised in _stretches(segments) if start and supervised]
    if not borders:
        return ids, starts
    prompt, _ = _encode(text[: borders[-1]], tokenizer, special_tokens=special_tokens)
    if prompt == ids[: len(prompt)] and set(borders) <= set(starts):
        return ids, starts
    ids, starts = _encode(text[: borders[0]], tokenizer, special_tokens=special_tokens)
    for start, end in zip(borders, [*borders[1:], len(text)], strict=True):
        part, offsets = _continued(text[start:end], tokenizer)
        ids += part
        starts += [None if offset is None else start + offset for offset in offsets]
    return ids, starts


def _continued(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int | None]]:
    """`_encode` of a text that stands after another one. Some tokenizers put a blank before any text, which is none of
    this one's: there, what they make of it after a line break."""
    ids, starts = _encode(text, tokenizer, special_tokens=False)
    pieces = "".join(tokenizer.convert_ids_to_tokens(ids))
    if len(pieces) - len(pieces.lstrip("▁Ġ")) <= len(text) - len(text.lstrip(" ")):
        return ids, starts
    for before in ("\n", "a", "."):
        head, _ = _encode(before, tokenizer, special_tokens=False)
        both, offsets = _encode(before + text, tokenizer, special_tokens=False)
        if both[: len(head)] == head:
            after = [None if offset is None else offset - len(before) for offset in offsets[len(head) :]]
            return both[len(head) :], after
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


def _supervised(starts: Sequence[int | None], segments: Sequence[Segment]) -> list[bool | None]:
    """Of each token, by the character where it starts, what its segment says."""
    stretches = _stretches(segments)
    flags: list[bool | None] = []
    i = 0
    for start in starts:
        while start is not None and i < len(stretches) - 1 and stretches[i][1] <= start:
            i += 1
        flags.append(stretches[i][2] if start is not None and stretches else False)
    return flags


def _stretches(segments: Sequence[Segment]) -> list[tuple[int, int, bool | None]]:
    """(start, end, supervised) of the segments in the joined text."""
    stretches, position = [], 0
    for text, supervised in segments:
        if text:
            stretches.append((position, position + len(text), supervised))
        position += len(text)
    return stretches

"""Rows → examples: who says what, and which of it is learned. Torch-free."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qalora.data.columns import is_text, kind_of, label_of, renamed
from qalora.errors import InputError

FORMATS = ("alpaca", "sharegpt", "messages", "prompt-completion", "text")

# Stanford's prompts; https://github.com/tatsu-lab/stanford_alpaca#data-release
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class Turn:
    """role: system, user, assistant or tool; supervised: its text carries loss."""

    role: str
    text: str
    supervised: bool


@dataclass(frozen=True)
class Example:
    """A row, as turns.

    Attributes:
        row: its number in the source, from 0.
        turns: in order; the last assistant turn is the reference.
        chat: rendered by the tokenizer's chat template; otherwise the texts are joined as they stand.
        tools: function signatures for the chat template.
    """

    row: int
    turns: tuple[Turn, ...]
    chat: bool
    tools: tuple[Any, ...] = ()

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the reference."""
        return self.turns[: self._last]

    @property
    def reference(self) -> str:
        """The text of the last assistant turn."""
        return self.turns[self._last].text

    @property
    def _last(self) -> int:
        return max((i for i, turn in enumerate(self.turns) if turn.role == "assistant"), default=len(self.turns) - 1)


# ----------------------------------------------------------------------------------------------------- row → example


def to_example(
    row: Mapping[str, Any],
    number: int,
    *,
    format: str,
    columns: Mapping[str, str] | None = None,
    prompt_template: str | None = None,
    completion_template: str | None = None,
    labels: Mapping[str, str] | None = None,
    chat: bool | None = None,
    source: str = "data",
    place: str | None = None,
) -> Example:
    """Builds the example of one row.

    Args:
        row: column → value.
        number: of the row in its source, from 0; named in errors.
        format: one of FORMATS.
        columns: column in the file → column that the format, or a template, names.
        prompt_template: the prompt with {column} fields, instead of the format's own.
        completion_template: likewise the completion.
        labels: value → text, for the fields of the completion (`0: negative`).
        chat: wrap prompt and completion in the chat template; None: only the chat formats.
        source: named in errors.
        place: of the row, named instead of source and number, such as "rows.jsonl, line 3".

    Raises:
        InputError: a column is missing, or two are mapped to one, or one has a value of the wrong kind; names source, row and column.
    """
    if format not in FORMATS:
        raise InputError(f"data.format={format}: no such format; known are {', '.join(FORMATS)}.")
    where = place or f"{source}, row {number}"
    cells = renamed(row, columns or {}, where)
    tools: tuple[Any, ...] = ()
    asked = {"prompt_template": prompt_template, "completion_template": completion_template, "labels": labels}
    whole = format == "text" and prompt_template is None and completion_template is None
    unused = [f"data.{name}" for name, value in asked.items() if value]
    if unused and (whole or format in _READERS):
        raise InputError(f"{source}: rows of format {format} have no use for {', '.join(unused)}; leave it out.")
    if format in _READERS:
        turns, tools = _READERS[format](cells, where), _tools(cells, where)
    elif whole:
        turns = (Turn("assistant", _text(cells, "text", where), True),)
    else:
        prompt, completion = _pair(cells, format, prompt_template, completion_template, labels or {}, where)
        turns = (Turn("user", prompt, False), Turn("assistant", completion, True))
    for turn in turns:
        _encodable(turn, where)
    return Example(number, turns, format in _READERS if chat is None else chat, tools)


def detect_format(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None, *, source: str = "data"
) -> str:
    """The format that the columns of the first row suggest.

    Raises:
        InputError: none does.
    """
    names = {(columns or {}).get(name, name) for name in rows[0]}
    for needed, format in (
        ({"messages"}, "messages"),
        ({"conversations"}, "sharegpt"),
        ({"instruction", "output"}, "alpaca"),
        ({"prompt", "completion"}, "prompt-completion"),
        ({"input", "output"}, "prompt-completion"),
        ({"text"}, "text"),
    ):
        if needed <= names:
            return format
    raise InputError(
        f"{source}: no known format has the columns {', '.join(sorted(names))}; set data.format "
        f"({', '.join(FORMATS)}) and map the columns with data.columns."
    )


def _pair(
    row: Mapping[str, Any],
    format: str,
    prompt_template: str | None,
    completion_template: str | None,
    labels: Mapping[str, str],
    where: str,
) -> tuple[str, str]:
    if prompt_template is None and format == "alpaca":
        prompt_template = ALPACA_WITHOUT_INPUT if row.get("input") in (None, "") else ALPACA_WITH_INPUT
    if prompt_template is None:
        prompt_template = "{input}" if "input" in row and "prompt" not in row else "{prompt}"
    if completion_template is None:
        output = format == "alpaca" or ("output" in row and "completion" not in row)
        completion_template = "{output}" if output else "{completion}"
    return _fill(prompt_template, row, {}, where), _fill(completion_template, row, labels, where)


def _sharegpt(row: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    turns = []
    system = row.get("system")
    if isinstance(system, str) and system:
        turns.append(Turn("system", system, False))
    for message in _list(row, "conversations", where):
        if not isinstance(message, Mapping):
            raise InputError(f"{where}: conversations holds {type(message).__name__}, not objects with from and value.")
        speaker = _text(message, "from", f"{where}, conversations")
        if speaker not in SHAREGPT_ROLES:
            raise InputError(f"{where}: from={speaker!r} is no known speaker; known are {', '.join(SHAREGPT_ROLES)}.")
        role = SHAREGPT_ROLES[speaker]
        turns.append(Turn(role, _text(message, "value", f"{where}, conversations"), role == "assistant"))
    return tuple(turns)


def _messages(row: Mapping[str, Any], where: str) -> tuple[Turn, ...]:
    turns = []
    for message in _list(row, "messages", where):
        if not isinstance(message, Mapping):
            raise InputError(f"{where}: messages holds {type(message).__name__}, not objects with role and content.")
        role = _text(message, "role", f"{where}, messages")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, where) for part in content)
        if not isinstance(content, str):
            raise InputError(f"{where}: content of a {role} message is neither a text nor a list of text parts.")
        learned = role == "assistant" and message.get("loss_weight", 1) != 0
        turns.append(Turn(role, content, learned))
    return tuple(turns)


_READERS = {"sharegpt": _sharegpt, "messages": _messages}


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text":
        text = part.get("text", part.get("value"))
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise InputError(f"{where}: a content part of type {kind}; only text parts can be trained on.")


def _tools(row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise InputError(f"{where}: tools is not valid JSON.") from None
    if tools and not isinstance(tools, (list, str)):
        raise InputError(f"{where}: tools is {type(tools).__name__}, not a list of function signatures.")
    return tuple(tools) if isinstance(tools, list) else ()


def _encodable(turn: Turn, where: str) -> None:
    """JSON can spell half of a surrogate pair (\\ud800), which no tokenizer takes."""
    try:
        turn.text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: the {turn.role} text has half of a surrogate pair, {turn.text[error.start]!r}, at character "
            f"{error.start}; remove it."
        ) from None


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise InputError(
            f"{where}: no column {name!r}; it has {', '.join(map(repr, row))}; map one with data.columns={{COLUMN: {name}}}."
        )
    value = row[name]
    if not is_text(value):
        raise InputError(f"{where}: {name} is {kind_of(value)}, not a text.")
    return str(value)


def _list(row: Mapping[str, Any], name: str, where: str) -> list[Any]:
    if name not in row:
        _text(row, name, where)
    if not isinstance(row[name], (list, tuple)) or not row[name]:
        raise InputError(f"{where}: {name} is not a list with at least one entry.")
    return list(row[name])


def _fill(template: str, row: Mapping[str, Any], labels: Mapping[str, str], where: str) -> str:
    """{column} fields only: `str.format`'s attribute and index access would reach beyond the row.

    With labels, at least one field has to be one of them: -1, where 0 and 1 have names, is not a text to learn.
    """
    parts, values, labelled = [], [], False
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"template {template!r}: {error}; write a brace of the text as {{{{ or }}}}.") from None
    for literal, name, spec, conversion in fields:
        parts.append(literal)
        if name is None:
            continue
        if spec or conversion or not name.isidentifier():
            raise InputError(f"template {template!r}: only plain {{column}} fields are allowed, not {{{name}}}.")
        label = label_of(str(row[name]), labels) if name in row else None
        labelled |= label is not None
        values.append(str(row.get(name)))
        parts.append(_text(row, name, where) if label is None else label)
    if labels and not labelled:
        raise InputError(f"{where}: {', '.join(map(repr, values))} is not in data.labels ({', '.join(labels)}).")
    return "".join(parts)

"""Rows → examples: who says what, and which of it is learned. Torch-free."""

from __future__ import annotations

import json
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qalora.data.cells import Cells, label_of
from qalora.data.conversation import Turn, pairs, parse_json, read_turns
from qalora.errors import InputError

__all__ = ["FORMATS", "Example", "Turn", "detect_format", "to_example"]

FORMATS = ("alpaca", "sharegpt", "messages", "prompt-completion", "text")
# Chat formats → the columns that may hold the conversation, the format's own first.
CONVERSATIONS = {"sharegpt": ("conversations", "messages"), "messages": ("messages", "conversations")}

# Columns that data sets have for a question, an answer, and a pair of answers.
ASKED = ("prompt", "question", "query", "instruction", "problem", "input", "user", "source")
ANSWERED = ("completion", "answer", "response", "output", "solution", "assistant", "target", "label")
PAIR = {"chosen", "rejected"}
PREFERENCES = (
    " Pairs of chosen and rejected answers teach preferences; to learn the chosen ones, set "
    "data.columns={{chosen: {}}}."
)

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


@dataclass(frozen=True)
class Example:
    """A row, as turns.

    Attributes:
        row: its number in the source, from 0.
        turns: in order; the last assistant turn is the reference.
        chat: rendered by the tokenizer's chat template; otherwise the texts are joined as they stand.
        tools: function signatures for the chat template.
        place: of the row, for errors.
        unused: columns of the row that hold something and are not used.
        others: texts that are as right as the reference; only metrics look at them.
    """

    row: int
    turns: tuple[Turn, ...]
    chat: bool
    tools: tuple[Any, ...] = ()
    place: str = ""
    unused: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the reference."""
        return self.turns[: self.last]

    @property
    def reference(self) -> str:
        """The text of the last assistant turn."""
        return self.turns[self.last].text

    @property
    def references(self) -> tuple[str, ...]:
        """Every right answer, the reference first."""
        return tuple(dict.fromkeys((self.reference, *self.others)))

    @property
    def last(self) -> int:
        """Which turn the reference is; the last one where no assistant speaks."""
        return max((i for i, turn in enumerate(self.turns) if turn.role == "assistant"), default=len(self.turns) - 1)

    @property
    def where(self) -> str:
        """The row's place, for errors."""
        return self.place or f"row {self.row}"


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
    mask_history: bool = False,
    roles: Collection[str] = (),
    source: str = "data",
    place: str | None = None,
) -> Example:
    """Builds the example of one row.

    Args:
        row: column → value; a NaN is a null.
        number: of the row in its source, from 0; named in errors.
        format: one of FORMATS.
        columns: column in the file, or field of a message → what the format, or a template, names.
        prompt_template: the prompt with {column} fields, instead of the format's own.
        completion_template: likewise the completion.
        labels: value → text, for the fields of the completion (`0: negative`).
        chat: wrap prompt and completion in the chat template; None: only the chat formats.
        mask_history: of several answers only the last is learned.
        roles: those that the chat template names, besides the known ones.
        source: named in errors.
        place: of the row, named instead of source and number, such as "rows.jsonl, line 3".

    Raises:
        InputError: a column is missing, has a value of the wrong kind, or says what cannot be trained on; names source,
            row and column.
    """
    if format not in FORMATS:
        raise InputError(f"data.format={format}: no such format; known are {', '.join(FORMATS)}.")
    where = place or f"{source}, row {number}"
    cells = Cells(row, columns or {}, where)
    templated = prompt_template is not None or completion_template is not None
    whole = format == "text" and not templated
    asked = {"prompt_template": prompt_template, "completion_template": completion_template, "labels": labels}
    unused = [f"data.{name}" for name, value in asked.items() if value]
    if unused and (whole or format in CONVERSATIONS):
        raise InputError(f"{source}: rows of format {format} have no use for {', '.join(unused)}; leave it out.")

    conversation = format in CONVERSATIONS or (not templated and cells.hold_messages())
    is_chat = conversation if chat is None else chat
    if conversation:
        turns = _conversation(cells, format, columns, roles)
    elif whole:
        turns = (Turn("assistant", cells.text("text"), True),)
    else:
        prompt, completion = _pair(cells, format, prompt_template, completion_template, labels or {})
        earlier = () if templated else _earlier(cells, format, is_chat)
        if any(turn.role == "user" for turn in earlier) and not is_chat:
            prompt = f"\n\n{prompt}"
        turns = (*earlier, Turn("user", prompt, False), Turn("assistant", completion, True))
    for turn in turns:
        _encodable(turn, where)
    tools = _tools(cells, is_chat, where)
    for name in ("images", "videos", "audios"):
        if cells.value(name):
            raise InputError(f"{where}: {name} holds something, and only texts can be trained on; take such rows out.")
    example = Example(number, turns, is_chat, tools, where, cells.unread())
    return _last_alone(example) if mask_history else example


def detect_format(
    rows: Sequence[Mapping[str, object]], columns: Mapping[str, str] | None = None, *, source: str = "data"
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
        f"({', '.join(FORMATS)}) and map the columns with data.columns{_mapping(rows[0], columns or {}, names)}."
        + (PREFERENCES.format("completion" if "prompt" in names else "messages") if names >= PAIR else "")
    )


def _mapping(row: Mapping[str, object], columns: Mapping[str, str], names: Collection[str]) -> str:
    """A guess of what data.columns is to say, for a message."""
    if turned := {name: column for column, name in columns.items() if name in row and column not in row}:
        return f", which says COLUMN: NAME and not the other way round: {_written(turned)}"
    lists = [
        name
        for name, value in row.items()
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping)
    ]
    if len(lists) == 1:
        return f", such as {_written({lists[0]: 'messages'})}"
    asked = next((name for name in ASKED if name in names), None)
    answered = next((name for name in ANSWERED if name in names), None)
    if asked and answered:
        prompt, completion = ("instruction", "output") if asked == "instruction" else ("prompt", "completion")
        guess = {asked: prompt, answered: completion}
        return f", such as {_written({column: name for column, name in guess.items() if column != name})}"
    return ""


def _written(columns: Mapping[str, str]) -> str:
    return f"{{{', '.join(f'{column}: {name}' for column, name in columns.items())}}}"


# ------------------------------------------------------------------------------------------------------ the formats


def _conversation(
    cells: Cells, format: str, columns: Mapping[str, str] | None, roles: Collection[str]
) -> tuple[Turn, ...]:
    def read(name: str) -> tuple[Turn, ...]:
        return read_turns(cells.value(name), name, cells.where, columns=columns, roles=roles)

    if format in CONVERSATIONS:
        name = next((name for name in CONVERSATIONS[format] if name in cells), CONVERSATIONS[format][0])
        cells.present(name)
        turns = read(name)
    else:
        prompt, completion = cells.pair()
        cells.present(completion)
        asked = read(prompt) if cells.is_list(prompt) else (Turn("user", cells.text(prompt), False),)
        answered = read(completion) if cells.is_list(completion) else (Turn("assistant", cells.text(completion), True),)
        turns = (*(replace(turn, supervised=False) for turn in asked), *answered)
    system = cells.optional("system")
    given = [turn.text for turn in turns if turn.role in ("system", "developer")]
    if system and given and system.strip() != given[0].strip():
        raise InputError(
            f"{cells.where}: two system texts, one in the column system and one in the conversation; take one out, the "
            "column with data.columns={system: other_system}."
        )
    return turns if given or not system else (Turn("system", system, False), *turns)


def _pair(
    cells: Cells,
    format: str,
    prompt_template: str | None,
    completion_template: str | None,
    labels: Mapping[str, str],
) -> tuple[str, str]:
    prompt, completion = cells.pair()
    if prompt_template is None and format == "alpaca":
        prompt_template = ALPACA_WITHOUT_INPUT if cells.value("input") in (None, "") else ALPACA_WITH_INPUT
    if prompt_template is None:
        prompt_template = f"{{{prompt}}}"
    if completion_template is None:
        completion_template = "{output}" if format == "alpaca" else f"{{{completion}}}"
    return _fill(prompt_template, cells, {}), _fill(completion_template, cells, labels)


def _earlier(cells: Cells, format: str, chat: bool) -> tuple[Turn, ...]:
    """What comes before the prompt: a system text, and pairs of an earlier question and its answer (`history`).

    Outside a chat template these are paragraphs of their own.
    """
    turns = []
    if system := cells.optional("system"):
        turns.append(Turn("system", system if chat else f"{system}\n\n", False))
    for number, (question, answer) in enumerate(pairs(cells.value("history"), "history", cells.where)):
        if format == "alpaca":
            question = ALPACA_WITHOUT_INPUT.replace("{instruction}", question)
        turns += [
            Turn("user", question if chat or not number else f"\n\n{question}", False),
            Turn("assistant", answer, True),
        ]
    return tuple(turns)


def _tools(cells: Cells, chat: bool, where: str) -> tuple[object, ...]:
    older = cells.get("tools") is None and _are_objects(cells.get("functions"))
    name = "functions" if older else "tools"  # OpenAI's older name
    if not chat and not isinstance(cells.get(name), list):
        return ()  # outside a chat, a text in such a column may be anything
    tools = parse_json(cells.value(name), name, where) or ()
    if isinstance(tools, str):
        return ()
    if not isinstance(tools, (list, tuple)):
        raise InputError(f"{where}: {name} is {type(tools).__name__}, not a list of function signatures.")
    tools = tuple(parse_json(tool, name, where) for tool in tools)
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"{where}: {name} holds {type(tools[0]).__name__}, not function signatures.")
    if tools and not chat:
        raise InputError(
            f"{where}: {name} go into a chat template alone; set data.chat=true, or leave the column out with "
            f"data.columns={{{name}: other_{name}}}."
        )
    return tools


def _are_objects(value: object) -> bool:
    """Whether it is a list of objects, or the text of one."""
    if isinstance(value, str):
        return "".join(value.split()).startswith("[{")
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(each, Mapping) for each in value)


def _last_alone(example: Example) -> Example:
    last = max((i for i, turn in enumerate(example.turns) if turn.supervised), default=-1)
    turns = [replace(turn, supervised=turn.supervised and i == last) for i, turn in enumerate(example.turns)]
    return replace(example, turns=tuple(turns))


def _encodable(turn: Turn, where: str) -> None:
    """JSON can spell half of a surrogate pair (\\ud800), which no tokenizer takes."""
    for text in (turn.text, turn.thought, json.dumps(turn.fields, ensure_ascii=False, default=str)):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: the {turn.role} text has half of a surrogate pair, {text[error.start]!r}, at character "
                f"{error.start}; remove it."
            ) from None


def _fill(template: str, cells: Cells, labels: Mapping[str, str]) -> str:
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
        label = label_of(str(cells.value(name)), labels) if name in cells else None
        labelled |= label is not None
        parts.append(cells.text(name) if label is None else label)
        values.append(str(cells.value(name)))
    if labels and not labelled:
        raise InputError(f"{cells.where}: {', '.join(map(repr, values))} is not in data.labels ({', '.join(labels)}).")
    return "".join(parts)

"""The conversation of a row → turns: who speaks, what of it is learned, and what else a message says. Torch-free."""

from __future__ import annotations

import ast
import json
import numbers
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qalora.errors import InputError

# The names that data sets and their tools have for who speaks, in lower case → the role of a chat template.
ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "ai", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}
# Fields that say whether an answer is learned → the truth value that says it is.
FLAGS = {"weight": True, "loss_weight": True, "loss": True, "train": True, "training": True, "masked": False}
REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Turn:
    """
    Attributes:
        role: system, developer, user, assistant, tool, or one that the chat template names.
        supervised: the text carries loss.
        fields: what else the message says, for the chat template (tool_calls, reasoning_content, name …).
    """

    role: str
    text: str
    supervised: bool
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def thought(self) -> str:
        """The reasoning before the text, where a field of its own holds it."""
        return next((str(self.fields[name]) for name in REASONING if self.fields.get(name)), "")


def read_turns(
    value: object, column: str, where: str, *, columns: Mapping[str, str] | None = None, roles: Collection[str] = ()
) -> tuple[Turn, ...]:
    """The turns of a list of messages, of pairs of question and answer, or of such a list as JSON.

    Args:
        value: objects with role (or from) and content (or value), pairs (role, text), or pairs (question, answer).
        column: that holds the value; named in errors, as `where` is.
        columns: field of a message → field that is read instead.
        roles: known ones besides ROLES.

    Raises:
        InputError: no such list, an unknown role, a content that is no text, a loss weight between 0 and 1.
    """
    entries = _entries(parse_json(value, column, where), column, where)
    turns = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            kind = type(entry).__name__
            raise InputError(f"{where}: {column} holds {kind}, not objects with role and content (or from and value).")
        message = {(columns or {}).get(name, name): value for name, value in entry.items() if value is not None}
        turns.append(_turn(message, f"{where}, {column}, message {number}", roles))
    return tuple(turns)


def pairs(value: object, column: str, where: str) -> list[tuple[str, str]]:
    """[[question, answer], …], or such a list as JSON; nothing for null.

    Raises:
        InputError: anything else.
    """
    value = parse_json(value, column, where) or []
    if not (isinstance(value, Sequence) and all(_is_pair(entry) for entry in value)):
        raise InputError(f"{where}: {column} is not a list of pairs of question and answer.")
    return [(entry[0], entry[1]) for entry in value]


def parse_json(value: object, column: str, where: str) -> object:
    """The value, or what its JSON says where it is a text, or its literal of Python: what pandas writes of lists into a
    CSV.

    Raises:
        InputError: a text that is neither.
    """
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return without_nan(json.loads(value))
    except json.JSONDecodeError:
        pass
    try:
        return without_nan(ast.literal_eval(value.strip()))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise InputError(
            f"{where}: {column} is a text that is no list in JSON ({value.strip()[:40]!r} …); write it with "
            "json.dumps, or the rows with DataFrame.to_json(orient='records', lines=True)."
        ) from None


def without_nan(value: object) -> object:
    """The value with null for every NaN: what pandas writes where a cell is empty."""
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    return [without_nan(entry) for entry in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------------------------------------------- a message


def _entries(value: object, column: str, where: str) -> list[object]:
    if not isinstance(value, (list, tuple)) or not value:
        raise InputError(f"{where}: {column} is not a list with at least one entry.")
    if len(value) == 1 and isinstance(value[0], list) and all(isinstance(entry, Mapping) for entry in value[0]):
        return list(value[0])
    if all(_is_pair(entry) for entry in value):
        if all(speaker.strip().lower() in ROLES for speaker, _ in value):
            return [{"role": speaker, "content": text} for speaker, text in value]
        return [{"role": ("user", "assistant")[i], "content": pair[i]} for pair in value for i in (0, 1)]
    return list(value)


def _is_pair(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _turn(message: dict[str, object], where: str, roles: Collection[str]) -> Turn:
    speaker = _first(message, ("role", "from"), where)
    name = str(speaker).strip().lower()
    role = ROLES.get(re.sub(r"[\s-]+", "_", name)) or (name if name in roles else None)
    if role is None:
        raise InputError(
            f"{where}: unknown role {speaker!r}; known are {', '.join(ROLES)}, and those that the chat template names."
        )
    learned = _learned(message, role, where)
    if call := message.pop("function_call", None):
        message.setdefault("tool_calls", [{"type": "function", "function": call}])
    message = {key: value for key, value in message.items() if value not in ("", [], {}) or key in ("content", "value")}
    if "tool_calls" in message:
        message["tool_calls"] = parse_json(message["tool_calls"], "tool_calls", where)
        if not isinstance(message["tool_calls"], list) or not all(map(_is_call, message["tool_calls"])):
            raise InputError(f"{where}: tool_calls is not a list of objects with the name and arguments of a function.")
    spoken = "content" in message or "value" in message
    silent = "tool_calls" in message or any(key in message for key in REASONING)
    content = _first(message, ("content", "value"), where) if spoken or not silent else ""
    text, thought = _texts(content, role, where)
    if thought:
        message.setdefault(REASONING[0], thought)
    return Turn(role, text, learned, message)


def _first(message: dict[str, object], names: Sequence[str], where: str) -> object:
    """Takes the first of these fields out of the message."""
    for name in names:
        if name in message:
            return message.pop(name)
    mend = f"map one with data.columns={{FIELD: {names[0]}}}" if message else "fill it or take the message out"
    raise InputError(
        f"{where}: no {' or '.join(names)}, or it is null; it has {', '.join(map(repr, message)) or 'nothing'}; {mend}."
    )


def _is_call(call: object) -> bool:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _learned(message: dict[str, object], role: str, where: str) -> bool:
    """Whether the turn is learned: an assistant's, unless a field of it says no."""
    learned = role == "assistant"
    if "train_detail" in message:
        raise InputError(
            f"{where}: train_detail: parts of a turn cannot be learned apart; make them turns of their own."
        )
    for name, yes in FLAGS.items():
        if name not in message:
            continue
        value = message.pop(name)
        asked = {"0": False, "1": True, "false": False, "true": True}.get(str(value).lower().removesuffix(".0"))
        if asked is None:
            raise InputError(f"{where}: {name}={value}: a turn is learned whole or not at all; give 0 or 1.")
        if asked and role != "assistant" and name in ("train", "training"):
            raise InputError(
                f"{where}: {name}={value} in a {role} turn: only an assistant's turns can be learned by themselves; "
                "data.train_on_inputs=true learns all turns but those that are masked."
            )
        learned = learned and asked is yes
    return learned


def _texts(content: object, role: str, where: str) -> tuple[str, str]:
    """(text, thought) of a message's content: a text, or typed parts; a tool may answer with an object."""
    if isinstance(content, (list, tuple)):
        parts = [_part(part, where) for part in content]
        return "".join(text for text, _ in parts), "".join(thought for _, thought in parts)
    if isinstance(content, Mapping) and role == "tool":
        return json.dumps(content, ensure_ascii=False), ""
    if isinstance(content, (str, numbers.Number)):
        return str(content), ""
    raise InputError(f"{where}: content of a {role} message is neither a text nor a list of text parts.")


def _part(part: object, where: str) -> tuple[str, str]:
    kind = part.get("type") or "text" if isinstance(part, Mapping) else type(part).__name__
    if isinstance(part, Mapping):
        text = next((part[name] for name in ("text", "value", kind) if isinstance(part.get(name), str)), None)
        if text is not None and kind in ("text", "input_text", "output_text"):
            return text, ""
        if text is not None and kind in REASONING:
            return "", text
    raise InputError(f"{where}: a content part of type {kind}; only text parts can be trained on.")

"""The cells of a row, and which of them a format has read. Torch-free."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

from qalora.data.conversation import without_nan
from qalora.errors import InputError


class Cells(dict[str, Any]):
    """The cells of a row under the names that a format reads them by. It remembers which were read, so that no other
    goes unmentioned."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], where: str):
        self.where = where
        self.named: dict[str, str] = {}
        self.seen: set[str] = set()
        for name, value in row.items():
            renamed = columns.get(name, name)
            if self.get(renamed) is not None and value is not None:
                raise InputError(
                    f"{where}: the columns {self.named[renamed]!r} and {name!r} are both {renamed} (data.columns); "
                    "give one of them another name there."
                )
            if renamed in self and value is None:  # of two columns for one name, a null one gives way
                continue
            self.named[renamed] = name
            self[renamed] = without_nan(value)

    def value(self, name: str) -> Any:
        """The cell, null where there is none."""
        self.seen.add(name)
        return self.get(name)

    def present(self, name: str) -> None:
        """
        Raises:
            InputError: no such column.
        """
        if name not in self:
            chats = {"messages", "conversations"} & set(self)
            mend = f"map one with data.columns={{COLUMN: {name}}}"
            if chats and name not in ("messages", "conversations"):
                mend = "such rows are chats: set data.format=messages, or take the recipe chat"
            raise InputError(f"{self.where}: no column {name!r}; it has {', '.join(map(repr, self))}; {mend}.")

    def text(self, name: str) -> str:
        """
        Raises:
            InputError: no such column, or no text in it.
        """
        self.present(name)
        value = self.value(name)
        if not isinstance(value, (str, numbers.Number)):
            mend = "fill it or take the row out" if value is None else "make it a text"
            raise InputError(f"{self.where}: {name} is {_kind(value)}, not a text; {mend}.")
        return str(value)

    def optional(self, name: str) -> str:
        """The text of a cell, empty where there is none."""
        return self.text(name) if self.value(name) is not None else ""

    def pair(self) -> tuple[str, str]:
        """The names of the columns of prompt and completion."""
        prompt = "input" if "input" in self and "prompt" not in self else "prompt"
        return prompt, "output" if "output" in self and "completion" not in self else "completion"

    def is_list(self, name: str) -> bool:
        return isinstance(self.get(name), (list, tuple))

    def hold_messages(self) -> bool:
        """Whether prompt or completion is a list of messages."""
        return any(self.is_list(name) and self[name] and isinstance(self[name][0], Mapping) for name in self.pair())

    def unread(self) -> tuple[str, ...]:
        """Columns that hold something and were not read, by their own names."""
        return tuple(self.named[name] for name, value in self.items() if name not in self.seen and value is not None)


def label_of(text: str, labels: Mapping[str, str]) -> str | None:
    """What data.labels has for a value: for str(True) is "True", while a file may say "true", case counts only where it
    decides."""
    if text in labels:
        return labels[text]
    alike = {label for value, label in labels.items() if value.casefold() == text.casefold()}
    return alike.pop() if len(alike) == 1 else None


def _kind(value: object) -> str:
    if value is None:
        return "empty (null)"
    return "bytes that are no UTF-8" if isinstance(value, bytes) else type(value).__name__

"""The cells of a row, and which of them a format has read. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.data.columns import is_text, kind_of, renamed
from qalora.data.conversation import without_nan
from qalora.errors import InputError


class Cells(dict[str, Any]):
    """The cells of a row under the names that a format reads them by. It remembers which were read, so that no other goes
    unmentioned."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], where: str):
        values = {name: without_nan(value) for name, value in row.items()}
        super().__init__(renamed(values, columns, where))
        self.where = where
        # Of two columns that are mapped to one, a null one gives way.
        self.named = {
            columns.get(name, name): name for name in sorted(values, key=lambda name: values[name] is not None)
        }
        self.seen: set[str] = set()

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
            raise InputError(
                f"{self.where}: no column {name!r}; it has {', '.join(map(repr, self))}; map one with "
                f"data.columns={{COLUMN: {name}}}."
            )

    def text(self, name: str) -> str:
        """
        Raises:
            InputError: no such column, or no text in it.
        """
        self.present(name)
        value = self.value(name)
        if not is_text(value):
            raise InputError(f"{self.where}: {name} is {kind_of(value)}, not a text.")
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

"""Columns of a row: under the names of a format, and as texts. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from numbers import Real
from typing import Any

from qalora.errors import InputError


def renamed(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """The row with its columns as the format names them. Of two that are mapped to one, a null one gives way.

    Raises:
        InputError: two columns with values are mapped to one, or one to the name of another.
    """
    origin: dict[str, str] = {}
    for name in row:
        target = columns.get(name, name)
        other = origin.setdefault(target, name)
        if other != name and row[other] is not None and row[name] is not None:
            raise InputError(
                f"{where}: the columns {other!r} and {name!r} are both {target!r} by data.columns; leave one of them out, or map "
                f"one to another name, such as {target if target in (other, name) else other}: unused."
            )
        if row[other] is None:
            origin[target] = name
    return {target: row[name] for target, name in origin.items()}


def label_of(text: str, labels: Mapping[str, str]) -> str | None:
    """What data.labels has for a value: for str(True) is "True", while a file may say "true", case counts only where it decides."""
    if text in labels:
        return labels[text]
    alike = {label for value, label in labels.items() if value.casefold() == text.casefold()}
    return alike.pop() if len(alike) == 1 else None


def is_text(value: Any) -> bool:
    """Whether a value's text form is its text: that of bytes, dates, lists and objects is Python's."""
    return isinstance(value, (str, Real, Decimal))


def kind_of(value: Any) -> str:
    """What a value is, for messages."""
    if value is None:
        return "empty (null)"
    return "bytes that are no UTF-8" if isinstance(value, bytes) else type(value).__name__

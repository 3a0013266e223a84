"""Rows with several right answers: the first is learned, and metrics take the best of them. Torch-free.

{"prompt": …, "completion": ["Paris", "paris"]}            a list in the place of the completion
{"prompt": …, "completion": "Paris", "references": […]}    a column beside it, references or answers
{"question": …, "answers": {"text": ["Paris", …], …}}      as SQuAD has it, mapped with data.columns or alone
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qalora.data.formats import Example, to_example

COMPLETIONS = ("completion", "output")
REFERENCES = ("references", "answers")


def read_example(row: Mapping[str, Any], number: int, **settings: Any) -> Example:
    """`to_example`, with the same arguments, of a row that may have several right answers."""
    rows, beside = one_answer_each(row, settings.get("columns"), settings.get("completion_template"))
    example, *others = [to_example(each, number, **settings) for each in rows]
    return replace(example, others=(*(other.reference for other in others), *beside))


def one_answer_each(
    row: Mapping[str, Any], columns: Mapping[str, str] | None = None, completion_template: str | None = None
) -> tuple[list[dict[str, object]], list[str]]:
    """(the row with each of its completions alone, the learned one first; references of a row that has no
    completion)."""
    names = {(columns or {}).get(name, name): name for name in row}
    wanted = [name for name in _fields(completion_template) or COMPLETIONS if name in names]
    listed = [names[name] for name in REFERENCES if name in names and name not in wanted and texts_of(row[names[name]])]
    references = [text for name in listed for text in texts_of(row[name])]
    rest = {name: value for name, value in row.items() if name not in listed}
    place = next((names[name] for name in wanted if texts_of(row[names[name]])), names[wanted[0]] if wanted else None)
    if place is None and not completion_template and {"prompt", "input", "instruction"} & names.keys() and references:
        place = "completion" if "prompt" in names else "output"
        rest[place] = references[0]
    if place is None:
        return [rest], references
    completions = [*(texts_of(rest[place]) or [rest[place]]), *references]
    return [{**rest, place: text} for text in _distinct(completions)], []


def texts_of(value: Any) -> list[str]:
    """The texts of a list of them, or of SQuAD's `{"text": […]}`; nothing of anything else."""
    value = value.get("text") if isinstance(value, Mapping) else value
    several = isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)
    return list(value) if several else []


def _distinct(values: list[Any]) -> list[object]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _fields(template: str | None) -> list[str]:
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template or "") if name]
    except ValueError:  # to_example says what is wrong with it
        return []

"""Columns under other names, and values under other texts: never two for one."""

from __future__ import annotations

import pytest

from qalora.data.cells import Cells, label_of
from qalora.data.formats import to_example
from qalora.errors import InputError


@pytest.mark.parametrize(
    ("row", "columns", "twice"),
    [
        ({"q": "a", "query": "b"}, {"q": "prompt", "query": "prompt"}, "'q' and 'query' are both prompt"),
        ({"q": "a", "prompt": "b"}, {"q": "prompt"}, "'q' and 'prompt' are both prompt"),
        ({"prompt": "b", "q": "a"}, {"q": "prompt"}, "'prompt' and 'q' are both prompt"),
        ({"a": 0, "b": 0}, {"a": "b"}, "'a' and 'b' are both b"),
    ],
)
def test_two_columns_for_one_name_are_refused(row, columns, twice):
    with pytest.raises(InputError, match=rf"^r\.csv, line 2: the columns {twice} \(data\.columns\); give one of them"):
        Cells(row, columns, "r.csv, line 2")


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"a": 1, "b": 2}, {"a": "b", "b": "a"}, {"b": 1, "a": 2}),
        ({"q": "a", "prompt": None}, {"q": "prompt"}, {"prompt": "a"}),
        ({"prompt": None, "q": "a"}, {"q": "prompt"}, {"prompt": "a"}),
        ({"prompt": "b", "q": None}, {"q": "prompt"}, {"prompt": "b"}),
        ({"q": None, "prompt": None}, {"q": "prompt"}, {"prompt": None}),
        ({"query": "b"}, {"q": "prompt", "query": "prompt"}, {"prompt": "b"}),
    ],
)
def test_a_null_gives_way(row, columns, expected):
    assert Cells(row, columns, "") == expected


def test_a_row_is_read_by_its_names_once():
    with pytest.raises(InputError, match="'question' and 'prompt' are both prompt"):
        to_example(
            {"question": "a", "prompt": "b", "completion": "c"},
            0,
            format="prompt-completion",
            columns={"question": "prompt"},
        )


def test_labels_by_case_where_it_decides():
    assert [label_of(text, {"Yes": "1", "yes": "2"}) for text in ("Yes", "yes", "YES", "no")] == ["1", "2", None, None]
    assert [label_of(text, {"true": "1", "0": "2"}) for text in ("True", "0", "1")] == ["1", "2", None]

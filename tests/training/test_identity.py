"""What a run is made of: its rows are told apart, and its file is read as it was written."""

from __future__ import annotations

from qalora.training.identity import row_digests, rows_of


def test_rows_are_told_apart_by_tokens_and_labels():
    rows = [([1, 2], [-100, 2]), ([1, 2], [1, 2]), ([1, 2, 3], [-100, 2, 3]), ([1, 2], [-100, 2])]
    digests = row_digests([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    assert digests[0] == digests[3] and len(set(digests)) == 3
    items = [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    known = rows_of(items[:1], items[1:2], items[2:])
    assert (known.train, known.held_back) == (digests[:1], digests[1:2])
    assert known.validation == rows_of([], [], items[2:]).validation != rows_of([], [], items[1:]).validation

"""Files of every type → rows; and the one sentence that each kind of bad file gets."""

from __future__ import annotations

import csv
import json
import re

import pytest

from qalora.data.reading import QUICKSTART, read_rows
from qalora.errors import InputError


def refused(message: str, call, *arguments, **settings) -> None:
    """The call fails with exactly this sentence."""
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        call(*arguments, **settings)


ROWS = [{"prompt": 'ä\u2028,\n"q"', "completion": "1"}, {"prompt": "b", "completion": "2"}]


@pytest.fixture
def file(tmp_path):
    """file(name, content) → its path; content: text or bytes."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def as_jsonl(path):
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n", encoding="utf-8-sig")


def as_json(path):
    path.write_text(json.dumps(ROWS), encoding="utf-8")


def as_json_data(path):
    path.write_text(json.dumps({"version": 1, "data": ROWS}), encoding="utf-8")


def as_csv(path):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("r.jsonl", as_jsonl),
        ("r.ndjson", as_jsonl),
        ("r.json", as_json),
        ("d.json", as_json_data),
        ("r.csv", as_csv),
        ("r.parquet", as_parquet),
    ],
)
def test_every_file_type_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    assert read_rows(str(tmp_path / name)) == ROWS
    assert read_rows(str(tmp_path / name), limit=1) == ROWS[:1]


def test_the_quickstart_rows_are_built_in():
    assert [len(read_rows(QUICKSTART, split=split, limit=5)) for split in ("train", "validation")] == [5, 5]
    assert set(read_rows(QUICKSTART, limit=1)[0]) == {"prompt", "completion"}


def test_a_split_that_the_quickstart_task_lacks_is_named():
    refused(f"{QUICKSTART}: no split 'test'; it has train, validation.", read_rows, QUICKSTART, split="test")


def test_blank_lines_in_a_csv_are_no_rows(file):
    assert read_rows(file("r.csv", "text\n\na\n\n")) == [{"text": "a"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl", "", ": no rows in it."),
        ("r.jsonl", "\n \n", ": no rows in it."),
        ("r.json", "", ": no rows in it."),
        ("r.json", "[]", ": no rows in it."),
        ("r.csv", "a,b\n", ": no rows in it."),
        ("r.csv", "", ": no rows in it."),
        ("r.jsonl", '{"a": 1}\n{"a": }\n', ", line 2: not valid JSON (Expecting value, column 7)."),
        ("r.json", '[{"a": 1},\n{"a": }]', ", line 2: not valid JSON (Expecting value, column 7)."),
        (
            "r.json",
            '{"a": 1}\n{"a": 2}\n',
            ", line 2: not valid JSON (Extra data, column 1) (a row a line? then call it .jsonl).",
        ),
        ("r.jsonl", '{"a": 1}\n\n[2]\n', ", line 3: a row is an object with columns, this is list."),
        ("r.json", '[{"a": 1}, "b"]', ", row 1: a row is an object with columns, this is str."),
        (
            "r.json",
            '{"rows": []}',
            ": a .json file holds a list of rows (or an object with such a list as data); use .jsonl for lines.",
        ),
        ("r.csv", "a,b\n1,2\n1,2,3\n", ", line 3: 3 cells, the header has 2."),
        ("r.csv", 'a,b\n1,"x"y\n', ", line 2: not valid CSV (',' expected after '\"')."),
        ("r.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ", line 2: not UTF-8 (byte 16); save the file as UTF-8."),
        ("r.csv", b"a\n\xe4\n", ", line 2: not UTF-8 (byte 2); save the file as UTF-8."),
        ("r.txt", "x", ": .txt ending; give a .jsonl, .json, .csv or .parquet file."),
        ("rows", "x", ": no ending; give a .jsonl, .json, .csv or .parquet file."),
    ],
)
def test_a_bad_file_is_named_with_the_line(file, name, content, message):
    path = file(name, content)
    refused(path + message, read_rows, path)


def test_missing_files_and_folders_are_named(tmp_path):
    refused("nowhere.jsonl: no such file.", read_rows, "nowhere.jsonl")
    refused(f"{tmp_path}/nothing: no such file.", read_rows, f"{tmp_path}/nothing")
    refused(f"{tmp_path}: a folder; name the file in it.", read_rows, str(tmp_path))


def test_what_is_no_parquet_file_is_named(file):
    pytest.importorskip("pyarrow")
    path = file("r.parquet", "text")
    with pytest.raises(InputError, match=f"^{re.escape(path)}: not a parquet file "):
        read_rows(path)


def test_what_is_neither_a_file_nor_on_the_hub_is_named():
    with pytest.raises(
        InputError, match=r"^data nobody/nothing: neither a file nor a data set of the Hub .*split test"
    ):
        read_rows("nobody/nothing", split="test")


def test_a_cell_may_be_longer_than_the_csv_modules_limit(file):
    assert read_rows(file("r.csv", "text\n" + "x" * 200_000 + "\n")) == [{"text": "x" * 200_000}]

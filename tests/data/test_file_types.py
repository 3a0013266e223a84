"""Files of every type → rows; and the one sentence that each kind of bad file gets."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import ipc, parquet

from qalora.data.formats import to_example
from qalora.data.reading import read_rows
from qalora.errors import InputError

ROWS = [{"prompt": 'ä\u2028,\n"q"', "completion": "1"}, {"prompt": "b", "completion": "2"}]


@pytest.fixture
def file(tmp_path):
    """file(name, content) → its path; content: text or bytes."""

    def write(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def test_a_text_has_a_row_per_line_as_datasets_reads_it(file):
    path = file("r.txt", 'erste Zeile\r\n\r\n  zweite,\u2028 "x"\n')
    rows = read_rows(path)
    reference = datasets.load_dataset(
        "text", data_files=path, split="train", cache_dir=str(Path(path).parent / "cache")
    )
    assert list(rows) == [row for row in reference if row["text"]]
    assert rows.places == [f"{path}, line 1", f"{path}, line 3"]


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


def as_csv_of(encoding):
    def write(path):
        as_csv(path)
        path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)

    return write


def as_tsv(path):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ROWS[0], dialect="excel-tab")
        writer.writeheader()
        writer.writerows(ROWS)


def as_semicolons(path):
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, ROWS[0], delimiter=";")
        writer.writeheader()
        writer.writerows(ROWS)


def as_parquet(path):
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def as_arrow(form):
    def write(path):
        table = pyarrow.Table.from_pylist(ROWS)
        with {"stream": ipc.new_stream, "file": ipc.new_file}[form](str(path), table.schema) as writer:
            writer.write_table(table)

    return write


def zstd(data: bytes, codec: str = "zstd") -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
    ".lz4": partial(zstd, codec="lz4"),
}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("r.jsonl", as_jsonl),
        ("r.ndjson", as_jsonl),
        ("r.json", as_jsonl),
        ("l.jsonl", as_json),
        ("r.JSON", as_json),
        ("d.json", as_json_data),
        ("r.csv", as_csv),
        ("r.CSV", as_csv),
        ("r.tsv", as_tsv),
        ("utf16.csv", as_csv_of("utf-16")),
        ("utf32.csv", as_csv_of("utf-32")),
        ("semicolons.csv", as_semicolons),
        ("stream.arrow", as_arrow("stream")),
        ("file.arrow", as_arrow("file")),
        ("r.parquet", as_parquet),
    ],
)
def test_every_file_type_gives_the_same_rows(tmp_path, name, write):
    write(tmp_path / name)
    assert read_rows(str(tmp_path / name)) == ROWS
    assert read_rows(str(tmp_path / name), limit=1) == ROWS[:1]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(("name", "write"), [("r.jsonl", as_jsonl), ("r.CSV", as_csv), ("r.parquet", as_parquet)])
def test_a_compressed_file_is_read_as_what_it_holds(tmp_path, name, write, ending):
    write(tmp_path / name)
    packed = tmp_path / f"{name}{ending.upper()}"
    packed.write_bytes(COMPRESS[ending]((tmp_path / name).read_bytes()))
    assert read_rows(str(packed)) == ROWS


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_may_have_several_parts(file, ending):
    parts = [COMPRESS[ending](json.dumps(row).encode() + b"\n") for row in ROWS]
    assert read_rows(file(f"r.jsonl{ending}", b"".join(parts))) == ROWS


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("text\n\na\n\n", [{"text": "a"}]),  # blank lines
        ("a,b\n1,2\n,\n", [{"a": "1", "b": "2"}]),
        ("a,b,\n1,2,\n", [{"a": "1", "b": "2"}]),  # trailing commas
        ("a,b,,\n1,2,,\n", [{"a": "1", "b": "2"}]),
        ("a,b\n1,2,\n", [{"a": "1", "b": "2"}]),
        ("a,b\r\n1,2\r\n", [{"a": "1", "b": "2"}]),
        (",a\n0,x\n1,y\n", [{"Unnamed: 0": "0", "a": "x"}, {"Unnamed: 0": "1", "a": "y"}]),  # pandas' index
        ("a;b\n1,5;2\n", [{"a": "1,5", "b": "2"}]),
        ("a,b\nNaN,null\n", [{"a": "NaN", "b": "null"}]),  # texts
    ],
)
def test_what_spreadsheets_leave_in_a_csv(file, text, rows):
    assert read_rows(file("r.csv", text)) == rows


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", '{"a": NaN, "m": [{"b": -Infinity}], "n": 1e999}'),
        ("r.json", '[{"a": NaN, "m": [{"b": Infinity}], "n": NaN}]'),
    ],
)
def test_numbers_that_are_none_are_null(file, name, content):
    assert read_rows(file(name, content)) == [{"a": None, "m": [{"b": None}], "n": None}]


def test_nan_cells_are_null(tmp_path):
    table = pyarrow.table({"a": [1.5, float("nan")], "m": [[1.0, float("inf")], None]})
    parquet.write_table(table, tmp_path / "r.parquet")
    assert read_rows(str(tmp_path / "r.parquet")) == [{"a": 1.5, "m": [1.0, None]}, {"a": None, "m": None}]


def test_every_row_knows_its_place(file, tmp_path):
    path = file("r.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert read_rows(path).places == [f"{path}, line 1", f"{path}, line 3"]
    path = file("r.csv", 'a\n"1\n1"\n2\n')
    assert read_rows(path).places == [f"{path}, line 3", f"{path}, line 4"]
    parquet.write_table(pyarrow.table({"a": [1, 2]}), tmp_path / "r.parquet")
    assert read_rows(str(tmp_path / "r.parquet")).places[1] == f"{tmp_path}/r.parquet, row 1"


# --------------------------------------------------------------------------------------------- columns of other types


def test_columns_of_bytes_are_texts_wherever_they_are_utf_8(tmp_path):
    rows = [{"a": "ä".encode(), "m": [{"content": "é".encode()}]}, {"a": b"\xff", "m": []}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    assert read_rows(str(tmp_path / "r.parquet")) == [{"a": "ä", "m": [{"content": "é"}]}, {"a": b"\xff", "m": []}]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"\xff\xd8", "bytes that are no UTF-8"),
        (date(2024, 1, 2), "date"),
        (datetime(2024, 1, 2), "datetime"),
        (timedelta(days=1), "timedelta"),
        (["a"], "list"),
        ({"a": 1}, "dict"),
        (None, "empty (null)"),
    ],
)
def test_a_value_that_is_no_text_is_refused_where_it_is_used_and_only_there(tmp_path, value, kind):
    path = tmp_path / "r.parquet"
    table = pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"], "when": [value, value]})
    parquet.write_table(table, path)
    rows = read_rows(str(path))
    read = partial(to_example, rows[1], 1, format="prompt-completion", place=rows.places[1])
    assert read().reference == "d"
    with pytest.raises(InputError, match=f"^{re.escape(f'{path}, row 1: when is {kind}, not a text')}"):
        read(completion_template="{when}")
    labelled = read(completion_template="{when}", labels={str(rows[1]["when"]): "then"})
    assert labelled.reference == "then"


def test_numbers_are_their_texts(tmp_path):
    table = pyarrow.table({"prompt": [1], "completion": [Decimal("1.50")]})
    parquet.write_table(table, tmp_path / "r.parquet")
    example = to_example(read_rows(str(tmp_path / "r.parquet"))[0], 0, format="prompt-completion")
    assert (example.prompt[0].text, example.reference) == ("1", "1.50")


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_table_with_a_name_twice_is_refused(tmp_path, form):
    one, two = pyarrow.array([1]), pyarrow.array([2])
    path = tmp_path / f"r.{form}"
    for table, message in (
        (pyarrow.Table.from_arrays([one, two, two], names=["a", "b", "a"]), ": columns 1 and 3 are both called 'a'"),
        (
            pyarrow.table({"m": pyarrow.StructArray.from_arrays([one, two], names=["c", "c"])}),
            ", column 'm': fields 1 and 2 are both called 'c'",
        ),
    ):
        if form == "parquet":
            parquet.write_table(table, path)
        else:
            with ipc.new_stream(str(path), table.schema) as writer:
                writer.write_table(table)
        with pytest.raises(InputError, match=f"^{re.escape(f'{path}{message}')}"):
            read_rows(str(path))


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
        ("r.json", '{"a": 1}\n{"a": }\n', ", line 2: not valid JSON (Expecting value, column 7)."),
        ("r.jsonl", '[{"a": 1},\n{"a": }]', ", line 2: not valid JSON (Expecting value, column 7)."),
        ("r.jsonl", '{"a": ' + "1" * 5000 + "}", ", line 1: JSON that cannot be read (Exceeds the limit"),
        ("r.json", "[" * 100_000, ": JSON that cannot be read (maximum recursion depth exceeded"),
        ("r.json", '[{"a": 1}, {"a": 2, "a": 3}]', ", row 1: one object has 'a' twice, 2 and 3; remove one."),
        ("r.json", '[{"m": [{"b": 2, "b": 3}]}]', ", row 0: one object has 'b' twice, 2 and 3; remove one."),
        (
            "r.json",
            '{"data": [], "data": [{"a": 1}]}',
            ": one object has 'data' twice, [] and [{\"a\": 1}]; remove one.",
        ),
        ("r.jsonl", '{"a": 1}\n{"a": "x", "a": "y"}', ', line 2: one object has \'a\' twice, "x" and "y"; remove one.'),
        ("r.jsonl", '{"m": {"a": 1, "a": 1}}', ", line 1: one object has 'a' twice, 1 and 1; remove one."),
        ("r.csv", "a,b,a\n1,2,3\n", ", line 1: columns 1 and 3 are both called 'a'; rename one."),
        ("r.tsv", "a\ta\n1\t2\n", ", line 1: columns 1 and 2 are both called 'a'; rename one."),
        ("r.csv", '\n"x","x"\n1,2\n', ", line 2: columns 1 and 2 are both called 'x'; rename one."),
        ("r.csv", "a,b\n1\n", ", line 2: 1 cells, the header has 2."),
        ("r.csv", "a\0b\0", ", line 1: a NUL character, as in UTF-16 without its mark; save the file as UTF-8."),
        ("r.csv", codecs.BOM_UTF16_LE + b"a\0\n", ", line 1: not UTF-16 (byte 4)"),
        ("r.jsonl.gz", "x", ": cannot be decompressed (Not a gzipped file (b'x')); is it whole?"),
        ("r.jsonl.zst", "x", ": cannot be decompressed ("),
        (
            "r.jsonl.gz",
            gzip.compress(b'{"a": 1}', mtime=0)[:-4],
            ": cannot be decompressed (Compressed file ended before",
        ),
        ("r.jsonl.bz2", bz2.compress(b'{"a": 1}')[:-4], ": cannot be decompressed ("),
        ("r.jsonl.xz", lzma.compress(b'{"a": 1}')[:-4], ": cannot be decompressed ("),
        ("r.arrow", "x", ": not an Arrow file ("),
        ("r.parquet", "text", ": not a parquet file ("),
        ("r.jsonl", '{"a": 1}\n\n[2]\n', ", line 3: a row is an object with columns, this is list."),
        ("r.json", '[{"a": 1}, "b"]', ", row 1: a row is an object with columns, this is str."),
        (
            "r.json",
            '{"rows": []}',
            ": a .json file holds a list of rows (or an object with such a list as data); use .jsonl for lines, and "
            "orient='records' in pandas' to_json.",
        ),
        ("r.csv", "a,b\n1,2\n1,2,3\n", ", line 3: 3 cells, the header has 2."),
        ("r.csv", 'a,b\n1,"x"y\n', ", line 2: not valid CSV (',' expected after '\"')."),
        (
            "r.jsonl",
            b'{"a": 1}\n{"a": "\xff"}\n',
            ", line 2: not UTF-8 (byte 16); save the file as UTF-8, in a spreadsheet as CSV UTF-8",
        ),
        ("r.csv", b"a\n\xe4\n", ", line 2: not UTF-8 (byte 2); save the file as UTF-8, in a spreadsheet as CSV UTF-8"),
        (
            "r.xlsx",
            "x",
            ": .xlsx ending; give a .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow or .txt file, as it is or "
            "compressed",
        ),
        ("rows", "x", ": no ending; give a .jsonl,"),
    ],
)
def test_a_bad_file_is_named_with_the_line(file, name, content, message):
    path = file(name, content)
    with pytest.raises(InputError, match=f"^{re.escape(path + message)}"):
        read_rows(path)


def test_a_cell_may_be_longer_than_the_csv_modules_limit(file):
    assert read_rows(file("r.csv", "text\n" + "x" * 200_000 + "\n")) == [{"text": "x" * 200_000}]

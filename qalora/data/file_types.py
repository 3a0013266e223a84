"""One file → its rows, each with its place for messages: JSON, CSV, Parquet, Arrow and plain text, compressed or not.
Torch-free."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora.errors import InputError

if TYPE_CHECKING:
    import pyarrow

# Byte-order marks; that of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
Row = tuple[dict[str, Any], str]  # and its place


def read_content(content: bytes, path: Path) -> Iterator[Row]:
    """(row, place) of a file by its ending; the place is the file with the line or the number of the row.

    Non-finite numbers are null, as what pandas means by NaN; bytes that are UTF-8 are texts.

    Raises:
        InputError: unknown ending, unreadable, malformed, or one name for two values; with the place.
    """
    kind = ending(path)
    if kind not in READERS:
        raise InputError(
            f"{path}: {kind or 'no'} ending; give a {', '.join(list(READERS)[:-1])} or {list(READERS)[-1]} file, as it "
            f"is or compressed ({', '.join(DECOMPRESS)}), or a .zip of such."
        )
    for row, place in READERS[kind](_decompressed(content, path), path):
        yield {name: _plain(value) for name, value in row.items()}, place


def ending(path: Path) -> str:
    """The ending that tells the type of a file, in lower case: `.jsonl` of rows.JSONL.gz."""
    if path.suffix.lower() in DECOMPRESS:
        path = path.with_suffix("")
    return path.suffix.lower()


def table_rows(table: pyarrow.Table, where: str) -> Iterator[Row]:
    """The rows of a table of Arrow.

    Raises:
        InputError: two columns, or two fields of one, with the same name.
    """
    names = table.column_names
    _once(names, where)
    for column in table.schema:
        _once_inside(column.type, f"{where}, column {column.name!r}")
    columns = [_values(column) for column in table.columns]
    for number, cells in enumerate(zip(*columns, strict=True)):
        yield {name: _plain(cell) for name, cell in zip(names, cells, strict=True)}, f"{where}, row {number}"


# ---------------------------------------------------------------------------------------------------- bytes and texts


def content_of(path: Path) -> bytes:
    """
    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None


def _decompressed(data: bytes, path: Path) -> bytes:
    decompress = DECOMPRESS.get(path.suffix.lower())
    try:
        return decompress(data) if decompress else data
    except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise InputError(f"{path}: cannot be decompressed ({_short(error)}); is it whole?") from None


def _through_arrow(codec: str) -> Callable[[bytes], bytes]:
    def decompress(data: bytes) -> bytes:
        import pyarrow

        with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), codec) as stream:
            return bytes(stream.read())

    return decompress


DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _through_arrow("zstd"),
    ".lz4": _through_arrow("lz4"),
}


def _decoded(data: bytes, path: Path) -> str:
    """The text of a file: UTF-8, or what its byte-order mark says."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        kind = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
        raise InputError(
            f"{path}, line {line}: not {kind} (byte {error.start}); save the file as UTF-8, in a spreadsheet as CSV "
            "UTF-8, or convert it: iconv -f WINDOWS-1252 -t UTF-8."
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(
            f"{path}, line {line}: a NUL character, as in UTF-16 without its mark; save the file as UTF-8."
        )
    return text


def _plain(value: object) -> object:
    """Non-finite numbers → null, UTF-8 in bytes → text; other bytes stay what they are, and no text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value


def _once(names: list[str], where: str, what: str = "columns") -> None:
    """
    Raises:
        InputError: one of the names stands twice.
    """
    for number, name in enumerate(names, start=1):
        first = names.index(name) + 1
        if name and first != number:
            raise InputError(f"{where}: {what} {first} and {number} are both called {name!r}; rename one.")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]


# --------------------------------------------------------------------------------------------------------------- JSON


def _json(data: bytes, path: Path) -> Iterator[Row]:
    """A list of rows, an object with such a list as `data`, or a row per line; whichever of the endings it has."""
    text = _decoded(data, path)
    begin = text.lstrip()[:1]
    if begin == "[" or (begin and ending(path) == ".json"):
        try:
            yield from _document(text, path)
            return
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise InputError(
                    f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno})."
                ) from None
    yield from _lines(text, path)


def _document(text: str, path: Path) -> Iterator[Row]:
    value, twice = _loads(text, str(path))
    rows = value.get("data") if isinstance(value, dict) else value
    if twice:
        part, message = twice[0]
        among = enumerate(rows if isinstance(rows, list) else ())
        row = next((f", row {number}" for number, row in among if _holds(row, part)), "")
        raise InputError(f"{path}{row}: {message}.")
    if not isinstance(rows, list):
        raise InputError(
            f"{path}: a .json file holds a list of rows (or an object with such a list as data); use .jsonl for lines, "
            "and orient='records' in pandas' to_json."
        )
    for number, row in enumerate(rows):
        place = f"{path}, row {number}"
        yield _object(row, place), place


def _lines(text: str, path: Path) -> Iterator[Row]:
    # JSON has no bare line break inside a text.
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                value, twice = _loads(line, place)
            except json.JSONDecodeError as error:
                raise InputError(f"{place}: not valid JSON ({error.msg}, column {error.colno}).") from None
            if twice:
                raise InputError(f"{place}: {twice[0][1]}.")
            yield _object(value, place), place


def _loads(text: str, where: str) -> tuple[object, list[tuple[dict[str, object], str]]]:
    """(value, the objects in it that have a key twice, each with a message)."""
    twice: list[tuple[dict[str, Any], str]] = []

    def collect(pairs: list[tuple[str, object]]) -> dict[str, object]:
        row = dict(pairs)
        if len(row) < len(pairs):
            names = [name for name, _ in pairs]
            name = next(name for i, name in enumerate(names) if name in names[:i])
            first, second = [_excerpt(value) for other, value in pairs if other == name][:2]
            twice.append((row, f"one object has {name!r} twice, {first} and {second}; remove one"))
        return row

    try:
        return json.loads(text, object_pairs_hook=collect), twice
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise InputError(f"{where}: JSON that cannot be read ({_short(error)}).") from None


def _excerpt(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _holds(tree: object, part: dict[str, object]) -> bool:
    """Whether the very object is in the tree."""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return tree is part or any(_holds(child, part) for child in children)


def _object(value: object, where: str) -> dict[str, object]:
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):  # a conversation
        return {"messages": value}
    if not isinstance(value, dict):
        raise InputError(f"{where}: a row is an object with columns, this is {type(value).__name__}.")
    return value


# ---------------------------------------------------------------------------------------------------------------- CSV


def _csv(data: bytes, path: Path) -> Iterator[Row]:
    """Cells between commas, tabs (.tsv), or semicolons where the header has these alone."""
    csv.field_size_limit(2**31 - 1)  # the module's own limit, 131,072 characters, is below a long context
    text = _decoded(data, path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text, path), strict=True)
    lines = (cells for cells in reader if any(cells))  # a blank line is no row
    try:
        header = next(lines, [])
        _once(header, f"{path}, line {reader.line_num}")
        for cells in lines:
            place = f"{path}, line {reader.line_num}"
            surplus = cells[len(header) :]
            if len(cells) < len(header) or any(surplus):
                raise InputError(f"{place}: {len(cells)} cells, the header has {len(header)}.")
            # pandas' name for a column that has none; trailing commas make some that are empty
            named = enumerate(zip(header, cells, strict=False))
            yield {name or f"Unnamed: {i}": cell for i, (name, cell) in named if name or cell}, place
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from None


def _delimiter(text: str, path: Path) -> str:
    if ending(path) == ".tsv":
        return "\t"
    header = text.lstrip("\r\n").partition("\n")[0]
    return next((mark for mark in ",;\t" if mark in header), ",")


# -------------------------------------------------------------------------------------------------- Parquet and Arrow


def _parquet(data: bytes, path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(data)).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file ({_short(error)}).") from None
    yield from table_rows(table, str(path))


def _arrow(data: bytes, path: Path) -> Iterator[Row]:
    """Both forms of Arrow's IPC: the stream, which `datasets` writes, and the file."""
    import pyarrow
    from pyarrow import ipc

    is_file = data.startswith(b"ARROW1")
    try:
        with (ipc.open_file if is_file else ipc.open_stream)(pyarrow.BufferReader(data)) as reader:
            table = reader.read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not an Arrow file ({_short(error)}).") from None
    yield from table_rows(table, str(path))


def _values(column: pyarrow.ChunkedArray) -> list[object]:
    cells = column.to_pylist()
    return [_from_json(cell, column.type) for cell in cells] if "arrow.json" in str(column.type) else cells


def _from_json(value: Any, type: pyarrow.DataType) -> object:
    """`datasets` stores values of mixed types as JSON, anywhere in a column."""
    from pyarrow import types

    if value is None:
        return None
    if getattr(type, "extension_name", "") == "arrow.json":
        return json.loads(value)
    if types.is_struct(type):
        return {field.name: _from_json(value[field.name], field.type) for field in type}
    if types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
        return [_from_json(part, type.value_type) for part in value]
    return value


def _once_inside(type: pyarrow.DataType, where: str) -> None:
    fields = [type.field(i) for i in range(type.num_fields)]
    _once([field.name for field in fields], where, "fields")
    for field in fields:
        _once_inside(field.type, where)


# --------------------------------------------------------------------------------------------------------------- text


def _text(data: bytes, path: Path) -> Iterator[Row]:
    """A row per line, as `datasets` reads such files; a blank line is no row."""
    for number, line in enumerate(io.StringIO(_decoded(data, path), newline=None), start=1):
        if line.strip():
            yield {"text": line.removesuffix("\n")}, f"{path}, line {number}"


READERS: dict[str, Callable[[bytes, Path], Iterator[Row]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _text,
}

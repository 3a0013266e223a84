"""A source of rows → the rows: files, data sets of the Hub, the built-in task. Torch-free."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from qalora.errors import InputError

QUICKSTART = "qalora:quickstart"


def read_rows(source: str, *, split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file (json, jsonl, csv, parquet), of a Hub data set, or of the built-in quickstart task.

    Raises:
        InputError: missing, empty, malformed (with file and line), or not UTF-8.
    """
    if source == QUICKSTART:
        from qalora.data import quickstart

        if split not in quickstart.SIZES:
            raise InputError(f"{source}: no split {split!r}; it has {', '.join(quickstart.SIZES)}.")
        return list(quickstart.rows(0, quickstart.SIZES[split], split)[:limit])
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"{source}: a folder; name the file in it.")
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if not path.is_file():
        if path.suffix in readers or source.startswith((".", "/", "~")):
            raise InputError(f"{source}: no such file.")
        return _hub_rows(source, split, limit)
    if path.suffix not in readers:
        raise InputError(f"{source}: {path.suffix or 'no'} ending; give a .jsonl, .json, .csv or .parquet file.")
    rows = list(islice(readers[path.suffix](path), limit))
    if not rows:
        raise InputError(f"{source}: no rows in it.")
    return rows


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 (byte {error.start}); save the file as UTF-8.") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a row is an object with columns, this is {type(value).__name__}.")
    return value


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}, line {number}: not valid JSON ({error.msg}, column {error.colno})."
                ) from None
            yield _object(value, f"{path}, line {number}")


def _json(path: Path) -> Iterator[dict[str, Any]]:
    text = _decoded(path)
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        lines = " (a row a line? then call it .jsonl)" if error.msg == "Extra data" else ""
        raise InputError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}){lines}."
        ) from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise InputError(
            f"{path}: a .json file holds a list of rows (or an object with such a list as data); use .jsonl for lines."
        )
    for number, row in enumerate(rows):
        yield _object(row, f"{path}, row {number}")


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit, 131,072 characters, is below a long context
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        for cells in filter(None, reader):  # a blank line is no row
            if len(cells) != len(header):
                raise InputError(f"{path}, line {reader.line_num}: {len(cells)} cells, the header has {len(header)}.")
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not valid CSV ({error}).") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a parquet file ({' '.join(str(error).split())[:120]}).") from None
    yield from table.to_pylist()


def _hub_rows(source: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    from datasets import load_dataset

    try:
        try:
            rows = load_dataset(source, split=split)
        except ValueError as error:
            # Some sets have one configuration with a name of its own, such as gsm8k's "main".
            if "Config name is missing" not in str(error):
                raise
            rows = load_dataset(source, "main", split=split)
    except Exception as error:  # offline, gated, unknown and split errors each have a class of their own
        raise InputError(
            f"data {source}: neither a file nor a data set of the Hub that can be read (split {split}): "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    return [dict(row) for row in islice(rows, limit)]

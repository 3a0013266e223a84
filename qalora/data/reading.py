"""A source of rows → the rows: files, folders, data sets of the Hub, the built-in task. Torch-free.

What a source may be, and what its splits are:

    rows.jsonl, rows.csv.gz, .zip one file                              one split, whatever it is called
    part-*.parquet, a list        several files, end to end             likewise
    a folder of files             splits by the names of files,         likewise where the names say none
                                  as `datasets` finds them
    a folder of save_to_disk      a DatasetDict's splits                likewise for a Dataset
    owner/name                    a data set of the Hub, or one in      its own
                                  the cache
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qalora.data.file_types import READERS, Row, ending, table_rows
from qalora.data.several_files import ZIP, files_of_rows, read_files
from qalora.errors import InputError

QUICKSTART = "qalora:quickstart"
Splits = Mapping[str | None, Callable[[], Iterator[Row]]]  # None: the only one, which has no name


class Rows(list[dict[str, Any]]):
    """Rows, the place of each in its file, for messages, and the number of the first row of each source."""

    def __init__(self, found: Sequence[Row], begins: Sequence[int]):
        super().__init__(row for row, _ in found)
        self.places = [place for _, place in found]
        self.begins = tuple(begins)


def read_rows(
    source: str | Sequence[str], *, split: str = "train", name: str | None = None, limit: int | None = None
) -> Rows:
    """The rows of a source, or of several, end to end.

    Args:
        source: or rows, in memory.
        split: of a set that has splits; slices as `datasets` has them (train[:10%], train+test), of each source.
        name: of a configuration, for a set of the Hub, or a clone of one, that has several.
        limit: rows at most.

    Raises:
        InputError: missing, empty, malformed (with file and line), or no such split.
    """
    if in_memory(source):
        given: list[Row] = [(dict(row), f"row {number}") for number, row in enumerate(source)]  # type: ignore[arg-type]
        return Rows(given[:limit], [0])
    found: list[Row] = []
    begins: list[int] = []
    for each in sources(source):
        left = None if limit is None else limit - len(found)
        rows = list(islice(_read(each, split, name, left), left))
        if not rows and left != 0:
            sliced = f" (split {split})" if "[" in split else ""
            raise InputError(f"{each}: no rows in it{sliced}.")
        begins += [len(found)] if rows else []
        found += rows
    return Rows(found, begins)


def sources(source: str | Sequence[str]) -> list[str]:
    """A list, or a text with commas between its sources where it is no path itself."""
    if not isinstance(source, str):
        return list(source)
    if "," not in source or _path(source).exists():
        return [source]
    return [part.strip() for part in source.split(",") if part.strip()]


def paths_of(source: str | Sequence[str] | None) -> list[Path]:
    """The files and folders that a source names; some may not exist, such as the id of a data set."""
    return [path for each in sources(source or []) for path in _matches(each) or [_path(each)]]


def described(source: str | Sequence[str]) -> str:
    """The source, for messages."""
    return "rows" if in_memory(source) else ", ".join(sources(source))


def in_memory(source: object) -> bool:
    """Whether a source is rows themselves: a list of mappings, or a data set of `datasets`."""
    return not isinstance(source, str) and isinstance(next(iter(source), None), Mapping)  # type: ignore[call-overload]


def _path(source: str) -> Path:
    return Path(source).expanduser()


def _matches(source: str) -> list[Path]:
    """What a pattern stands for, in order."""
    path = str(_path(source))
    if not glob.has_magic(path) or os.path.exists(path):
        return []
    return [Path(match) for match in sorted(glob.glob(path, recursive=True))]


def _read(source: str, split: str, name: str | None, limit: int | None) -> Iterator[Row]:
    path = _path(source)
    if source == QUICKSTART:
        splits = _quickstart()
    elif path.is_file():
        splits = {None: partial(read_files, [path], source)}
    elif path.is_dir() and _has_configurations(path):
        return _hub_rows(str(path), split, name, limit)
    elif path.is_dir():
        splits = _folder(path)
    elif glob.has_magic(str(path)):
        files = [match for match in _matches(source) if match.is_file()]
        if not files:
            raise InputError(f"{source}: no file matches.")
        splits = {None: partial(read_files, files, source)}
    elif ending(path) in (*READERS, ZIP) or source.startswith((".", "/", "~")):
        raise InputError(f"{source}: no such file.")
    else:
        return _hub_rows(source, split, name, limit)
    return _split_of(splits, split, source)


# ------------------------------------------------------------------------------------------------------ splits


def _split_of(splits: Splits, split: str, source: str) -> Iterator[Row]:
    """The rows of a split, of a slice of one, or of several."""
    asked = [part.partition("[")[0].strip() for part in split.split("+")]
    if None in splits:
        if len(set(asked)) > 1:
            raise InputError(
                f"{source}: has no splits, and split {split!r} asks for several; leave it out, or slice one."
            )
        splits = {asked[0]: splits[None]}
    if unknown := [part for part in asked if part not in splits]:
        raise InputError(f"{source}: no split {unknown[0]!r}; it has {', '.join(map(str, splits))}.")
    if re.fullmatch(r"[\w.-]+", split):
        return splits[split]()
    from datasets import ReadInstruction

    read = {part: list(splits[part]()) for part in asked}
    try:
        slices = ReadInstruction.from_spec(split).to_absolute({part: len(rows) for part, rows in read.items()})
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"{source}: split {split!r} cannot be taken ({' '.join(str(error).split())[:120]}); it is written as in "
            "`datasets`: train[:10%], train[100:200]."
        ) from None
    return chain.from_iterable(islice(read[part.splitname], part.from_, part.to) for part in slices)


def _quickstart() -> Splits:
    from qalora.data import quickstart

    def rows(split: str) -> Iterator[Row]:
        for number, row in enumerate(quickstart.rows(0, quickstart.SIZES[split], split)):
            yield row, f"{QUICKSTART}, row {number}"

    return {split: partial(rows, split) for split in quickstart.SIZES}


# ----------------------------------------------------------------------------------------------------- folders


def _folder(path: Path) -> Splits:
    if (path / "dataset_dict.json").is_file():
        saved = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return {split: partial(_saved, path / split) for split in saved}
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return {None: partial(_saved, path)}
    from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

    try:
        patterns = get_data_patterns(str(path))
        found = DataFilesDict.from_patterns(patterns, str(path))
    except (EmptyDatasetError, FileNotFoundError):
        found, patterns = {}, {}
    splits = {split: files_of_rows([Path(file) for file in files]) for split, files in found.items()}
    splits = {str(split): sorted(files) for split, files in splits.items() if files}
    if not splits:
        raise InputError(f"{path}: a folder without a file of rows ({', '.join(READERS)}).")
    unnamed = list(patterns.values()) == [["**"]]
    return {None if unnamed else split: partial(read_files, files, str(path)) for split, files in splits.items()}


def _saved(path: Path) -> Iterator[Row]:
    """The rows of `Dataset.save_to_disk`."""
    from datasets import load_from_disk

    try:
        return table_rows(load_from_disk(str(path)).with_format("arrow")[:], str(path))
    except Exception as error:  # of Arrow, of JSON, and of `datasets`
        raise InputError(f"{path}: a data set that cannot be read ({' '.join(str(error).split())[:160]}).") from None


def _has_configurations(path: Path) -> bool:
    """Whether a folder's card says which files are its splits, as in a clone from the Hub."""
    card = path / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return re.match(r"---\n(?:(?!---).*\n)*?configs:", text) is not None


# ----------------------------------------------------------------------------------------------------- the Hub


def _hub_rows(source: str, split: str, name: str | None, limit: int | None) -> Iterator[Row]:
    from datasets import load_dataset

    try:
        try:
            rows = load_dataset(source, name, split=split)
        except ValueError as error:
            # Some sets have one configuration with a name of its own, such as gsm8k's "main".
            if "Config name is missing" not in str(error) or "'main'" not in str(error):
                raise
            rows = load_dataset(source, "main", split=split)
    except Exception as error:  # offline, gated, unknown and split errors each have a class of their own
        advice = "; set data.name to one of its configurations" if "Config name is missing" in str(error) else ""
        raise InputError(
            f"data {source}: neither a file nor a data set of the Hub that can be read (split {split}{advice}): "
            f"{' '.join(str(error).split())[:300]}"
        ) from None
    return table_rows(rows.with_format("arrow")[:limit], f"{source} ({split})")

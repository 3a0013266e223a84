"""Files and folders that a command writes: refused before the work if they cannot be, and never half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qalora.errors import InputError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY)


def check_writable(file: str | Path, flag: str = "--output", *, others: Iterable[str | Path] = ()) -> None:
    """
    Args:
        flag: what names the file in errors.
        others: what the command reads or writes besides; some may be no paths.

    Raises:
        InputError: a folder, a device or a pipe, a place where nothing can be written, or one of the others.
    """
    path = Path(file)
    if path.is_dir():
        raise InputError(f"{flag} {file}: a folder; name a file in it.")
    if path.exists() and not path.is_file():
        raise InputError(f"{flag} {file}: no file; name one, which is written whole and put in its place.")
    if any(path.resolve() == Path(other).expanduser().resolve() for other in others):
        raise InputError(f"{flag} {file}: would replace a file that this command reads or writes; name another.")
    _check_place(path, f"{flag} {file}")


def check_folder(folder: Path, flag: str, *, replaced: bool = True) -> None:
    """
    Args:
        flag: what names it in errors.
        replaced: a new folder takes its place; otherwise it is written into.

    Raises:
        InputError: a file, a device or a pipe, a place where nothing can be written, or one that cannot be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag}: no folder; choose one.")
    if replaced and os.path.ismount(folder):
        raise InputError(
            f"{flag}: something is mounted there, and it cannot be replaced as a whole; choose a folder in it."
        )
    _check_place(folder if replaced else folder / "file", flag)


def _check_place(path: Path, flag: str) -> None:
    there = next(parent for parent in path.resolve().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{flag}: nothing can be written to {there}; choose another place.")


def holds(folder: Path, path: Path) -> bool:
    """Whether the path is the folder, or lies in it."""
    return folder.resolve() in (path.resolve(), *path.resolve().parents)


def write_whole(file: str | Path, text: str) -> None:
    """Writes beside the file and moves it there when it is whole."""
    path = Path(file).resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(file: str | Path, value: Any, *, indent: int = 2) -> None:
    write_whole(file, json.dumps(value, indent=indent) + "\n")


def write_json_lines(file: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def written_beside(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of `folder` at the end, or vanishes after an error.

    Killed at any moment, it leaves the old content, nothing, or the new content, never a part; what lies beside it
    then is cleared away by the next attempt.
    """
    path = Path(folder).resolve()  # "." has no name
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise InputError(f"{folder}: cannot be written ({error.strerror}); nothing was kept.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

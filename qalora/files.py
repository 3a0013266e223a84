"""Files and folders that a command writes: refused before the work if they cannot be, and never half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qalora.errors import InputError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY)


def check_writable(file: str | Path) -> None:
    """
    Raises:
        InputError: a folder, a device or a pipe, or a place where nothing can be written.
    """
    path = Path(file)
    if path.is_dir():
        raise InputError(f"--output {file}: a folder; name a file in it.")
    if path.exists() and not path.is_file():
        raise InputError(f"--output {file}: no file; name one, which is written whole and put in its place.")
    _check_place(path, f"--output {file}")


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

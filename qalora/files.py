"""Files and folders that a command writes: refused before the work if they cannot be, and never half-written."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from qalora.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY)

AT_FDCWD, EXCHANGE = -100, 2  # of renameat2


def check_writable(file: str | Path, flag: str = "--output", *, others: Iterable[str | Path] = ()) -> None:
    """
    Args:
        flag: what names the file in errors.
        others: what the command reads or writes besides; some may be no paths.

    Raises:
        InputError: a folder, a device or a pipe, a place where nothing can be written, or one of the others.
    """
    path = Path(file)
    _check_name(path, f"{flag} {file}")
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
    _check_name(folder, flag)
    if folder.is_symlink() and not folder.exists():
        raise InputError(
            f"{flag}: a link to {os.readlink(folder)}, which is not there; make that folder, or choose another."
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{flag}: no folder; choose one.")
    if replaced and os.path.ismount(folder):
        raise InputError(
            f"{flag}: something is mounted there, and it cannot be replaced as a whole; choose a folder in it."
        )
    _check_place(folder if replaced else folder / "file", flag)


def _check_name(path: Path, flag: str) -> None:
    """
    Raises:
        InputError: what the system takes for no path: too long a name, links in a circle.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # the place that is there says more
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{flag}: no path of this system ({reason}); choose another place.") from None


def _check_place(path: Path, flag: str) -> None:
    there = next(parent for parent in path.resolve().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{flag}: nothing can be written to {there}; choose another place.")


def holds(folder: Path, path: Path) -> bool:
    """Whether the path is the folder, or lies in it."""
    return folder.resolve() in (path.resolve(), *path.resolve().parents)


def write_whole(file: str | Path, text: str) -> None:
    """Writes beside the file and moves it there when it is whole and on the disk."""
    path = Path(file).resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(file: str | Path, value: object, *, indent: int = 2) -> None:
    write_whole(file, json.dumps(value, indent=indent) + "\n")


def write_json_lines(file: str | Path, rows: Iterable[Mapping[str, object]]) -> None:
    write_whole(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk: a rename may reach it before the content
    does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do it for folders
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """`sync` of every file in a folder, and of the folders."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


@contextmanager
def written_beside(folder: str | Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of `folder` at the end, or vanishes after an error.

    Killed at any moment, it leaves the old content or the new, never a part; where the system cannot exchange two
    folders, for a moment nothing. What lies beside it then is put back or cleared away by the next attempt.

    Raises:
        InputError: the disk is full, or nothing can be written there.
    """
    path = Path(folder).resolve()  # "." has no name
    partial = path.with_name(f".{path.name}.partial")
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(partial, ignore_errors=True)
    put_back(path)
    try:
        partial.mkdir(parents=True)
        yield partial
        sync_tree(partial)
        shutil.rmtree(replaced, ignore_errors=True)
        if not (path.exists() and _exchange(partial, path)):
            if path.exists():
                path.rename(replaced)
            partial.rename(path)
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except Exception as error:
        reason = unwritable(error)
        if reason is None:
            raise
        raise InputError(f"{folder}: cannot be written ({reason}); nothing was kept.") from error
    finally:
        put_back(path)
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Two folders take each other's place at once, so that no kill finds a place empty; False where the system
    cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), EXCHANGE) == 0


def put_back(path: Path) -> None:
    """Gives a folder its place again that was killed while another one was about to take it."""
    replaced = path.with_name(f".{path.name}.replaced")
    if replaced.is_dir() and not path.exists():
        replaced.rename(path)


def unwritable(error: BaseException) -> str | None:
    """The reason, where an error says that a disk is full or cannot be written; None for any other error.

    torch, safetensors and tokenizers raise errors of their own, which say it in words or by a number alone.
    """
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return os.strerror(error.errno)
    wordy = isinstance(error, (OSError, RuntimeError)) or type(error) is Exception  # the latter: tokenizers
    if not wordy and type(error).__name__ != "SafetensorError":
        return None
    text = str(error)
    for number in FULL:
        if os.strerror(number) in text or f"os error {number})" in text:
            return os.strerror(number)
    # torch's writer notices that a write was short, and keeps the reason to itself.
    short_write = r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+|iostream error"
    return os.strerror(errno.ENOSPC) if re.search(short_write, text) else None


def disk_is_full(error: BaseException) -> bool:
    """Whether an error says that there was no room to write, wherever that was."""
    return unwritable(error) in {os.strerror(number) for number in FULL}

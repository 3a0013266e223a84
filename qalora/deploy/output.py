"""Where a merge or an export goes: what may be replaced, whether there is room, and one writer at a time."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from qalora.base.precision import MERGED as REPORT
from qalora.errors import InputError
from qalora.files import check_folder, holds
from qalora.locking import locked

__all__ = ["REPORT", "check_output", "free_disk", "one_at_a_time"]

P = ParamSpec("P")
T = TypeVar("T")


def one_at_a_time(write: Callable[P, T]) -> Callable[P, T]:
    """A function with an `output_dir`, of which only one call writes to the same folder at a time, in any process.

    The decorated function raises InputError where another one is at work there. It holds the lock from its first check
    on, so what it found there is what it replaces.
    """

    @wraps(write)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        folder = Path(inspect.signature(write).bind(*args, **kwargs).arguments["output_dir"])
        check_folder(folder, str(folder))
        path = folder.resolve()
        with locked(path.with_name(f".{path.name}.lock"), str(folder)):
            return write(*args, **kwargs)

    return alone


def check_output(
    output_dir: Path, *, model: str, adapter: Path, overwrite: bool, report: str = REPORT, what: str = "merge"
) -> None:
    """Refuses a folder whose content is not ours to replace.

    Args:
        report: the file in which the command says what it wrote.
        what: the command writes, in words.

    Raises:
        InputError: a file; a folder that holds the adapter, the base, the current folder or folders; without
            `overwrite`, a folder with anything but a previous output of the same model and adapter.
    """
    for source in (adapter, Path(model).expanduser()):
        if source.exists() and holds(output_dir, source):
            raise InputError(f"{output_dir}: holds {source}, which the {what} reads; choose another output folder.")
    check_folder(output_dir, str(output_dir))
    if not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    folders = sorted(path.name for path in output_dir.iterdir() if path.is_dir())
    if folders or holds(output_dir, Path.cwd()):
        found = f"holds the folder {folders[0]}, which no {what} wrote" if folders else "the current folder"
        raise InputError(f"{output_dir}: {found}, and a {what} replaces the whole; choose another output folder.")
    if overwrite:
        return
    try:
        known = json.loads((output_dir / report).read_text(encoding="utf-8"))
        same = (known["model"], known["adapter"]) == (model, str(adapter.resolve()))
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise InputError(f"{output_dir}: not a {what} of {model} with {adapter}; pass --overwrite to replace it.")


def free_disk(path: Path) -> int:
    """Bytes free where the path is, or will be."""
    there = next(parent for parent in (path.resolve(), *path.resolve().parents) if parent.is_dir())
    return shutil.disk_usage(there).free

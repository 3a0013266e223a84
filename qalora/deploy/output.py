"""Where a merge or an export goes: what may be replaced, and nothing half-written, ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qalora.errors import InputError
from qalora.files import holds

REPORT = "merge.json"


def check_output(output_dir: Path, *, model: str, adapter: Path, overwrite: bool) -> None:
    """Refuses a folder whose content is not ours to replace.

    Raises:
        InputError: a file; a folder that holds the adapter or the base; without `overwrite`, a folder with
            anything but a previous merge of the same model and adapter.
    """
    for source in (adapter, Path(model)):
        if source.exists() and holds(output_dir, source):
            raise InputError(f"{output_dir}: holds {source}, which the merge reads; choose another output folder.")
    if output_dir.is_file():
        raise InputError(f"{output_dir}: is a file; choose a folder.")
    if overwrite or not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    try:
        report = json.loads((output_dir / REPORT).read_text(encoding="utf-8"))
        same = (report["model"], report["adapter"]) == (model, str(adapter.resolve()))
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise InputError(f"{output_dir}: not a merge of {model} with {adapter}; pass --overwrite to replace it.")


@contextmanager
def written_beside(output_dir: Path) -> Iterator[Path]:
    """A folder to write into, that takes the place of `output_dir` at the end, or vanishes after an error.

    Killed at any moment, it leaves the old content, nothing, or the new content, never a part; what lies beside it
    then is cleared away by the next attempt.
    """
    output_dir = output_dir.resolve()  # "." has no name
    partial = output_dir.with_name(output_dir.name + ".partial")
    replaced = output_dir.with_name(output_dir.name + ".replaced")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(replaced, ignore_errors=True)
        if output_dir.exists():
            output_dir.rename(replaced)
        partial.rename(output_dir)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def free_disk(path: Path) -> int:
    """Bytes free where the path is, or will be."""
    there = next(parent for parent in (path.resolve(), *path.resolve().parents) if parent.is_dir())
    return shutil.disk_usage(there).free

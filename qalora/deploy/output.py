"""Where a merge or an export goes: what may be replaced, and whether there is room."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from qalora.base.precision import MERGED as REPORT
from qalora.errors import InputError
from qalora.files import check_folder, holds

__all__ = ["REPORT", "check_output", "free_disk"]


def check_output(output_dir: Path, *, model: str, adapter: Path, overwrite: bool) -> None:
    """Refuses a folder whose content is not ours to replace.

    Raises:
        InputError: a file; a folder that holds the adapter or the base; without `overwrite`, a folder with
            anything but a previous merge of the same model and adapter.
    """
    for source in (adapter, Path(model).expanduser()):
        if source.exists() and holds(output_dir, source):
            raise InputError(f"{output_dir}: holds {source}, which the merge reads; choose another output folder.")
    check_folder(output_dir, str(output_dir))
    if overwrite or not output_dir.is_dir() or not any(output_dir.iterdir()):
        return
    try:
        report = json.loads((output_dir / REPORT).read_text(encoding="utf-8"))
        same = (report["model"], report["adapter"]) == (model, str(adapter.resolve()))
    except (OSError, ValueError, LookupError, TypeError):
        same = False
    if not same:
        raise InputError(f"{output_dir}: not a merge of {model} with {adapter}; pass --overwrite to replace it.")


def free_disk(path: Path) -> int:
    """Bytes free where the path is, or will be."""
    there = next(parent for parent in (path.resolve(), *path.resolve().parents) if parent.is_dir())
    return shutil.disk_usage(there).free

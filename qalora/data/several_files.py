"""Several files that are one set of rows: which of them count, and those in a zip. Torch-free."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from qalora.data.file_types import DECOMPRESS, READERS, Row, content_of, ending, read_content
from qalora.errors import InputError

ZIP = ".zip"


def read_files(files: Sequence[Path], source: str) -> Iterator[Row]:
    """The rows of files, end to end; of zips, those of the files in them.

    Raises:
        InputError: files of several types, or one file twice, which may well be the same rows twice; whatever
            `read_content` raises.
    """
    _check_one_kind(files, source)
    return chain.from_iterable(map(_rows, files))


def files_of_rows(files: Sequence[Path]) -> list[Path]:
    """Those that hold rows, among all files of a folder; a .txt beside other files is a note on them."""
    known = [file for file in files if ending(file) in (*READERS, ZIP)]
    return [file for file in known if ending(file) != ".txt"] or known


def _rows(path: Path) -> Iterator[Row]:
    content = content_of(path)
    return _archived(content, path) if ending(path) == ZIP else read_content(content, path)


def _archived(content: bytes, path: Path) -> Iterator[Row]:
    """The rows of the files in a zip, in the order of their names."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = sorted(name for name in archive.namelist() if not _hidden(name))
            files = [file for file in files_of_rows([Path(name) for name in names]) if ending(file) != ZIP]
            contents = [(path / file, archive.read(file.as_posix())) for file in files]
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:  # a password is a RuntimeError
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: a zip that cannot be read ({reason}); is it whole? Unpack it and name the files."
        ) from None
    if not contents:
        raise InputError(f"{path}: a zip without a file of rows ({', '.join(READERS)}).")
    _check_one_kind(files, str(path))
    for file, each in contents:
        yield from read_content(each, file)


def _hidden(name: str) -> bool:
    """Folders, and what macOS puts beside the files."""
    return name.endswith("/") or any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _check_one_kind(files: Sequence[Path], source: str) -> None:
    kinds = sorted({ending(file) for file in files})
    if len(kinds) > 1:
        raise InputError(
            f"{source}: holds {' and '.join(kinds)} files, which may be the same rows twice; name those that are "
            f"meant, such as *{kinds[0]}."
        )
    seen: dict[str, Path] = {}
    for file in files:
        plain = str(file.with_suffix("") if file.suffix.lower() in DECOMPRESS else file)
        if plain in seen:
            raise InputError(f"{source}: {seen[plain].name} and {file.name} are the same file twice; name one of them.")
        seen[plain] = file

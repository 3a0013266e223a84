"""Several files as one set of rows: their order, and what may be the same rows twice."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from qalora.data.several_files import files_of_rows, read_files
from qalora.errors import InputError


def write(folder: Path, name: str, *texts: str) -> Path:
    (folder / name).write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return folder / name


def texts(files, source="s") -> list[str]:
    return [row["text"] for row, _ in read_files(files, source)]


def test_files_are_read_end_to_end_with_their_places(tmp_path):
    files = [write(tmp_path, "b.jsonl", "1", "2"), write(tmp_path, "a.jsonl", "3")]
    assert texts(files) == ["1", "2", "3"]
    assert [place for _, place in read_files(files, "s")][-1] == f"{tmp_path}/a.jsonl, line 1"


def test_a_zip_is_the_files_in_it_by_name_without_what_macos_adds(tmp_path):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name, text in (("d/b.jsonl", "2"), ("a.jsonl", "1"), ("__MACOSX/a.jsonl", "no"), (".hidden.jsonl", "no")):
            archive.writestr(name, f'{{"text": "{text}"}}\n')
        archive.writestr("notes.txt", "about them")
    assert texts([tmp_path / "z.zip"]) == ["1", "2"]


def test_a_text_beside_rows_is_a_note_and_alone_it_is_rows():
    files = [Path(name) for name in ("README.txt", "a.csv", "x.bin")]
    assert files_of_rows(files) == [Path("a.csv")] and files_of_rows(files[:1]) == files[:1]


@pytest.mark.parametrize(
    ("names", "message"),
    [(("a.jsonl", "a.csv"), ".csv and .jsonl files"), (("a.jsonl", "a.jsonl.gz"), "same file twice")],
)
def test_what_may_be_the_same_rows_twice_is_refused(tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        read_files([tmp_path / name for name in names], "s")


def test_a_broken_or_empty_zip_is_named(tmp_path):
    (tmp_path / "z.zip").write_bytes(b"PK no")
    with pytest.raises(InputError, match="a zip that cannot be read"):
        texts([tmp_path / "z.zip"])
    zipfile.ZipFile(tmp_path / "e.zip", "w").close()
    with pytest.raises(InputError, match="a zip without a file of rows"):
        texts([tmp_path / "e.zip"])

"""Where results go: named before the work, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qalora.errors import InputError
from qalora.files import check_writable, write_json, written_beside


def test_json_arrives_whole_in_folders_that_it_makes(tmp_path):
    file = tmp_path / "new" / "deep" / "out.json"
    check_writable(file)
    assert not file.parent.exists()
    write_json(file, {"a": [1.5, None]})
    assert json.loads(file.read_text()) == {"a": [1.5, None]}
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": [1.5, None]}
    assert [path.name for path in file.parent.iterdir()] == ["out.json"]


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    write_json(file, {"a": 1})

    def killed(*args):
        raise OSError

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(OSError):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "new"
    for content in ("one", "two"):
        with written_beside(folder) as partial:
            (partial / "file").write_text(content)
        assert [file.read_text() for file in folder.iterdir()] == [content]
    with pytest.raises(ZeroDivisionError), written_beside(folder) as partial:
        (partial / "file").write_text("three")
        raise ZeroDivisionError
    assert (folder / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output .*: a folder; name a file in it"):
        check_writable(tmp_path)
    with pytest.raises(InputError, match=r"--output .*file/out\.json: nothing can be written to"):
        check_writable(tmp_path / "file" / "out.json")

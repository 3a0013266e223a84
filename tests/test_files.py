"""Where results go: named before the work, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from qalora.errors import InputError
from qalora.files import check_folder, check_writable, unwritable, write_json, written_beside


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
    with pytest.raises(InputError, match=r"output .*: a folder; name a file in it"):
        check_writable(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"output .*pipe: no file; name one"):
        check_writable(tmp_path / "pipe")
    for place in ("pipe", "file"):
        with pytest.raises(InputError, match=rf"output_dir=x{place}: no folder; choose one"):
            check_folder(tmp_path / place, f"output_dir=x{place}")
    with pytest.raises(InputError, match="something is mounted there, and it cannot be replaced"):
        check_folder(Path("/proc"), "/proc")
    with pytest.raises(InputError, match=r"output .*file/out\.json: nothing can be written to"):
        check_writable(tmp_path / "file" / "out.json")


def test_what_is_no_path_and_links_to_nothing_are_named(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for path, said in (
        (tmp_path / "circle", "Too many levels of symbolic links"),
        (tmp_path / "circle" / "x", "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null (byte|character)"),
    ):
        with pytest.raises(InputError, match=rf"d: no path of this system \(.*{said}.*choose another place"):
            check_folder(path, "d", replaced=False)
        with pytest.raises(InputError, match=rf"output .*no path of this system \(.*{said}"):
            check_writable(path)
    with pytest.raises(InputError, match=rf"d: a link to {tmp_path}/gone, which is not there; make that folder"):
        check_folder(tmp_path / "nowhere", "d")
    check_writable(tmp_path / "nowhere")  # a file can be written through it


def test_a_link_stays_one_and_its_file_is_written(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json(tmp_path / "link.json", 7)
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "real.json").read_text()) == 7


def test_a_disk_that_fills_up_is_named_and_nothing_is_left(tmp_path):
    said = r"new: cannot be written \(No space left on device\); nothing was kept"
    with pytest.raises(InputError, match=said), written_beside(tmp_path / "new") as partial:
        (partial / "file").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError), written_beside(tmp_path / "new"):
        (tmp_path / "what the work reads").read_text()


def test_what_counts_as_whole_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(handle):
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name}")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append(f"name {Path(to).name}"), replace(self, to))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append(f"name {Path(to).name}"), rename(self, to))[1])
    write_json(tmp_path / "a.json", 1)
    assert done == ["sync .a.json.partial", "name a.json", f"sync {tmp_path.name}"]
    done.clear()
    with written_beside(tmp_path / "new") as partial:
        (partial / "in").mkdir()
        (partial / "in" / "file").write_text("x")
    assert done.index("sync file") < done.index("name new") > done.index("sync .new.partial")
    assert done[-1] == f"sync {tmp_path.name}"


def test_what_a_killed_replacement_took_away_is_put_back(tmp_path):
    (tmp_path / ".new.replaced").mkdir()
    (tmp_path / ".new.replaced" / "old").touch()
    with pytest.raises(ZeroDivisionError), written_beside(tmp_path / "new"):
        raise ZeroDivisionError
    assert (tmp_path / "new" / "old").exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_the_old_folder_stays_where_the_new_one_cannot_get_its_name(tmp_path, monkeypatch, error):
    with written_beside(tmp_path / "new") as partial:
        (partial / "file").write_text("one")
    rename = Path.rename

    def renamed(self, to):
        if self.name.endswith(".partial"):
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr("qalora.files._exchange", lambda *_: False)  # as on systems that cannot exchange two folders
    with pytest.raises(type(error)), written_beside(tmp_path / "new") as partial:
        (partial / "file").write_text("two")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "file").read_text() == "one"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EFBIG, "x"), "File too large"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "No space left on device"),
        (RuntimeError("basic_ios::clear: iostream error"), "No space left on device"),
        (OSError("No space left on device (os error 28)"), "No space left on device"),
        (Exception("No space left on device (os error 28)"), "No space left on device"),  # tokenizers
        (RuntimeError("shapes do not agree"), None),
        (ValueError("No space left on device"), None),
        (OSError(errno.ENOENT, "x"), None),
    ],
)
def test_a_full_disk_is_known_whoever_says_so(error, reason):
    assert unwritable(error) == reason


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges folders at once")
def test_a_folder_that_is_replaced_is_there_at_every_moment(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    monkeypatch.setattr(Path, "rename", None)  # two of them would leave a moment between
    with written_beside(tmp_path / "out") as partial:
        (partial / "new").touch()
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/new"]

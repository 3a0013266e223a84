"""What a merge may replace, and that two of them never write to one place."""

from __future__ import annotations

import os

import pytest

from qalora.base.registry import resolve
from qalora.deploy import export, merging
from qalora.errors import InputError


@pytest.fixture
def write(save_tiny_llama, tmp_path):
    """write("merge" or "export", output, **more), of an adapter that is read after the folder was checked."""
    source = resolve(str(save_tiny_llama(tmp_path / "base")))
    (tmp_path / "adapter").mkdir()

    def call(kind: str, output, **more):
        if kind == "merge":
            return merging.merge(source, tmp_path / "adapter", output, quantization=None, **more)
        return export.export_adapter(tmp_path / "adapter", output_dir=output, format="peft", source=source, **more)

    return call


@pytest.mark.parametrize("kind", ["merge", "export"])
def test_a_folder_with_folders_or_the_current_one_is_no_merge_to_replace(write, tmp_path, monkeypatch, kind):
    project = tmp_path / "project"
    (project / ".git").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds the folder \.git, which no merge wrote"):
        write(kind, project, overwrite=True)
    (project / ".git").rmdir()
    (project / "notes.txt").touch()
    monkeypatch.chdir(project)
    with pytest.raises(InputError, match=r"the current folder, and a merge replaces the whole"):
        write(kind, ".", overwrite=True)
    assert [path.name for path in project.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("kind", ["merge", "export"])
def test_two_writers_to_one_place_never_mix(write, tmp_path, monkeypatch, kind):
    def meanwhile(*args):
        for other in ("merge", "export"):
            with pytest.raises(InputError, match=rf"out: in use by process {os.getpid()} on "):
                write(other, tmp_path / "new" / "out")
        raise ZeroDivisionError

    monkeypatch.setattr(merging if kind == "merge" else export, "read_adapter", meanwhile)
    with pytest.raises(ZeroDivisionError):
        write(kind, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()

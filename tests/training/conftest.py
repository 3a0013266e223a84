"""Rows in a file and a recipe over a saved tiny LLaMA, for the parts of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from qalora.recipe import make_recipe
from qalora.training.checkpoints import SECTIONS, write_manifest
from qalora.training.identity import Identity, Rows

TINY_ROWS = 24


@pytest.fixture(scope="session")
def checkpoint():
    """make(folder, step, …) → a checkpoint as `Trainer` and this package write it, with tensors of no meaning."""

    def make(
        folder: Path, step: int, best: int | None = None, losses=(1.0,), run: str = "one", kind: str = "loss"
    ) -> Path:
        path = folder / f"checkpoint-{step}"
        path.mkdir(parents=True)
        history = [{"step": i, kind: loss} for i, loss in enumerate(losses)]
        state = {"global_step": step, "log_history": history, "best_global_step": best}
        (path / "trainer_state.json").write_text(json.dumps(state))
        (path / "recipe.yaml").write_text(yaml.safe_dump({name: {"a": 1} for name in SECTIONS}))
        (path / "allocation.jsonl").write_text('{"step": 2, "ranks": {}}\n')
        (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        save_file({"A": torch.ones(4, 8)}, path / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"a": torch.ones(50)}, path / name)
        rows = Rows((b"12345678",), (b"abcdefgh",), "v")
        Identity("m", "f", 12, 2, {"a": 2}, rows, run=run).write(path)
        write_manifest(path)
        return path

    return make


@pytest.fixture(scope="session")
def saved_base(save_tiny_llama, tmp_path_factory):
    """A folder with a tiny LLaMA of 64 positions."""
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "tiny", max_position_embeddings=64)


@pytest.fixture
def recipe_over(saved_base, tmp_path):
    """make(**settings by dotted name) → a recipe over the saved base and 24 rows."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i} ", "completion": "x" * (1 + i)}) + "\n" for i in range(TINY_ROWS))
    )

    def make(**settings):
        own = {
            "model": str(saved_base),
            "data.train": str(rows),
            "data.val_set_size": 8,
            "output_dir": str(tmp_path / "run"),
        }
        return make_recipe([*(own | settings).items()], origin="a test")

    return make

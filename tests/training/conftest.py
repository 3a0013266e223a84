"""Rows in a file and a recipe over a saved tiny LLaMA, for the parts of a run."""

from __future__ import annotations

import json

import pytest

from qalora.recipe import make_recipe

TINY_ROWS = 24


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

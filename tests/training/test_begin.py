"""What stands once a run has begun: the folder, the adapter, the figures before the first step."""

from __future__ import annotations

import json

import pytest
import torch

from qalora.adapter.model import gated_layers
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import resolve
from qalora.recipe import load_recipe
from qalora.training.begin import begin, figures_of
from qalora.training.identity import read_identity
from qalora.training.rows import load_data
from qalora.training.run import resolve_run


@pytest.fixture
def begun(recipe_over, tmp_path):
    """make(**settings) → (its Run, its Session, the lines that were said)."""

    def make(**settings):
        recipe = recipe_over(**{"training.max_steps": 2, "quantization.bnb_4bit_compute_dtype": "float32", **settings})
        source = resolve(recipe.model)
        tokenizer = load_tokenizer(source)
        run = resolve_run(
            recipe, source, tokenizer, load_data(recipe, tokenizer), tmp_path / "run", command=["--a", "b"]
        )
        said: list[str] = []
        return run, begin(run, said.append, said.append), said

    return make


def test_the_folder_says_what_the_run_is_made_of(begun):
    run, session, said = begun(**{"evaluation.before": False, "lora.r": 4})
    folder = run.output_dir
    assert load_recipe(folder / "recipe.yaml").model_dump() == run.recipe.model_dump()
    assert (folder / "recipe.yaml").read_text().startswith("# qalora finetune --a b\n")
    identity = read_identity(folder)
    assert identity is not None and identity.ranks == session.start and set(session.start.values()) == {4}
    assert (identity.rows, identity.base, identity.steps) == (run.data.rows, run.weights, 2)
    assert session.metrics == {} and not (folder / "metrics.json").exists()
    assert any("what ends an answer" in line and "'</s>'" in line for line in said)


def test_the_adapter_alone_is_trained_and_points_where_the_start_says(begun):
    run, session, _ = begun(**{"evaluation.before": False})
    layers = gated_layers(session.model)
    trained = {id(parameter) for parameter in session.model.parameters() if parameter.requires_grad}
    assert trained == {id(matrix) for layer in layers.values() for matrix in (layer.A, layer.B)}
    assert run.recipe.lora.init == "quantization" and any(bool(layer.B.any()) for layer in layers.values())


def test_the_loss_before_training_is_that_of_the_base(begun, saved_base):
    run, session, _ = begun(**{"lora.init": "kaiming"})  # B is zero: the adapter changes nothing
    base = load_base(str(saved_base), dtype="float32").model
    summed = tokens = 0.0
    for item in run.data.validation.items:
        ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            summed += float(base(input_ids=ids, labels=labels).loss) * count
        tokens += count
    assert session.metrics["before"]["loss"] == pytest.approx(summed / tokens, rel=1e-5)
    assert json.loads((run.output_dir / "metrics.json").read_text()) == session.metrics


def test_figures_of_a_run_count_only_once_it_is_finished(tmp_path):
    assert figures_of(tmp_path) == {}
    (tmp_path / "metrics.json").write_text('{"train": {"steps": 3}}')
    assert figures_of(tmp_path) == {}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert figures_of(tmp_path) == {"train": {"steps": 3}}

"""A run is resolved once: nothing is left open in its recipe, what cannot be done is refused, and the recipe that was
given stays."""

from __future__ import annotations

import dataclasses

import pytest

from qalora.base.fingerprint import fingerprint
from qalora.base.loading import load_tokenizer
from qalora.base.registry import resolve
from qalora.errors import InputError
from qalora.training.identity import Identity
from qalora.training.resume import Continued
from qalora.training.rows import load_data
from qalora.training.run import resolve_run


@pytest.fixture
def resolved(recipe_over, tmp_path):
    """make(continued, **settings) → (the recipe, its Run)."""

    def make(continued=None, **settings):
        recipe = recipe_over(**settings)
        source = resolve(recipe.model)
        tokenizer = load_tokenizer(source)
        known = None if continued is None or continued.identity is None else continued.identity.rows
        data = load_data(recipe, tokenizer, known=known)
        return recipe, resolve_run(recipe, source, tokenizer, data, tmp_path / "run", continued)

    return make


@pytest.fixture
def checkpoint(tmp_path):
    """make(recipe, step, identity) → a checkpoint of it, as far as resolving looks at it."""

    def make(recipe, step, identity):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "allocation.jsonl").write_text('{"step": 2}\n')
        return Continued(folder, step, recipe.model_dump(mode="json"), identity)

    return make


def test_nothing_is_left_open_and_the_recipe_stays(resolved):
    recipe, run = resolved(
        **{"training.max_steps": 6, "allocation.rounds": 2, "allocation.warmup": 2, "allocation.interval": 2}
    )
    assert run.recipe.quantization.bnb_4bit_compute_dtype != "auto" and run.recipe.lora.init == "quantization"
    assert (recipe.quantization.bnb_4bit_compute_dtype, recipe.lora.init) == ("auto", "auto")
    assert (run.total_steps, run.steps_per_epoch, run.rounds.steps) == (6, 1, (2, 4))
    assert run.original is not None and run.weights == fingerprint(run.source)
    assert any("6 optimizer steps, 1 an epoch; rounds of allocation after steps [2, 4]" in note for note in run.notes)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.recipe = recipe


def test_packed_rows_are_its_items(resolved):
    _, run = resolved(**{"data.packing": True, "data.max_seq_len": 64})
    assert sum(len(item["input_ids"]) for item in run.items) == sum(
        len(item["input_ids"]) for item in run.data.train.items
    )
    assert len(run.items) < len(run.data.train.items)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"allocation.prune_per_round": 112, "allocation.rounds": 1}, "allocation.prune_per_round=112"),
        ({"allocation.rounds": 1, "training.max_steps": 1}, "no room for a round"),
        ({"training.lr_scheduler_kwargs": {"no_such": 1}}, "no_such"),
    ],
)
def test_what_cannot_be_done_is_refused(resolved, settings, named):
    with pytest.raises(InputError, match=named):
        resolved(**{"training.max_steps": 6, **settings})


def test_a_continued_run_has_no_more_rounds_than_it_began_with(resolved, checkpoint):
    settings = {"training.max_steps": 6, "allocation.warmup": 2, "allocation.interval": 2}
    recipe, first = resolved(**settings, **{"allocation.rounds": 2})
    identity = Identity(recipe.model, first.weights, 6, 2, {"a": 8}, first.data.rows)
    _, run = resolved(checkpoint(recipe, 3, identity), **settings)
    assert run.recipe.allocation.rounds == 2 and run.rounds.steps == (2, 4)
    assert run.original is None and not run.other_rows and not run.other_validation
    _, over = resolved(checkpoint(recipe, 6, identity), **settings)
    assert any("nothing is left to train" in line for line in over.warnings)


def test_another_base_or_other_rows_than_the_checkpoints(resolved, checkpoint, tmp_path):
    settings = {"training.max_steps": 6, "allocation.rounds": 0}
    recipe, first = resolved(**settings)
    other = Identity(recipe.model, "another", 6, 0, {"a": 8}, first.data.rows)
    with pytest.raises(InputError, match="are not those of"):
        resolved(checkpoint(recipe, 3, other), **settings)
    same = Identity(recipe.model, first.weights, 6, 0, {"a": 8}, first.data.rows)
    _, run = resolved(checkpoint(recipe, 4, same), **settings, **{"data.max_rows": 20})
    assert run.other_rows and any("other training rows than before" in line for line in run.warnings)

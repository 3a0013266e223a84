"""What a model, an adapter, a checkpoint or a memory decides of a recipe, which itself stays what it was."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from qalora.adapter.model import attach, save_adapter
from qalora.base import device
from qalora.base.loading import load_base
from qalora.base.registry import resolve, shape_of
from qalora.errors import InputError
from qalora.training.planning import planner
from qalora.training.resume import Continued
from qalora.training.settling import as_it_began, check_targets, fitted_to_device, settled, with_dtype, with_its_own


@pytest.fixture
def unchanged():
    """check(recipe, settle) → what `settle` gives, once the recipe has been seen to be what it was."""

    def check(recipe, settle):
        before = recipe.model_dump()
        after = settle(recipe)
        assert recipe.model_dump() == before
        return after

    return check


def test_a_recipe_is_frozen(recipe_over):
    recipe = recipe_over()
    for section in (recipe, recipe.data, recipe.training):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, next(iter(type(section).model_fields)), None)


def test_rows_are_cut_at_the_models_positions(recipe_over, unchanged):
    recipe = recipe_over(**{"data.max_seq_len": 100})
    after, notes = unchanged(recipe, lambda recipe: settled(recipe, resolve(recipe.model)))
    assert after.data.max_seq_len == 64 and len(notes) == 1 and "64 positions" in notes[0]
    assert after.model_dump(exclude={"data"}) == recipe.model_dump(exclude={"data"})
    short = recipe_over(**{"data.max_seq_len": 64})
    assert settled(short, resolve(short.model)) == (short, [])


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"lora.target_modules": "nothing.*"}, "nothing"), ({"lora.layers_to_transform": [2]}, "layers_to_transform")],
)
def test_targets_that_the_model_has_not(recipe_over, settings, named):
    recipe = recipe_over(**settings)
    with pytest.raises(InputError, match=named):
        check_targets(recipe, resolve(recipe.model))
    check_targets(recipe_over(), resolve(recipe.model))


def test_an_adapter_brings_its_ranks(recipe_over, unchanged, saved_base, randomize_B, tmp_path):
    model = randomize_B(attach(load_base(str(saved_base)).model, r=3, alpha=6, target_modules=["q_proj", "v_proj"]))
    save_adapter(model, tmp_path / "given")
    given = {"lora.adapter": str(tmp_path / "given")}
    after = unchanged(recipe_over(**given), with_its_own)
    assert (after.lora.r, after.lora.alpha, set(after.lora.target_modules)) == (3, 6, {"q_proj", "v_proj"})
    with pytest.raises(InputError, match=r"lora.r=8: the adapter .* has 3"):
        with_its_own(recipe_over(**given, **{"lora.r": 8}))
    plain = recipe_over()
    assert with_its_own(plain) is plain


def test_a_continued_run_keeps_what_its_beginning_chose(recipe_over, unchanged, tmp_path):
    chosen = {
        "lora.init": "gradient",
        "quantization.bnb_4bit_compute_dtype": "float32",
        "training.micro_batch_size": 2,
        "training.gradient_accumulation_steps": 8,
        "training.gradient_checkpointing": "offload",
    }
    begun = recipe_over(**chosen).model_dump(mode="json")
    continued = Continued(tmp_path / "checkpoint-3", 3, begun, None)
    after = unchanged(recipe_over(**{"training.fit": "auto"}), lambda recipe: as_it_began(recipe, continued))
    for name, value in chosen.items():
        section, setting = name.split(".")
        assert getattr(getattr(after, section), setting) == value, name
    with pytest.raises(InputError, match="one follows"):
        as_it_began(recipe_over(**{"training.lr_scheduler_type": "greedy"}), continued)
    with pytest.raises(InputError, match="lora.r is 4"):
        as_it_began(recipe_over(**{"lora.r": 4, "lora.alpha": 8}), continued)


def test_a_fit_keeps_the_rows_of_a_step_and_stays_within_the_memory(recipe_over, unchanged, saved_base, monkeypatch):
    shape = shape_of(resolve(str(saved_base)))
    recipe = recipe_over(**{"training.fit": "auto", "data.max_seq_len": 64})
    device_now = device.device_kind()
    whole = planner(recipe.with_settings({"training.micro_batch_size": 16}), shape, device_now)().total
    monkeypatch.setattr(device, "available_memory", lambda: whole)
    after, notes = unchanged(recipe, lambda recipe: fitted_to_device(recipe, shape, 64))
    training = after.training
    assert training.micro_batch_size * training.gradient_accumulation_steps == 16
    assert planner(after, shape, device_now)(seq_len=64).total <= 0.92 * whole
    assert f"training.micro_batch_size={training.micro_batch_size}" in notes[0]
    monkeypatch.setattr(device, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match="one row of 64 tokens"):
        fitted_to_device(recipe, shape, 64)


def test_block_inputs_that_host_memory_has_no_room_for_are_refused(recipe_over, saved_base, monkeypatch):
    shape = shape_of(resolve(str(saved_base)))
    recipe = recipe_over(**{"training.gradient_checkpointing": "offload", "training.micro_batch_size": 4})
    waiting = shape.num_hidden_layers * 4 * 64 * shape.hidden_size * 4  # of blocks, rows, tokens, features in fp32
    recipe = recipe.with_settings({"quantization.bnb_4bit_compute_dtype": "float32"})
    monkeypatch.setattr(device, "device_kind", lambda: "cuda")
    monkeypatch.setattr(device, "available_memory", lambda: 80 * 2**30)
    monkeypatch.setattr(device, "host_memory", lambda: 2 * waiting)
    assert fitted_to_device(recipe, shape, 64)[0].training.gradient_checkpointing == "offload"
    monkeypatch.setattr(device, "host_memory", lambda: waiting)  # of which a share stays free
    with pytest.raises(InputError, match=r"gradient_checkpointing=offload: the block inputs of 4 × 64 tokens need"):
        fitted_to_device(recipe, shape, 64)


def test_auto_becomes_a_dtype(recipe_over, unchanged):
    after = unchanged(recipe_over(), with_dtype)
    assert after.quantization.bnb_4bit_compute_dtype in ("bfloat16", "float32", "float16")
    same = recipe_over(**{"quantization.bnb_4bit_compute_dtype": "float32"})
    assert with_dtype(same).model_dump() == same.model_dump()

"""A recipe's memory plan against `plan_memory` called by hand, and what fits a memory."""

from __future__ import annotations

import pytest

from qalora.base.registry import MODELS
from qalora.errors import InputError
from qalora.fitting import HEADROOM
from qalora.memory import plan_memory
from qalora.recipe import load_recipe
from qalora.training.planning import decided_by_fit, first_ranks, fitted, limits, planner

SHAPE = MODELS["llama-7b"][1]


def recipe(**settings):
    return load_recipe("alpaca", {"model": "llama-7b", **settings})


def test_the_plan_has_every_setting_of_the_recipe():
    settings = {
        "training.micro_batch_size": 3,
        "training.gradient_accumulation_steps": 5,
        "training.optim": "paged_adamw_8bit",
        "training.gradient_checkpointing": "selective",
        "training.mlp_tile": 256,
        "data.max_seq_len": 300,
        "lora.r": 4,
        "lora.alpha": 8,
        "lora.dropout": 0.1,
        "lora.init": "gradient",
        "quantization.bnb_4bit_use_double_quant": False,
        "quantization.bnb_4bit_compute_dtype": "float16",
    }
    by_hand = plan_memory(
        SHAPE, ranks=dict.fromkeys(SHAPE.linear_maps(), 4), micro_batch_size=3, gradient_accumulation_steps=5,
        seq_len=300, load_in_4bit=True, double_quant=False, compute_dtype="float16", optim="paged_adamw_8bit",
        gradient_checkpointing="selective", mlp_tile=256, dropout=0.1, directions=4, device="cuda",
    )  # fmt: skip
    assert planner(recipe(**settings), SHAPE)() == by_hand


def test_first_ranks_are_those_of_the_targets():
    ranks = first_ranks(recipe(**{"lora.target_modules": ["q_proj"], "lora.layers_to_transform": [0, 31]}), SHAPE)
    assert ranks == {f"model.layers.{block}.self_attn.q_proj": 8 for block in (0, 31)}
    with pytest.raises(InputError):
        first_ranks(recipe(**{"lora.target_modules": "nothing"}), SHAPE)


@pytest.mark.parametrize("gib", [6, 8, 24])
def test_what_is_fitted_fits_with_the_same_rows_a_step(gib):
    asked = recipe()
    found, fits = fitted(asked, SHAPE, gib << 30)
    assert fits and planner(found, SHAPE)().total <= HEADROOM * (gib << 30)
    decided = decided_by_fit(found)
    assert decided["micro_batch_size"] * decided["gradient_accumulation_steps"] == 16
    assert found.with_settings({f"training.{k}": v for k, v in decided_by_fit(asked).items()}) == asked


def test_where_nothing_fits_it_is_what_needs_least():
    found, fits = fitted(recipe(), SHAPE, 1 << 30)
    assert not fits
    assert decided_by_fit(found)["micro_batch_size"] == 1 and found.training.gradient_checkpointing == "offload"


def test_limits_are_the_last_that_fit():
    card, plan = 8 << 30, planner(recipe(), SHAPE)
    most = limits(plan, card)
    rows = most["largest_micro_batch_size"]
    assert plan(micro_batch_size=rows).total <= HEADROOM * card < plan(micro_batch_size=rows + 1).total

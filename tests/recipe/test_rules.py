from __future__ import annotations

import pytest

from qalora.errors import InputError
from qalora.recipe import make_recipe
from qalora.recipe.reading import with_preset

MINIMAL = [("model", "tiny"), ("data.train", "rows.jsonl")]


def build(*settings, **more):
    return make_recipe([*MINIMAL, *with_preset([*settings, *more.items()])], origin="test")


def refusal(*settings):
    with pytest.raises(InputError) as error:
        build(*settings)
    return str(error.value)


def test_all_disagreements_at_once():
    with pytest.raises(InputError) as error:
        make_recipe([("training.warmup_steps", 30), ("training.warmup_ratio", 0.1)], origin="test")
    for part in ("model is missing", "data.train is missing", "training.warmup_steps=30"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([("data.val_set_size", 0)], "no validation rows: set data.validation"),
        (
            [("training.warmup_steps", 30), ("training.warmup_ratio", 0.1)],
            "training.warmup_steps=30 and training.warmup_ratio=0.1 say the same thing twice",
        ),
        (
            [("training.save_steps", 1.5)],
            "training.save_steps=1.5: a number of steps is whole, a share of the run is below 1",
        ),
        (
            [("training.lr_scheduler_type", "greedy"), ("training.eval_strategy", "no")],
            "training.lr_scheduler_type=greedy follows the validation loss, and training.eval_strategy=no takes none",
        ),
        (
            [("lora.target_modules", "(q|v")],
            "lora.target_modules='(q|v': no regular expression (missing ), unterminated",
        ),
        ([("lora.layers_to_transform", [])], "lora.layers_to_transform=[]: name blocks by their numbers, from 0 on"),
        ([("lora.layers_to_transform", -1)], "name blocks by their numbers, from 0 on"),
        ([("training.max_steps", 0)], "training.max_steps=0"),
        ([("data.train", "$NO_SUCH_PLACE/rows")], "data.train='$NO_SUCH_PLACE/rows': $NO_SUCH_PLACE is not set"),
        ([("allocation.start", "gradient")], "allocation.start='gradient': input should be 'even' or 'scores'"),
        (
            [("allocation.start", "scores"), ("lora.init", "gradient")],
            "allocation.start=scores chooses among the ranks of lora.init=quantization, and lora.init is gradient",
        ),
        (
            [("lora.init", "quantization"), ("quantization.load_in_4bit", False)],
            "lora.init=quantization gives back what 4 bits took, and quantization.load_in_4bit is false",
        ),
        (
            [("allocation.start", "scores"), ("quantization.load_in_4bit", False)],
            "allocation.start=scores gives back what 4 bits took, and quantization.load_in_4bit is false",
        ),
        ([("allocation.max_rank", 4)], "lora.r=8 must lie between allocation.min_rank=0 and max_rank=4"),
        ([("allocation.min_rank", 9)], "allocation.min_rank=9 is above lora.r=8"),
        ([("lora.r", 12), ("lora.alpha", 16)], "make alpha a multiple of r, e.g. lora.alpha=24"),
        (
            [("lora.r", 12), ("allocation.rounds", 0), ("allocation.start", "scores")],
            "make alpha a multiple of r, e.g. lora.alpha=24",
        ),
        ([("allocation.warmup", 1.5)], "allocation.warmup=1.5: give optimizer steps (20), a share"),
        ([("allocation.interval", "soon")], "allocation.interval='soon': give optimizer steps"),
        ([("training.learning_rate", 0)], "training.learning_rate=0: input should be greater than 0"),
        (
            [("training.gradient_accumulation_steps", 0)],
            "gradient_accumulation_steps=0: input should be greater",
        ),
    ],
    ids=lambda value: "-".join(key for key, _ in value) if isinstance(value, list) else "",
)
def test_settings_that_are_refused(settings, message):
    assert message in refusal(*settings)


def test_any_scaling_goes_without_allocation():
    assert build(("lora.r", 12), ("allocation.rounds", 0)).lora.alpha == 16

"""The rate of every step, against transformers' own schedules as a user of TrainingArguments gets them."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from qalora.errors import InputError
from qalora.recipe import load_recipe
from qalora.recipe.settings import Schedule
from qalora.training import trainer
from qalora.training.rates import check_schedule, warmup_of

STEPS = 20
SETTINGS = {
    "linear": {},
    "cosine": {"num_cycles": 1.5},
    "cosine_with_restarts": {"num_cycles": 3},
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    "polynomial": {"power": 2.0, "lr_end": 1e-6},
    "inverse_sqrt": {"timescale": 4},
    "warmup_stable_decay": {"num_decay_steps": 6, "decay_type": "1-sqrt", "min_lr_ratio": 0.05},
    "constant": {},
    "constant_with_warmup": {},
    "reduce_lr_on_plateau": {"factor": 0.5, "patience": 1},
    "greedy": {"factor": 0.9, "patience": 1, "min_lr": 1e-6},
}


def recipe_of(*settings: tuple[str, object]):
    return load_recipe("alpaca", [("model", "m"), *((f"training.{name}", value) for name, value in settings)])


def rates(arguments: TrainingArguments) -> list[float]:
    """Of STEPS steps, with a validation after each: losses that fall, and fall no more."""
    model = nn.Linear(2, 2)
    found = Trainer(model=model, args=arguments, eval_dataset=[{}])
    found.create_optimizer_and_scheduler(STEPS)
    result = []
    for step in range(STEPS):
        result.append(found.optimizer.param_groups[0]["lr"])
        found.optimizer.step()
        follows = arguments.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        found.lr_scheduler.step(*([max(3.0 - step, 1.0)] if follows else []))
    return result


def test_every_schedule_of_transformers_can_be_asked_for():
    assert {kind.value for kind in SchedulerType} <= set(typing.get_args(Schedule)) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_rates_are_those_of_transformers(name, tmp_path: Path):
    asked = [
        ("lr_scheduler_type", name),
        ("lr_scheduler_kwargs", SETTINGS[name]),
        ("learning_rate", 1e-3),
        ("warmup_steps", 4),
    ]
    recipe = recipe_of(*asked)
    trainer.check_rates(recipe, STEPS)
    ours = trainer._arguments(recipe, STEPS, torch.float32, tmp_path)
    theirs = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        report_to="none",
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=200,
        **dict(asked),
    )
    found = rates(ours)
    assert found == rates(theirs)
    assert (len(set(found)) == 1) == (name == "constant")


@pytest.mark.parametrize(
    ("ratio", "steps", "total", "warmup"),
    [(0.06, None, 100, 6), (0.06, None, 20, 2), (0.06, None, 1, 0), (0.9, None, 10, 9), (None, 7, 100, 7), (None, 0,
    100, 0),
     (None, 0.25, 100, 25), (None, 300, 100, 300), (None, None, 100, 0)],
)  # fmt: skip
def test_steps_of_the_warm_up(ratio, steps, total, warmup):
    assert warmup_of(total, ratio=ratio, steps=steps) == warmup


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("cosine_with_min_lr", {}, "One of min_lr or min_lr_rate should be set"),
        ("cosine_with_min_lr", {"min_lr": 1e-6, "min_lr_rate": 0.1}, "Only one of min_lr or min_lr_rate"),
        (
            "cosine_with_min_lr",
            {"min_lr_ratio": 0.1},
            "takes num_cycles, min_lr, min_lr_rate, and not min_lr_ratio; leave",
        ),
        ("cosine_with_min_lr", {"min_lr": "low"}, "takes num_cycles, min_lr, min_lr_rate; unsupported operand"),
        ("polynomial", {"lr_end": 1.0}, "lr_end"),
        ("polynomial", {"power": "two"}, "takes lr_end, power; "),
        ("linear", {"min_lr": 1e-6}, "linear takes none, and not min_lr; leave that out"),
        ("constant", {"min_lr": 1e-6}, "constant takes none, and not min_lr"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "square"}, "Unknown decay type: square"),
        ("linear", {"num_warmup_steps": 3}, "and not num_warmup_steps"),
        ("reduce_lr_on_plateau", {"factor": 2.0}, "Factor should be < 1.0"),
        ("greedy", {"patiance": 2}, "and not patiance"),
    ],
)
def test_settings_that_a_schedule_does_not_take(name, settings, says):
    with pytest.raises(InputError) as error:
        check_schedule(name, settings, rate=1e-3, warmup=2, total_steps=STEPS)
    assert says in str(error.value) and str(error.value).startswith("training.lr_scheduler_kwargs")


@pytest.mark.parametrize(
    ("strategy", "steps", "between"),
    [("steps", 7, 7), ("steps", 0.1, 4), ("steps", 0.5, 20), ("epoch", 7, 9), ("no", 7, 39), ("best", 7, 39)],
)
def test_steps_between_validations_and_checkpoints(strategy, steps, between):
    assert trainer.steps_between(strategy, steps, total_steps=39, steps_per_epoch=9) == between


def test_validations_and_checkpoints_need_not_meet(tmp_path):
    arguments = trainer._arguments(recipe_of(("eval_steps", 20), ("save_steps", 30)), 100, torch.float32, tmp_path)
    assert (arguments.eval_steps, arguments.save_steps, arguments.load_best_model_at_end) == (20, 30, True)
    for never in ("eval_strategy", "save_strategy"):
        assert not trainer._arguments(recipe_of((never, "no")), 100, torch.float32, tmp_path).load_best_model_at_end

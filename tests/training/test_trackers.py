"""Experiment trackers: those of transformers and no others, missing ones by name, and what two of them write without a
network."""

from __future__ import annotations

import typing
from importlib.util import find_spec

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qalora.errors import InputError
from qalora.recipe.settings import Tracker
from qalora.training.trackers import MODULES, check_reporting

NAMES = typing.get_args(Tracker)


def test_the_trackers_are_those_of_transformers():
    assert sorted(NAMES) == sorted(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"kubeflow"}))
def test_a_missing_package_is_named_with_what_installs_it(name, capsys):
    if any(find_spec(module) for module in MODULES.get(name, (name,))):
        pytest.skip(f"{name} is installed")
    package = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}.get(name, name)
    with pytest.raises(InputError, match=f"report_to={name}: .*pip install {package}"):
        check_reporting([name])
    assert capsys.readouterr().err == ""


def test_a_tracker_that_its_environment_does_not_let_begin_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    with pytest.raises(InputError, match=r"report_to=kubeflow: .*KUBEFLOW_TRAINER_SERVER_URL"):
        check_reporting(["kubeflow"])


def trained(recipe_over, tracker):
    """The run folder after two steps that were reported to a tracker."""
    from qalora import finetune

    settings = {
        "training.report_to": [tracker],
        "training.max_steps": 2,
        "training.eval_steps": 2,
        "logging.steps": 1,
        "logging.quiet": True,
        "allocation.rounds": 0,
        "evaluation.rows": 1,
        "evaluation.before": False,
    }
    recipe = recipe_over(**settings)
    finetune(recipe)
    return recipe


def test_tensorboard_has_the_loss_of_every_step(recipe_over, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(recipe_over, "tensorboard")
    files = list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert files
    found = EventAccumulator(str(files[0].parent))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in found.Scalars("eval/loss")][-1] == 2


def test_trackio_keeps_the_losses_on_this_machine(recipe_over, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    trained(recipe_over, "trackio")
    (database,) = (tmp_path / "trackio").glob("*.db")
    assert b"train/loss" in database.read_bytes()

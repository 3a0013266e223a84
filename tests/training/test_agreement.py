"""What several processes must have alike. tests/test_processes.py tries it in a launch."""

from __future__ import annotations

import pytest
import torch

from qalora import processes
from qalora.errors import InputError
from qalora.training import agreement, identity


@pytest.fixture
def beside(monkeypatch):
    """set(**values) → another process has the same values but for these."""

    def set_(**values):
        monkeypatch.setattr(processes, "exchange", lambda own: [own, own | values])

    return set_


def test_a_device_that_several_processes_do_not_train_on_is_refused(monkeypatch):
    monkeypatch.setattr("qalora.base.device.best_device", lambda: torch.device("xpu", 0))
    agreement.check_device()
    monkeypatch.setattr(processes, "_group", processes.Group(0, 2))
    with pytest.raises(InputError, match="CUDA devices or on CPUs, and this one has xpu"):
        agreement.check_device()


def test_a_setting_that_differs_is_named(recipe_over, beside):
    recipe = recipe_over()
    beside()
    agreement.check_recipes(recipe)
    beside(**{"training.learning_rate": 1.0})
    with pytest.raises(InputError, match="the recipe: process 0 and process 1 differ in training.learning_rate;"):
        agreement.check_recipes(recipe)


def test_places_may_differ_and_nothing_else(recipe_over, monkeypatch):
    """Where a node keeps the base and the rows is its own business."""
    seen = []
    monkeypatch.setattr(processes, "exchange", lambda own: seen.append(own) or [own])
    for settings in ({}, {"model": "elsewhere", "output_dir": "there", "data.train": "rows.csv"}):
        agreement.check_recipes(recipe_over(**settings))
    assert seen[0] == seen[1]
    assert {"lora.r", "training.optim", "quantization.bnb_4bit_quant_type", "merge"} <= seen[0].keys()


def test_another_base_is_found(beside):
    beside()
    agreement.check_bases("a")
    beside(**{"the weights": "b"})
    with pytest.raises(InputError, match="the base: process 0 and process 1 differ in the weights"):
        agreement.check_bases("a")


def test_a_folder_that_this_node_does_not_see_is_refused(tmp_path, monkeypatch):
    (tmp_path / identity.FILE).touch()
    agreement.check_folder(tmp_path)
    monkeypatch.setattr(agreement, "LATE", 0.2)
    with pytest.raises(InputError, match="elsewhere: what process 0 writes there is not there for this process"):
        agreement.check_folder(tmp_path / "elsewhere")


@pytest.mark.parametrize(("size", "said"), [(1, 0), (6, 0), (7, 1)])
def test_processes_without_rows_are_told_of(monkeypatch, size, said):
    monkeypatch.setattr(processes, "_group", processes.Group(0, size))
    lines = agreement.idle(3, 2)
    assert len(lines) == said
    assert all(f" = 6: the rows of a step leave {size - 6} of {size} processes without any" in line for line in lines)

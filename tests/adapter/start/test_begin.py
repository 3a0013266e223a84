"""Where ranks begin: what each start needs, and what it leaves."""

from __future__ import annotations

import pytest
import torch

from qalora.adapter.model import gated_layers, ranks
from qalora.adapter.start.begin import device_of, start, starting_rows
from qalora.errors import InputError

ROWS = [{"input_ids": [5, 6, 7, row + 8], "labels": [-100, 6, 7, row + 8]} for row in range(6)]


@pytest.fixture
def model(tiny_llama):
    from qalora.adapter.model import attach

    return attach(tiny_llama(), r=2, alpha=4, seed=1)


def test_kaiming_leaves_the_adapter_as_it_was_born(model):
    before = [layer.A.clone() for layer in gated_layers(model).values()]
    assert start(model, ROWS, "kaiming") is None
    assert all(torch.equal(a, layer.A) for a, layer in zip(before, gated_layers(model).values(), strict=True))


def test_the_gradient_turns_A_and_leaves_B_zero_the_same_for_a_seed(model):
    start(model, ROWS, "gradient", seed=3)
    first = [layer.A.clone() for layer in gated_layers(model).values()]
    assert not any(layer.B.any() for layer in gated_layers(model).values())
    start(model, ROWS, "gradient", seed=3)
    for a, layer in zip(first, gated_layers(model).values(), strict=True):
        torch.testing.assert_close(layer.A, a)


def test_shares_by_scores_keep_the_budget_and_are_recorded(model):
    plain = dict(model.get_base_model().named_parameters())
    start_ranks = ranks(model)

    def original(name: str) -> torch.Tensor:
        weight = next(value for key, value in plain.items() if key.startswith(name) and "lora" not in key)
        return weight.detach() + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    record, scores = start(model, ROWS, "quantization", original=original, share="scores", budget="ranks")
    assert record["step"] == 0 and record["total_rank"] == sum(ranks(model).values()) <= sum(start_ranks.values())
    assert scores["method"] == "midpoint" and {len(values) for values in scores["importance"].values()} == {4}


def test_what_a_start_lacks_is_said(model):
    with pytest.raises(InputError, match="original is missing"):
        start(model, ROWS, "quantization")
    with pytest.raises(InputError, match="share='scores' chooses among corrections"):
        start(model, ROWS, "gradient", share="scores")


def test_rows_are_drawn_once_each_and_by_seed():
    drawn = starting_rows(range(10), 4, seed=1)
    assert len(set(drawn)) == 4 and drawn == starting_rows(range(10), 4, seed=1) != starting_rows(range(10), 4, seed=2)
    assert sorted(starting_rows(range(3), 9, seed=1)) == [0, 1, 2]


def test_the_device_is_that_of_the_adapter(model):
    assert device_of(model) == torch.device("cpu")

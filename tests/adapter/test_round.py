"""What `auto` may spend, counted in tokens; budgets; the sharing out before the first step."""

from __future__ import annotations

import pytest
import torch

from qalora.adapter.allocation import plan, share_by_gain
from qalora.adapter.gradient_start import expected_gains, gradient_directions
from qalora.adapter.model import gated_layers, rank_parameters, ranks
from qalora.adapter.round import RoundSettings, allocation_round, share_out_start


@pytest.fixture
def run_round(tiny_adapter, make_batch):
    """run(step, spent, **settings) → the record of one round on a fresh adapter of 56 ranks; B_val has 48 tokens."""

    def run(step: int, spent: float = 0.0, **more):
        settings = dict(
            budget=56, prune=14, scoring="auto", importance="sum", min_rank=0, max_rank=None, seed=0, step_tokens=480.0
        )
        model = tiny_adapter(r=4)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        return allocation_round(model, optimizer, [make_batch()], RoundSettings(**{**settings, **more}), step, spent)

    return run


def test_auto_stays_within_three_percent_of_the_training_so_far(run_round):
    """A step is 3 · 480 / 48 = 30 forwards of B_val, of which 0.9 are allowed."""
    first, _ = run_round(step=10)  # 9 forwards: first order, and nothing else
    assert (first["forward_equivalents"], first["exact_evaluations"], first["certified"]) == (6, 0, False)
    later, _ = run_round(step=90)  # 81
    assert later["exact_evaluations"] >= 24
    assert 6 < later["forward_equivalents"] <= 81
    spent, _ = run_round(step=90, spent=60.0)
    assert spent["forward_equivalents"] == 6


def test_auto_with_time_enough_is_certified_and_decides_as_exact_does(run_round):
    auto, scores = run_round(step=10_000)
    exact, truth = run_round(step=1, scoring="exact")
    assert auto["certified"] and exact["certified"]
    assert auto["pruned"] == exact["pruned"]
    assert plan(scores.importance, prune=14).pruned == plan(truth.importance, prune=14).pruned


def test_auto_with_path_importance_integrates(run_round):
    record, scores = run_round(step=10, importance="path")
    assert (scores.method, record["forward_equivalents"]) == ("path", 18)


def test_parameters_stay_where_they_are_allowed_to(tiny_adapter, make_batch):
    """Ranks of the wide maps of the MLP have twice the parameters of attention's, and the total rank stays at most the same."""
    model = tiny_adapter(r=4)
    start = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    settings = RoundSettings(
        budget=56, prune=14, scoring="first-order", importance="sum", min_rank=0, max_rank=None, seed=0, step_tokens=1.0,
        parameters=start,
    )  # fmt: skip
    for step in range(1, 6):
        record, _ = allocation_round(model, optimizer, [make_batch()], settings, step)
        now = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        assert record["parameters"] == now <= start
        assert record["total_rank"] <= 56


@pytest.mark.parametrize("counted", ["ranks", "parameters"])
def test_the_budget_goes_where_the_gradient_is_largest(tiny_adapter, make_batch, counted):
    model = tiny_adapter(r=4)
    for layer in gated_layers(model).values():
        layer.B.data.zero_()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    rows, ids = [make_batch(rows=3, seed=5)], make_batch()["input_ids"]
    before, even = model(ids).logits, ranks(model)
    cost = rank_parameters(model, even)
    parameters = sum(4 * n for n in cost.values()) if counted == "parameters" else None
    found = gradient_directions(model, rows, dict.fromkeys(even, 8), torch.Generator().manual_seed(0))
    gains = {name: expected_gains(of, gated_layers(model)[name].B.shape[0]) for name, of in found.items()}
    wanted = share_by_gain(gains, cost, ranks=56, parameters=parameters, least=1)
    settings = RoundSettings(
        budget=56, prune=14, scoring="auto", importance="sum", min_rank=0, max_rank=None, seed=0, step_tokens=1.0,
        parameters=parameters,
    )  # fmt: skip
    record, scores = share_out_start(model, optimizer, [make_batch()], rows, settings)
    assert (scores, record["ranks"], record["step"]) == (gains, wanted, 0)
    assert len(set(wanted.values())) > 1 and min(wanted.values()) >= 1 and max(wanted.values()) <= 8
    assert sum(wanted.values()) <= 56
    live = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in gated_layers(model).items():
        torch.testing.assert_close(layer.A.data, found[name].rows[: wanted[name]], rtol=1e-5, atol=1e-7)
        assert not layer.B.any()
        assert {id(layer.A), id(layer.B)} <= live
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-6, atol=1e-6)
    now = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert now == record["parameters"] and (parameters is None or now <= parameters)

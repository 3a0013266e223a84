"""Certificates: the pruned set is that of exhaustive ablation, or nothing is certified."""

from __future__ import annotations

import pytest
import torch

from qalora.adapter.allocation import least_important
from qalora.adapter.model import gated_layers
from qalora.adapter.scoring import score_ranks


@pytest.mark.parametrize(("importance", "min_rank"), [("sum", 0), ("sum", 1), ("drop", 1), ("alone", 0)])
def test_certified_prunes_what_exhaustive_ablation_prunes(tiny_adapter, randomize_B, make_batch, importance, min_rank):
    model, batch = randomize_B(tiny_adapter(r=4), std=0.01), [make_batch(rows=6)]
    found = score_ranks(model, batch, "certified", importance=importance, prune=14, min_rank=min_rank, budget=1e9)
    exact = score_ranks(model, batch, "exact", importance=importance)
    assert found.certified
    assert found.exact_evaluations < 56
    assert least_important(found.importance, 14, min_rank) == least_important(exact.importance, 14, min_rank)
    for name, flags in found.exact.items():
        for rank, flag in enumerate(flags):
            if flag:
                assert found.drop[name][rank] == pytest.approx(exact.drop[name][rank], abs=1e-6)
                assert found.alone[name][rank] == pytest.approx(exact.alone[name][rank], abs=1e-6)


def test_a_spent_budget_is_not_certified(tiny_adapter, make_batch):
    scores = score_ranks(tiny_adapter(r=4), [make_batch()], "certified", prune=14, budget=0)
    assert not scores.certified
    assert 24 <= scores.exact_evaluations <= 24 + 8  # the sample and the largest, and nothing more


def test_half_precision_is_ablated_in_fp32(tiny_adapter, randomize_B, make_batch):
    """In bf16 rounding is above what single ranks change; over the same weights in fp32 it is not."""
    model, batch = randomize_B(tiny_adapter(r=4, dtype=torch.bfloat16), std=0.01), [make_batch(rows=6)]
    scores = score_ranks(model, batch, "certified", prune=14, budget=1e9)
    assert scores.residual.dtype == "float32"
    assert scores.residual.noise < 0.1 * scores.residual.std
    same = randomize_B(tiny_adapter(r=4, dtype=torch.bfloat16), std=0.01)
    same.base_model.model.float()
    exact = score_ranks(same, batch, "exact")
    for name, flags in scores.exact.items():
        for rank, flag in enumerate(flags):
            if flag:
                assert scores.drop[name][rank] == pytest.approx(exact.drop[name][rank], abs=2e-6)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("planted", torch.float32), ("planted", torch.bfloat16), ("heavy tails", torch.float32)],
    ids=["planted", "planted-bf16", "heavy"],
)
def test_certificates_hold_against_ranks_that_first_order_misjudges(tiny_adapter, kind, dtype, make_batch):
    """A rank 150 times as large as the others, or sizes without a mean: whatever is certified is what exhaustive
    ablation prunes."""
    certified = 0
    for seed in range(4):
        model = tiny_adapter(r=4, dtype=dtype, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        layers = list(gated_layers(model).values())
        for layer in layers:
            layer.B.data *= 0.1
            if kind == "heavy tails":
                size = torch.tan(torch.pi * (torch.rand(4, generator=generator) - 0.5)).abs()
                layer.B.data *= size.clamp(max=150)
        if kind == "planted":
            for _ in range(2):
                at, rank = (int(torch.randint(n, (), generator=generator)) for n in (14, 4))
                layers[at].B.data[:, rank] *= 150
        batch, more = [make_batch(rows=6, seed=seed)], dict(memory=10**9)
        found = score_ranks(model, batch, "certified", prune=14, budget=1e9, seed=seed, **more)
        truth = score_ranks(model, batch, "exact", **more)
        assert least_important(found.importance, 14) == least_important(truth.importance, 14) or not found.certified, (
            seed
        )
        certified += found.certified
        for name, flags in found.exact.items():
            assert all(
                not flag or found.drop[name][k] == pytest.approx(truth.drop[name][k], abs=2e-5)
                for k, flag in enumerate(flags)
            )
    assert certified >= 3


def test_what_a_certificate_rests_on(tiny_adapter, make_batch):
    """Residuals of the random sample alone, and Wilks' limit for it; all ranks ablated leave nothing to miss."""
    model, batch = tiny_adapter(r=4), [make_batch()]
    scores = score_ranks(model, batch, "certified", prune=14, budget=0, seed=3)
    rests = scores.residual
    assert (rests.drawn, rests.dtype) == (24, "float32") and rests.std <= rests.largest
    assert (1 - rests.missed) ** 24 == pytest.approx(0.05)
    whole = score_ranks(tiny_adapter(r=1), batch, "certified", prune=3)  # 14 ranks
    assert whole.exact_evaluations == 14 and whole.certified and whole.residual.missed == 0

"""Training on after a cut, against the cut adapter trained by torch's own loop."""

from __future__ import annotations

import math

import pytest
import torch

from qalora.adapter import refit
from qalora.adapter.cutting import cut, losses
from qalora.adapter.model import gated_layers, ranks
from qalora.adapter.principal import into_basis
from qalora.adapter.refit import grouped, refitted, size_of_entries
from qalora.adapter.surgery import replace_ranks


@pytest.fixture
def some(tiny_adapter):
    """() → an adapter in its principal basis, and ranks of it that stay: none of one module, one of another, and all of
    the others."""

    def make():
        model = tiny_adapter(r=2).eval()
        into_basis(model, "svd")
        stay = {name: [0, 1] for name in ranks(model)}
        first, second = list(stay)[:2]
        del stay[first]
        stay[second] = [1]
        return model, stay

    return make


@pytest.fixture
def batches(make_batch):
    return [make_batch(rows=5, seed=1), make_batch(rows=5, seed=2)]


def test_it_is_the_cut_adapter_trained_by_adamw(some, batches):
    """Gates that are closed to ranks, on the whole adapter, are as good as no such ranks: the same steps."""
    model, stay = some()
    before = {name: (layer.A.clone(), layer.B.clone()) for name, layer in gated_layers(model).items()}
    factors = refitted(model, batches, stay, 3)
    for name, layer in gated_layers(model).items():  # the model is as it was
        assert torch.equal(layer.A, before[name][0]) and torch.equal(layer.B, before[name][1])
        assert layer.gate is None and layer.A.requires_grad
    held = losses(model, batches, stay, factors)
    cut(model, stay, factors)
    assert losses(model, batches).rows == pytest.approx(held.rows, rel=1e-5)

    theirs, stay = some()
    entries = torch.cat(
        [part.flatten() for name, own in stay.items() for part in (before[name][0][own], before[name][1][:, own])]
    )
    rate = refit.RATE * entries.square().mean().sqrt().item()
    cut(theirs, stay)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    (step,) = grouped(batches)  # of two times five rows, for a step has eight at least
    for index in range(3):
        optimizer.param_groups[0]["lr"] = rate * (1 - index / 3)
        tokens = sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in step)
        for micro in step:
            own = int((micro["labels"][:, 1:] != -100).sum())
            (theirs(**micro).loss * own / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ours = gated_layers(model)
    for name, layer in gated_layers(theirs).items():
        torch.testing.assert_close(layer.A, ours[name].A, rtol=1e-3, atol=1e-2 * rate)
        torch.testing.assert_close(layer.B, ours[name].B, rtol=1e-3, atol=1e-2 * rate)


def test_two_passes_lower_the_loss_of_their_rows(some, batches):
    model, stay = some()
    factors = refitted(model, batches, stay)
    assert losses(model, batches, stay, factors).mean < losses(model, batches, stay).mean


def test_steps_have_eight_rows_or_more(make_batch):
    batch = [make_batch(rows=rows, seed=rows) for rows in (1, 2, 3, 4, 5, 6, 7)]
    found = grouped(batch)
    sizes = [sum(len(micro["labels"]) for micro in step) for step in found]
    assert all(size >= 8 for size in sizes[:-1])
    assert sorted(len(micro["labels"]) for step in found for micro in step) == [1, 2, 3, 4, 5, 6, 7]


def test_steps_are_as_many_whatever_a_forward_pass_holds(make_batch):
    large = make_batch(rows=30)
    found = grouped([large])
    assert [sum(len(micro["labels"]) for micro in step) for step in found] in (
        [8, 8, 8, 6],
        [8, 8, 14],
        [8, 14, 8],
        [14, 8, 8],
    )
    rows = [row.tolist() for step in found for micro in step for row in micro["input_ids"]]
    assert sorted(rows) == sorted(large["input_ids"].tolist())
    assert all(micro.keys() == large.keys() for step in found for micro in step)


@pytest.mark.parametrize("trainable", [True, False])
def test_an_error_leaves_the_adapter_as_it_was(some, batches, monkeypatch, trainable):
    model, stay = some()
    layers = gated_layers(model)
    before = {name: layer.B.clone() for name, layer in layers.items()}
    for layer in layers.values():
        layer.A.requires_grad_(trainable)
        layer.B.requires_grad_(trainable)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refitted(model, batches, stay, 2)
    for name, layer in layers.items():
        assert torch.equal(layer.B, before[name])
        assert layer.gate is None and layer.A.grad is None and layer.B.grad is None
        assert layer.A.requires_grad == layer.B.requires_grad == trainable


def test_ranks_that_leave_take_neither_gradients_nor_moments(some, batches, monkeypatch):
    model, stay = some()
    own, AdamW = gated_layers(model), torch.optim.AdamW
    trained = []
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda parameters, **k: trained.extend(parameters) or AdamW(parameters, **k)
    )
    sizes = []
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, most: sizes.append(sum(p.grad.numel() for p in parameters)),
    )
    refitted(model, batches, stay, 1)
    assert len(trained) == 2 * len(stay)
    assert sizes == [sum(len(ranks) * (own[name].A.shape[1] + len(own[name].B)) for name, ranks in stay.items())]


def test_it_starts_from_factors_of_any_rank(some, batches):
    """Against a model whose own factors these are."""
    model, stay = some()
    theirs = {
        name: (torch.cat([layer.A.data[:1] * 2, layer.A.data]), torch.cat([layer.B.data[:, :1], layer.B.data], dim=1))
        for name, layer in gated_layers(model).items()
    }
    found = refitted(model, batches, stay, 2, theirs)
    for name, layer in gated_layers(model).items():
        replace_ranks(layer, *theirs[name])
    expected = refitted(model, batches, stay, 2)
    for name in expected:
        for one, other in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(one, other)
    assert not torch.equal(found[next(iter(stay))][0], theirs[next(iter(stay))][0])


def test_size_of_entries():
    factors = {"m": (torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]]))}
    assert size_of_entries(factors) == pytest.approx(math.sqrt((9 + 16 + 1 + 4) / 4))

"""New weights against labels that the adapter itself drew, and steps against torch's own loop."""

from __future__ import annotations

import pytest
import torch

from qalora.adapter import refit
from qalora.adapter.cutting import cut, losses
from qalora.adapter.model import gated_layers, ranks
from qalora.adapter.refit import _change, reweighted, train_steps, train_where_it_helps


@pytest.fixture
def batches(make_batch):
    return [make_batch(rows=6, seed=1)], [make_batch(rows=6, seed=2)]


def test_steps_are_adamws(tiny_adapter, batches):
    ours, theirs = tiny_adapter(r=2).eval(), tiny_adapter(r=2).eval()
    train_steps(ours, batches[0], 3, rate=1e-2)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 3)
        theirs(**batches[0][0]).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for mine, other in zip(gated_layers(ours).values(), gated_layers(theirs).values(), strict=True):
        torch.testing.assert_close(mine.B, other.B, rtol=1e-3, atol=1e-4)


def test_reweighting_gives_a_rank_back_the_size_that_it_should_have(tiny_adapter, make_batch):
    """Labels are drawn from the adapter itself; then one rank is made half as large, and goes most of the way back."""
    model = tiny_adapter(r=1, targets=["down_proj"]).eval()
    batch = make_batch(rows=24, tokens=16, seed=1)
    layers = gated_layers(model)
    for layer in layers.values():
        layer.B.data.mul_(6)
    torch.manual_seed(0)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    drawn = torch.distributions.Categorical(logits=logits).sample()
    batch["labels"][:, 1:] = torch.where(batch["labels"][:, 1:] == -100, -100, drawn[:, :-1])
    name = list(layers)[-1]
    whole = losses(model, [batch]).mean
    layers[name].B.data.mul_(0.5)
    halved, before = losses(model, [batch]).mean, {n: layer.B.data.clone() for n, layer in layers.items()}
    every = {n: [0] for n in layers}
    found = reweighted(model, [batch], every)
    assert all(torch.equal(layers[n].B, before[n]) for n in layers)
    assert 1.2 < found[name][0] <= 2.0
    after = losses(model, [batch], every, found).mean
    assert after < halved - 0.5 * (halved - whole)
    cut(model, every, found)
    assert losses(model, [batch]).mean == pytest.approx(after, rel=1e-6)


def test_ranks_that_left_have_no_weight(tiny_adapter, batches):
    model = tiny_adapter(r=2).eval()
    first, second = list(ranks(model))[:2]
    found = reweighted(model, batches[0], {first: [1], second: [0, 1]})
    assert {name: len(weights) for name, weights in found.items()} == {first: 1, second: 2}
    cut(model, {first: [1], second: [0, 1]})
    again = reweighted(model, batches[0], {first: [0], second: [0, 1]})
    assert found == {name: pytest.approx(weights, rel=1e-3) for name, weights in again.items()}


def test_what_rows_do_not_agree_on_stays():
    rows = torch.tensor([[1.0, 1.0, 2.0], [1.0, -1.0, -1.0], [1.0, 0.1, -1.0]], dtype=torch.float64)
    change = _change(rows)
    assert change[0] == pytest.approx(-(1 - 3 / 9) * 3 / 3)
    assert change[1] == change[2] == 0


def test_training_that_does_not_help_is_taken_back(tiny_adapter, batches, monkeypatch):
    model = tiny_adapter(r=2).eval()
    for layer in gated_layers(model).values():
        layer.B.data.zero_()
    before = losses(model, batches[1]).mean
    torch.manual_seed(0)
    monkeypatch.setattr(
        refit, "train_steps", lambda *args: [layer.B.data.normal_() for layer in gated_layers(model).values()]
    )
    found = train_where_it_helps(model, *batches, 2)
    assert not found.helped
    assert found.after.mean > found.before.mean == before
    assert losses(model, batches[1]).mean == before

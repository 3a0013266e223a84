"""Least squares against numpy's on the outputs themselves, and steps against torch's own loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qalora.adapter.cutting import losses
from qalora.adapter.model import gated_layers, ranks
from qalora.adapter.principal import input_grams, into_basis
from qalora.adapter.refit import _change, cut_and_refit, least_squares, reweighted, train_steps


@pytest.fixture
def batches(make_batch):
    return [make_batch(rows=6, seed=1)], [make_batch(rows=6, seed=2)]


def test_what_stays_is_the_least_squares_fit_of_the_outputs(tiny_adapter, batches):
    model = tiny_adapter().eval()
    into_basis(model, "svd")
    name, layer = list(gated_layers(model).items())[2]
    inputs = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).double().numpy()))
    grams = input_grams(model, batches[0])
    hook.remove()
    A, B = layer.A.detach().double().numpy(), layer.B.detach().double().numpy()
    outputs, low = inputs[0] @ A.T @ B.T, inputs[0] @ A[[0, 2]].T
    expected = np.linalg.lstsq(low, outputs, rcond=None)[0].T
    found = least_squares(model, grams, {name: [0, 2]})[name]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected - B[:, [0, 2]]).max() > 1e-3


def test_in_the_basis_of_the_outputs_nothing_is_left_to_fit(tiny_adapter, batches):
    model = tiny_adapter().eval()
    into_basis(model, "svd-act", batches[0])
    name, layer = next(iter(gated_layers(model).items()))
    found = least_squares(model, input_grams(model, batches[0]), {name: [0, 1]})[name]
    torch.testing.assert_close(found, layer.B.detach()[:, :2], rtol=1e-3, atol=1e-5)


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
    found = reweighted(model, [batch])
    assert all(torch.equal(layers[n].B, before[n]) for n in layers)
    weight = float((found[name] / before[name]).mean())
    assert 1.2 < weight <= 2.0
    for n, B in found.items():
        layers[n].B.data.copy_(B)
    assert losses(model, [batch]).mean < halved - 0.5 * (halved - whole)


def test_what_rows_do_not_agree_on_stays():
    rows = torch.tensor([[1.0, 1.0, 2.0], [1.0, -1.0, -1.0], [1.0, 0.1, -1.0]], dtype=torch.float64)
    change = _change(rows)
    assert change[0] == pytest.approx(-(1 - 3 / 9) * 3 / 3)
    assert change[1] == change[2] == 0


@pytest.mark.parametrize("steps", [None, 2])
def test_a_correction_that_does_not_help_is_taken_back(tiny_adapter, batches, steps, monkeypatch):
    model, plain = tiny_adapter(r=2).eval(), tiny_adapter(r=2).eval()
    for each in (model, plain):
        into_basis(each, "svd")
    stay = {name: [0] for name in ranks(model)}
    from qalora.adapter import refit
    from qalora.adapter.cutting import cut

    cut(plain, stay)
    monkeypatch.setattr(refit, "least_squares", lambda *args: {n: 50 * b for n, b in kept_of(model, stay).items()})
    monkeypatch.setattr(refit, "reweighted", lambda *args: {n: 60 * b for n, b in kept_of(model, stay).items()})
    monkeypatch.setattr(
        refit, "train_steps", lambda *args: [layer.B.data.mul_(50) for layer in gated_layers(model).values()]
    )
    found = cut_and_refit(model, stay, *batches, steps)
    assert not found.helped
    assert found.after.mean > found.before.mean
    assert losses(model, batches[1]).mean == pytest.approx(losses(plain, batches[1]).mean, rel=1e-6)


def kept_of(model, stay):
    return {name: gated_layers(model)[name].B.detach()[:, index].clone() for name, index in stay.items()}

"""Losses with some ranks alone against tensors that hold no others, and the cut adapter against vanilla PEFT."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from qalora.adapter.compression import Size, kept, parameters_of
from qalora.adapter.cutting import cut, losses, rank_orders
from qalora.adapter.cutting import point as cost_of
from qalora.adapter.layer import gated
from qalora.adapter.model import gated_layers, rank_parameters, ranks, save_adapter
from qalora.adapter.principal import into_basis

BASES = [pytest.param(False, id="plain"), pytest.param(True, id="4bit")]


@pytest.fixture
def halves(make_batch):
    batch = make_batch(rows=5)
    return batch, [{key: value[:2] for key, value in batch.items()}, {key: value[2:] for key, value in batch.items()}]


def plain_losses(model, batch):
    """Each row's summed cross-entropy, from full logits in fp64."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.double()
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return each.sum(1).numpy()


@pytest.mark.parametrize("four_bit", BASES)
def test_losses_are_those_of_tensors_without_the_other_ranks(tiny_adapter, halves, four_bit):
    model, (batch, micro) = tiny_adapter(four_bit=four_bit).eval(), halves
    layers = gated_layers(model)
    stay = {name: [1, 3] for name in list(layers)[::2]}
    whole, some, none = (losses(model, micro, ranks) for ranks in (None, stay, {}))
    np.testing.assert_allclose(whole.rows, plain_losses(model, batch), rtol=1e-5)
    assert whole.tokens == (batch["labels"][:, 1:] != -100).sum(1).tolist()
    for layer in layers.values():
        layer.B.data[:, [0, 2]] = 0
    for name in set(layers) - set(stay):
        layers[name].B.data.zero_()
    np.testing.assert_allclose(some.rows, plain_losses(model, batch), rtol=1e-5)
    with model.disable_adapter():
        np.testing.assert_allclose(none.rows, plain_losses(model, batch), rtol=1e-5)


def test_the_curve_is_that_of_cut_copies(tiny_adapter, halves):
    model, (batch, micro) = tiny_adapter().eval(), halves
    values = into_basis(model, "svd")
    scores = rank_orders(model, values, micro, ["values"])["values"]
    whole = losses(model, micro)
    of = sum(map(len, scores.values()))
    costs = rank_parameters(model, scores)
    sizes = [Size(ranks=of // 2), Size(ranks=3)]
    points = [cost_of(model, micro, kept(scores, size, costs), whole=whole, of=of) for size in sizes]
    before = plain_losses(model, batch)
    for point, count in zip(points, (of // 2, 3), strict=True):
        assert (point.ranks, point.share) == (count, count / of)
        cut_model = tiny_adapter().eval()
        into_basis(cut_model, "svd")
        cut(cut_model, kept(scores, Size(ranks=count), costs))
        assert sum(ranks(cut_model).values()) == count
        assert point.parameters == sum(p.numel() for p in cut_model.parameters() if p.requires_grad)
        after = plain_losses(cut_model, batch)
        assert point.loss == pytest.approx(after.sum() / sum(whole.tokens), rel=1e-5)
        assert point.difference == pytest.approx((after - before).sum() / sum(whole.tokens), abs=1e-5)
        assert 0 < point.stderr < 1


@pytest.mark.parametrize("basis", ["trained", "svd"])
def test_path_shares_are_finite_differences_along_the_diagonal(tiny_adapter, halves, basis):
    """Trapezoids of central differences, one gate at a time."""
    model, (batch, micro) = tiny_adapter(r=2, targets=["v_proj"]).eval(), halves
    values = into_basis(model, basis)
    found = rank_orders(model, values, micro, ["path"])["path"]
    layers = gated_layers(model)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    for name in layers:
        for rank in range(2):
            total, steps = 0.0, 16
            for step in range(steps):
                t = (step + 0.5) / steps
                ends = []
                for nudge in (0.02, -0.02):
                    gates = {other: torch.full((len(layer.A),), t) for other, layer in layers.items()}
                    gates[name][rank] += nudge
                    with gated(layers, gates):
                        ends.append(plain_losses(model, batch).sum())
                total -= (ends[0] - ends[1]) / 0.04 / steps
            assert found[name][rank] == pytest.approx(total / float(tokens), rel=0.02, abs=2e-4)


def test_orders_of_values_need_no_rows_and_shrunk_ones_rows_enough(tiny_adapter, halves):
    model = tiny_adapter(r=2)
    values = into_basis(model, "svd")
    assert list(rank_orders(model, values, [], ["values"])) == ["values"]
    found = rank_orders(model, values, halves[1], ["path", "sum", "values", "shrunk"])
    assert list(found) == ["path", "sum", "values", "shrunk"]
    assert all(set(scores) == set(values) for scores in found.values())
    one_row = [{key: value[:1] for key, value in halves[0].items()}]
    assert "shrunk" not in rank_orders(model, values, one_row, ["path", "shrunk"])


def test_a_cut_adapter_is_read_by_vanilla_peft(tiny_adapter, tiny_llama, halves, tmp_path):
    """With modules that lost all their ranks, and ranks and scalings of their own."""
    model, (batch, micro) = tiny_adapter(r=3, alpha=5).eval(), halves
    values = into_basis(model, "svd-act", micro)
    stay = kept(rank_orders(model, values, [], ["values"])["values"], Size(ranks=9), rank_parameters(model, values))
    cut(model, stay)
    save_adapter(model, tmp_path / "cut")
    assert parameters_of(stay, rank_parameters(model, stay)) == sum(
        layer.A.numel() + layer.B.numel() for layer in gated_layers(model).values()
    )
    vanilla = PeftModel.from_pretrained(tiny_llama(), tmp_path / "cut").eval()
    np.testing.assert_allclose(plain_losses(vanilla, batch), plain_losses(model, batch), rtol=1e-5)
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {name: len(of) for name, of in stay.items()}

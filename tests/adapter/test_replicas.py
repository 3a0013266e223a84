"""One adapter in several processes: what differs is named. tests/test_processes.py plants a difference in a run."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from qalora import processes
from qalora.adapter import replicas
from qalora.adapter.model import gated_layers
from qalora.errors import InputError


@pytest.mark.parametrize("what", ["A", "B", "exp_avg", "exp_avg_sq", "step"])
def test_the_digest_of_each_tensor_has_its_name(tiny_adapter, what):
    model = tiny_adapter()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    name, layer = next(iter(gated_layers(model).items()))
    before = dict(replicas._digests(model, optimizer))
    if what in ("A", "B"):
        getattr(layer, what).data.view(-1)[0] += 1e-6
    else:
        optimizer.state[layer.A][what].view(-1)[0] += 1e-6
    after = dict(replicas._digests(model, optimizer))
    expected = f"{what} of {name}" if what in ("A", "B") else f"{what} of A of {name}"
    assert [key for key in before if before[key] != after[key]] == [expected]


def test_alone_nothing_is_compared(tiny_adapter, monkeypatch):
    monkeypatch.setattr(processes, "check_same", None)
    model = tiny_adapter()
    replicas.check_replicas(model, None, "after step 1")
    replicas.share_adapter(model)


def test_a_given_adapter_that_is_another_elsewhere_is_refused_by_its_module(tiny_adapter, monkeypatch):
    model = tiny_adapter()
    name, layer = next(iter(gated_layers(model).items()))
    other = dict(replicas._digests(model, None))
    layer.A.data.view(-1)[0] += 1e-6
    monkeypatch.setattr(processes, "_group", processes.Group(0, 2))
    monkeypatch.setattr(processes, "exchange", lambda value: [value, other])
    monkeypatch.setattr(processes, "agreeing", nullcontext)
    with pytest.raises(InputError) as error:
        replicas.check_given(model)
    said = f"lora.adapter: process 0 and process 1 differ in A of {name}; give every node the same files."
    assert str(error.value) == said

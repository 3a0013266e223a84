"""What the linear layers read, against plain hooks on the rows one by one."""

from __future__ import annotations

import torch

from qalora.adapter.model import gated_layers
from qalora.adapter.start.inputs import token_mask, visit_inputs


def test_every_distinct_token_is_seen_once_and_padding_never(tiny_adapter, make_batch):
    model = tiny_adapter()
    batch = make_batch(rows=2, tokens=6)
    batch["attention_mask"][1, 4:] = 0
    layers = dict(list(gated_layers(model).items())[:2])
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    visit_inputs(model, [batch], layers, lambda name, inputs: seen[name].append(inputs))
    expected: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: expected[name].append(args[0][0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for row, length in ((0, 6), (1, 4)):
            model(batch["input_ids"][row : row + 1, :length])
    for hook in hooks:
        hook.remove()
    for name in layers:
        torch.testing.assert_close(torch.cat(seen[name]), torch.cat(expected[name]), rtol=1e-4, atol=1e-5)


def test_without_a_mask_every_position_is_a_token():
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert token_mask({"input_ids": ids}).tolist() == [[1, 1, 1], [1, 1, 1]]

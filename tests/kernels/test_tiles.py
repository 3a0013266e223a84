from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qalora.errors import InputError
from qalora.kernels import tiles
from qalora.kernels.activations import set_mlp_tile
from qalora.kernels.install import _replace


class Wide(nn.Module):
    """d → 4 d → d; keeps count of the tokens of each call."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.seen = nn.Linear(8, 32), nn.Linear(32, 8), []

    def forward(self, x):
        self.seen.append(x.shape[1])
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Block(GradientCheckpointingLayer):
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return x


@pytest.fixture(params=tiles.PLACES)
def model(request):
    torch.manual_seed(0)
    return nn.ModuleList([Block(**{request.param: Wide()})])


def test_tiles_give_the_same_and_are_computed_again_one_by_one(model):
    (mlp,) = tiles.replaceable(model)
    x = torch.randn(2, 7, 8)
    expected = []
    for tile in (None, 3):
        if tile:
            _replace(mlp, tiles.NAME, tiles.forward)
            set_mlp_tile(model, tile)
        mlp.zero_grad()
        mlp.seen.clear()
        z = mlp(x.requires_grad_())
        grads = torch.autograd.grad(z.square().sum(), [x, *mlp.parameters()])
        expected.append([z.detach(), *grads])
        assert mlp.seen == ([7] if tile is None else [3, 3, 1, 1, 3, 3])  # the backward goes from the last to the first
    for found, own in zip(*expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


def test_without_a_gradient_nothing_is_computed_twice(model):
    (mlp,) = tiles.replaceable(model)
    x = torch.randn(2, 7, 8)
    with torch.no_grad():
        expected = mlp(x)
        _replace(mlp, tiles.NAME, tiles.forward)
        set_mlp_tile(model, 4)
        mlp.seen.clear()
        torch.testing.assert_close(mlp(x), expected)
    assert mlp.seen == [4, 3]


def test_a_block_without_an_mlp_is_named():
    with pytest.raises(InputError, match="mlp_tile=4: Block cannot be tiled"):
        set_mlp_tile(nn.ModuleList([Block(other=Wide())]), 4)

"""The fused MLP against autograd through the same maps, in every state that its maps can be in."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qalora.adapter.layer import GatedLinear, gated
from qalora.adapter.model import gated_layers
from qalora.base.quantized import dequantize
from qalora.kernels.install import install
from qalora.kernels.recompute import both_runs

BASES = [
    pytest.param(False, torch.float32, id="plain-fp32"),
    pytest.param(True, torch.float32, id="4bit-fp32"),
    pytest.param(False, torch.bfloat16, id="plain-bf16"),
    pytest.param(True, torch.bfloat16, id="4bit-bf16"),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative, of norms
MLP = "model.layers.0.mlp"
GATE, UP, DOWN = (f"{MLP}.{name}_proj" for name in ("gate", "up", "down"))


@pytest.fixture
def mlp(adapted_module):
    """make(four_bit, dtype, …) → (the model, the MLP of its first block)."""
    return partial(adapted_module, MLP)


def map_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """W x + s B diag(gate) A x, everything in fp32, for autograd."""
    base = layer.base_layer if isinstance(layer, GatedLinear) else layer
    z = F.linear(x, dequantize(base) if hasattr(base.weight, "quant_state") else base.weight.float())
    if not isinstance(layer, GatedLinear) or layer.closed:
        return z
    low = F.linear(x, layer.A)
    return z + layer.s * F.linear(low if layer.gate is None else low * layer.gate, layer.B)


def by_autograd(mlp, x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return map_of(mlp.down_proj, F.silu(map_of(mlp.gate_proj, x)) * map_of(mlp.up_proj, x))


@pytest.fixture
def assert_as_autograd(inputs, gradients):
    def check(mlp, extra: list[torch.Tensor] = (), dtype=torch.float32) -> None:
        x = inputs(dtype)
        layers = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        trained = [
            p for layer in layers if isinstance(layer, GatedLinear) and not layer.closed for p in (layer.A, layer.B)
        ]
        leaves = [x, *trained, *extra]
        found, expected = mlp(x), by_autograd(mlp, x)
        assert type(found.grad_fn).__name__ == "_GatedSwiGLUBackward" and found.dtype == dtype
        pairs = zip([found, *gradients(found, leaves)], [expected, *gradients(expected, leaves)], strict=True)
        for got, want in pairs:
            assert (got.float() - want.float()).norm() <= TOLERANCE[dtype] * want.float().norm()

    return check


@pytest.mark.parametrize(("four_bit", "dtype"), BASES)
@pytest.mark.parametrize("tile", [None, 3, 7, 100])
@pytest.mark.usefixtures("stretch")
def test_values_and_gradients_are_autograds(mlp, four_bit, dtype, tile, assert_as_autograd):
    _, module = mlp(four_bit, dtype)
    module.mlp_tile = tile
    assert_as_autograd(module, dtype=dtype)


@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("shape", [(4,), (3, 1, 4)], ids=["one gate", "a gate a row"])
@pytest.mark.usefixtures("stretch")
def test_gates_get_their_gradients(mlp, tile, shape, assert_as_autograd):
    model, module = mlp()
    module.mlp_tile = tile
    generator = torch.Generator().manual_seed(3)
    gates = {name: torch.rand(shape, generator=generator).requires_grad_() for name in (GATE, UP, DOWN)}
    with gated(gated_layers(model), gates):
        assert_as_autograd(module, extra=list(gates.values()))


@pytest.mark.parametrize("bare", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("tile", [None, 3])
def test_a_map_that_lost_its_adapter(mlp, bare, tile, assert_as_autograd):
    _, module = mlp()
    module.mlp_tile = tile
    setattr(module, bare, getattr(module, bare).base_layer)
    assert_as_autograd(module)


def test_a_closed_map(mlp, assert_as_autograd):
    _, module = mlp()
    module.up_proj.closed = True
    assert_as_autograd(module)


def test_without_gradients_the_maps_run_one_after_the_other(mlp, inputs):
    _, module = mlp()
    with torch.no_grad():
        torch.testing.assert_close(module(inputs()), by_autograd(module, inputs()), rtol=1e-5, atol=1e-5)


def test_an_input_that_needs_no_gradient(mlp, inputs, gradients):
    _, module = mlp()
    x, leaves = inputs().detach(), [module.gate_proj.A, module.down_proj.B]
    torch.testing.assert_close(
        gradients(module(x), leaves), gradients(by_autograd(module, x), leaves), rtol=1e-4, atol=1e-5
    )


def test_dropout_and_layers_of_others_keep_their_own_forward(mlp, inputs):
    _, dropping = mlp(dropout=0.5)
    assert type(dropping(inputs()).grad_fn).__name__ != "_GatedSwiGLUBackward"
    _, foreign = mlp()
    foreign.down_proj = nn.Sequential(foreign.down_proj)
    torch.testing.assert_close(
        foreign(inputs()), foreign.down_proj(F.silu(foreign.gate_proj(inputs())) * foreign.up_proj(inputs()))
    )


def test_a_block_of_another_architecture_stays_as_it_is(mlp):
    model, module = mlp()
    model.get_base_model().kernels.remove()
    for child in model.modules():
        if hasattr(child, "act_fn"):
            child.act_fn = nn.GELU()
    installed = install(model)
    assert "fused SwiGLU" not in installed.modules and module.kernel == "MLP by tiles"


def test_the_backward_runs_once(mlp, inputs):
    """It writes over what the forward kept, so a second one must fail, not give wrong gradients."""
    _, module = mlp()
    z = module(inputs()).sum()
    z.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("keep", [True, False])
def test_the_second_run_has_the_gradients_of_the_first(mlp, tile, keep, inputs, gradients):
    _, module = mlp()
    module.mlp_tile = tile
    x = inputs()
    leaves = [x, module.gate_proj.A, module.up_proj.B, module.down_proj.A, module.down_proj.B]
    expected = gradients(module(x), leaves)
    first, second = both_runs(keep=keep)
    with first:
        z = module(x)
    with second:
        again = module(x)
    torch.testing.assert_close(z, by_autograd(module, x), rtol=1e-5, atol=1e-5)
    assert not again.any() and again.shape == z.shape  # nobody reads it
    torch.testing.assert_close(gradients(again, leaves), expected, rtol=1e-5, atol=1e-6)

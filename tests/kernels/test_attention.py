"""Queries, keys and values as one node, against autograd through transformers' own attention over the same maps."""

from __future__ import annotations

from functools import partial
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qalora.adapter.layer import GatedLinear, gated
from qalora.adapter.model import gated_layers
from qalora.kernels.attention import rotate_
from qalora.kernels.install import install
from qalora.kernels.recompute import both_runs

BASES = [
    pytest.param(False, torch.float32, id="plain-fp32"),
    pytest.param(True, torch.float32, id="4bit-fp32"),
    pytest.param(False, torch.bfloat16, id="plain-bf16"),
    pytest.param(True, torch.bfloat16, id="4bit-bf16"),
]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # relative, of norms
ATTENTION = "model.layers.0.self_attn"
MAPS = [f"{ATTENTION}.{name}_proj" for name in "qkv"]


@pytest.fixture
def attention(adapted_module):
    """make(four_bit, dtype, …) → (the model, the attention of its first block)."""
    return partial(adapted_module, ATTENTION)


def angles(tokens=7, head_dim=16) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
    both = torch.cat([positions, positions], -1)[None]
    return both.cos(), both.sin()


def run(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x, position_embeddings=tuple(a.to(x.dtype) for a in angles()), is_causal=True)[0]


def by_maps(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """transformers' own forward, which calls the maps one after the other."""
    own, module.forward = module.forward, MethodType(type(module).forward, module)
    try:
        return run(module, x)
    finally:
        module.forward = own


def nodes(z: torch.Tensor) -> set[str]:
    """Names of all functions in the graph of z."""
    found, waiting = {}, [z.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            waiting += [parent for parent, _ in node.next_functions]
    return {type(node).__name__ for node in found.values()}


@pytest.fixture
def assert_as_by_maps(inputs, gradients):
    def check(module: nn.Module, extra=(), dtype=torch.float32) -> None:
        x = inputs(dtype)
        layers = [module.q_proj, module.k_proj, module.v_proj, module.o_proj]
        trained = [
            p for layer in layers if isinstance(layer, GatedLinear) and not layer.closed for p in (layer.A, layer.B)
        ]
        leaves = [x, *trained, *extra]
        found, expected = run(module, x), by_maps(module, x)
        assert "_RotatedQKVBackward" in nodes(found) and "_RotatedQKVBackward" not in nodes(expected)
        assert torch.equal(found, expected)
        for got, want in zip(gradients(found, leaves), gradients(expected, leaves), strict=True):
            assert (got.float() - want.float()).norm() <= TOLERANCE[dtype] * want.float().norm()

    return check


@pytest.mark.parametrize(("four_bit", "dtype"), BASES)
def test_values_are_equal_and_gradients_are_those_of_single_maps(attention, four_bit, dtype, assert_as_by_maps):
    assert_as_by_maps(attention(four_bit, dtype)[1], dtype=dtype)


@pytest.mark.parametrize("shape", [(4,), (3, 1, 4)], ids=["one gate", "a gate a row"])
def test_gates_get_their_gradients(attention, shape, assert_as_by_maps):
    model, module = attention()
    generator = torch.Generator().manual_seed(3)
    gates = {name: torch.rand(shape, generator=generator).requires_grad_() for name in MAPS}
    with gated(gated_layers(model), gates):
        assert_as_by_maps(module, extra=list(gates.values()))


@pytest.mark.parametrize("bare", ["q_proj", "k_proj", "v_proj"])
def test_a_map_that_lost_its_adapter(attention, bare, assert_as_by_maps):
    _, module = attention()
    setattr(module, bare, getattr(module, bare).base_layer)
    assert_as_by_maps(module)


def test_biases(attention, assert_as_by_maps):
    _, module = attention(attention_bias=True)
    for layer in (module.q_proj, module.k_proj, module.v_proj):
        layer.base_layer.bias.data = torch.linspace(-1, 1, len(layer.base_layer.bias))
    assert_as_by_maps(module)


def test_an_input_that_needs_no_gradient(attention, inputs, gradients):
    _, module = attention()
    x, leaves = inputs().detach(), [module.q_proj.A, module.v_proj.B]
    torch.testing.assert_close(
        gradients(run(module, x), leaves), gradients(by_maps(module, x), leaves), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("keep", [True, False])
def test_the_second_run_has_the_gradients_of_the_first(attention, keep, inputs, gradients):
    _, module = attention()
    x = inputs()
    leaves = [x, module.q_proj.A, module.k_proj.B, module.v_proj.A]
    expected = gradients(run(module, x), leaves)
    first, second = both_runs(keep=keep)
    with first:
        run(module, x)
    with second:
        again = run(module, x)
    torch.testing.assert_close(gradients(again, leaves), expected, rtol=1e-5, atol=1e-6)


def test_dropout_layers_of_others_and_inference_keep_their_own_forward(attention, inputs):
    _, dropping = attention(dropout=0.5)
    assert "_RotatedQKVBackward" not in nodes(run(dropping, inputs()))
    _, foreign = attention()
    foreign.v_proj = nn.Sequential(foreign.v_proj)
    assert "_RotatedQKVBackward" not in nodes(run(foreign, inputs()))
    _, module = attention()
    with torch.no_grad():
        assert torch.equal(run(module, inputs()), by_maps(module, inputs()))


def test_eager_attention_keeps_its_own_forward(attention, inputs):
    model, module = attention()
    model.get_base_model().set_attn_implementation("eager")
    found = run(module, inputs())
    assert "_RotatedQKVBackward" not in nodes(found) and torch.equal(found, by_maps(module, inputs()))


def test_attention_of_another_kind_stays_as_it_is(tiny_llama):
    model = tiny_llama()
    for block in model.model.layers:
        block.self_attn.__class__ = type("OtherAttention", (type(block.self_attn),), {})
    install(model)
    assert not any("forward" in vars(block.self_attn) for block in model.model.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_is_transformers(dtype):
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    cos, sin = (a.to(dtype) for a in angles())
    heads = x.unflatten(-1, (3, 16)).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    turned = x.clone()
    rotate_(turned, cos, sin, 16)
    assert torch.equal(turned, expected.transpose(1, 2).flatten(2))
    rotate_(turned, cos, -sin, 16)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(turned, x, rtol=tolerance, atol=tolerance)


def test_a_cache_is_handed_on(tiny_adapter):
    """Generation with a cache, also where gradients are on."""
    model = tiny_adapter().eval()
    ids = torch.arange(6)[None] + 3
    with torch.enable_grad():
        whole = model(ids).logits
        first = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 4:], rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(whole[0, 4], whole[0, 5], dim=0) < 0.999  # two positions that differ

"""4-bit weights: their exact values, how they come to be, and the CPU packing that would ruin them."""

from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from torch import nn

from qalora.base.quantized import dequantize, guard_cpu_packing, is_4bit, linear_maps, quantize_
from qalora.errors import InputError

# Dettmers et al. 2023, appendix E: the quantiles of a normal distribution.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def naive_dequantize(module: Linear4bit) -> torch.Tensor:
    """Two weights a byte, high half first; each is a code times the absmax of its 64, itself in 8 bits of 256."""
    state = module.weight.quant_state
    packed = module.weight.data.flatten()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten().long()
    absmax = state.absmax
    if state.nested:
        scale = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * scale + state.offset
    values = torch.tensor(NF4)[codes] * absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return values.view(module.out_features, module.in_features)


@pytest.fixture
def block():
    """block(bias) → the least that has a linear map in `layers`: weights of 96 × 64."""

    def make(*, bias: bool = False, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Module()
        model.model = nn.Module()
        model.model.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(64, 96, bias=bias)})])
        model.lm_head = nn.Linear(64, 8)
        return model.requires_grad_(False)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_dequantized_values_are_exact(block, double_quant, dtype):
    model = block().to(dtype)
    weight = model.model.layers[0]["proj"].weight.data.clone()
    quantize_(model, double_quant=double_quant, compute_dtype=dtype)
    module = model.model.layers[0]["proj"]
    values = dequantize(module)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, naive_dequantize(module), rtol=1e-6, atol=1e-8)
    state = copy.copy(module.weight.quant_state)
    state.dtype = torch.float32
    assert torch.equal(values, dequantize_4bit(module.weight.data, state))
    assert module.weight.quant_state.dtype == dtype  # left as it was
    assert torch.equal(dequantize(module, dtype), dequantize_4bit(module.weight.data, module.weight.quant_state))
    # the nearest code of 16 is at most half the widest gap away
    error = (values - weight.float()).abs().view(-1, 64)
    assert (error <= weight.float().abs().view(-1, 64).amax(1, keepdim=True) * 0.17).all()


def test_quantizing_is_bitsandbytes_own(block):
    model = block(bias=True)
    plain = model.model.layers[0]["proj"]
    reference = Linear4bit(64, 96, bias=True, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
    reference.load_state_dict(plain.state_dict())
    reference = reference.to("cpu")
    bias = plain.bias.data.clone()
    quantize_(model, compute_dtype=torch.float32)
    module = model.model.layers[0]["proj"]
    assert torch.equal(module.weight.data, reference.weight.data)
    assert torch.equal(module.weight.quant_state.absmax, reference.weight.quant_state.absmax)
    assert torch.equal(module.bias, bias)
    x = torch.randn(3, 64, requires_grad=True)
    torch.testing.assert_close(module(x), x @ dequantize(module).T + bias, rtol=1e-5, atol=1e-5)


def test_fp4_is_another_code(block):
    nf4, fp4 = block(), block()
    quantize_(nf4, compute_dtype=torch.float32)
    quantize_(fp4, quant_type="fp4", compute_dtype=torch.float32)
    assert fp4.model.layers[0]["proj"].weight.quant_state.quant_type == "fp4"
    assert not torch.equal(dequantize(fp4.model.layers[0]["proj"]), dequantize(nf4.model.layers[0]["proj"]))


def test_only_the_blocks_are_quantized_and_the_originals_freed(tiny_llama):
    model = tiny_llama()
    before = linear_maps(model)
    quantize_(model, compute_dtype=torch.float32)
    after = linear_maps(model)
    assert list(before) == list(after)
    assert len(after) == 14
    assert all(is_4bit(module) and not module.weight.requires_grad for module in after.values())
    assert all(linear.weight.numel() == 0 for linear in before.values())
    assert not is_4bit(model.lm_head)
    assert sum(map(is_4bit, model.modules())) == 14


def test_linear_maps_are_looked_for_below_adapters(tiny_adapter):
    model = tiny_adapter(four_bit=True)
    maps = linear_maps(model)
    assert list(maps) == list(linear_maps(model.get_base_model()))
    assert next(iter(maps)) == "model.layers.0.self_attn.q_proj"
    assert len(maps) == 14
    assert all(type(module) is Linear4bit for module in maps.values())


def test_a_plain_weight_is_cast(block):
    module = block().model.layers[0]["proj"]
    assert torch.equal(dequantize(module, torch.bfloat16), module.weight.to(torch.bfloat16))


# --------------------------------------------------------------------------------------------------------- CPU packing


def gradients(model, batch) -> torch.Tensor:
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def unguard(model) -> None:
    """As bitsandbytes itself leaves its modules."""
    for module in model.modules():
        if is_4bit(module):
            module.support_avx512bf16_for_cpu = Linear4bit(64, 64).support_avx512bf16_for_cpu


def test_an_evaluation_leaves_the_gradients_as_they_were(tiny_adapter, make_batch):
    model, batch = (
        tiny_adapter(four_bit=True, dtype=torch.bfloat16, hidden_size=128, intermediate_size=128),
        make_batch(),
    )
    before = gradients(model, batch)
    weights = {name: dequantize(module) for name, module in linear_maps(model).items()}
    model.eval()
    with torch.no_grad():
        model(**batch)
    assert torch.equal(gradients(model, batch), before)
    for name, module in linear_maps(model).items():
        assert torch.equal(dequantize(module), weights[name])


def test_without_the_guard_an_evaluation_ruins_the_gradients_and_is_refused(tiny_adapter, make_batch):
    if not Linear4bit(64, 64).support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs 4-bit weights only on CPUs with avx512_bf16")
    model, batch = (
        tiny_adapter(four_bit=True, dtype=torch.bfloat16, hidden_size=128, intermediate_size=128),
        make_batch(),
    )
    before = gradients(model, batch)
    unguard(model)
    model.eval()
    with torch.no_grad():
        model(**batch)
    packed = [module for module in linear_maps(model).values() if module.weight.quant_state.packing_format_for_cpu]
    assert packed
    after = gradients(model, batch)
    assert torch.cosine_similarity(before, after, dim=0) < 0.9
    with pytest.raises(
        InputError, match="^the 4-bit weights were repacked for CPU decoding .* through qalora.load_base"
    ):
        guard_cpu_packing(model)
    with pytest.raises(InputError, match="^the 4-bit weights were repacked"):
        dequantize(packed[0])


def test_the_guard_refuses_a_weight_that_is_marked_as_packed(block):
    model = block()
    quantize_(model, compute_dtype=torch.float32)
    module = model.model.layers[0]["proj"]
    assert module.support_avx512bf16_for_cpu is False
    guard_cpu_packing(model)
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InputError, match="repacked for CPU decoding"):
        guard_cpu_packing(model)

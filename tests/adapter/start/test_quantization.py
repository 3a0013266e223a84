"""The correction against the best there is by Eckart–Young, and a model that has all of its quantization error given
back."""

from __future__ import annotations

import pytest
import torch

from qalora.adapter.model import attach, gated_layers
from qalora.adapter.start.gradient import START_NORM
from qalora.adapter.start.quantization import (
    TOKENS,
    correction,
    sampled_inputs,
    some_rows,
    start_at_quantization_error,
)
from qalora.base.checkpoint import open_checkpoint, original_weights
from qalora.base.loading import load_base
from qalora.base.quantized import dequantize
from qalora.base.registry import resolve
from qalora.errors import InputError
from qalora.kernels.loss import row_losses


@pytest.mark.parametrize(("out", "fan_in", "tokens", "rank"), [(24, 16, 40, 3), (8, 32, 100, 8), (40, 40, 12, 5)])
def test_nothing_of_this_rank_leaves_less_of_the_error(out, fan_in, tokens, rank):
    generator = torch.Generator().manual_seed(out)
    error = torch.randn(out, fan_in, generator=generator)
    # Inputs with a mean that is large beside their spread, as a decoder's are.
    inputs = torch.randn(tokens, fan_in, generator=generator) + 5 * torch.randn(fan_in, generator=generator)
    A, B = correction(error, inputs, rank)
    assert (A.shape, B.shape) == ((rank, fan_in), (out, rank))
    torch.testing.assert_close(A.norm(dim=1), torch.full((rank,), START_NORM))
    singular = torch.linalg.svdvals(inputs.double() @ error.double().T)
    for k in range(1, rank + 1):  # the first k ranks are the best k ranks
        left = inputs.double() @ (error.double() - B[:, :k].double() @ A[:k].double()).T
        best = singular[k:].square().sum()
        torch.testing.assert_close(left.square().sum(), best, rtol=1e-4, atol=1e-6 * float(singular[0] ** 2))


def test_fewer_ranks_where_fewer_correct_everything():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 12, generator=generator)
    error = torch.randn(20, 2, generator=generator) @ torch.randn(2, 12, generator=generator)
    A, B = correction(error, inputs, 6)
    assert len(A) == 2
    torch.testing.assert_close(B @ A, error, rtol=1e-4, atol=1e-4)
    A, B = correction(torch.zeros(20, 12), inputs, 6)
    assert (A.shape, B.shape) == ((0, 12), (20, 0))


def test_all_ranks_give_the_16_bit_model_back(tiny_llama, make_batch):
    whole = tiny_llama(seed=3)
    weights = {name: module.weight.detach() for name, module in whole.named_modules() if hasattr(module, "weight")}
    batch = [make_batch(rows=8, tokens=24, seed=seed) for seed in (0, 1)]
    model = attach(tiny_llama(seed=3, four_bit=True), r=192, alpha=384, seed=0)  # as many as a map has singular values
    with torch.no_grad():
        wanted = row_losses(whole, batch[0])
        before = row_losses(model, batch[0])
        start_at_quantization_error(model, batch, weights.__getitem__, generator=torch.Generator().manual_seed(0))
        after = row_losses(model, batch[0])
    assert (before - wanted).abs().max() > 0.1
    torch.testing.assert_close(after, wanted, rtol=1e-3, atol=1e-3)
    for parameter in (p for layer in gated_layers(model).values() for p in (layer.A, layer.B)):
        assert parameter.requires_grad and parameter.isfinite().all()


def test_ranks_beyond_the_error_stay_as_they_were_born(tiny_llama, make_batch):
    model = attach(tiny_llama(four_bit=True), r=4, alpha=8, seed=0)
    name, layer = next(iter(gated_layers(model).items()))
    born = layer.A.detach().clone()
    generator = torch.Generator().manual_seed(1)
    error = torch.randn(64, 1, generator=generator) @ torch.randn(1, 64, generator=generator)

    def original(of: str) -> torch.Tensor:
        base = dequantize(gated_layers(model)[of].base_layer)
        return base + error if of == name else base

    start_at_quantization_error(model, [make_batch(rows=4)], original, generator=generator)
    torch.testing.assert_close(layer.s * layer.B @ layer.A, error, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.A[1:], born[1:], rtol=0, atol=0)
    assert not layer.B[:, 1:].any()
    assert not any(other.B.any() for other in gated_layers(model).values() if other is not layer)


def test_inputs_are_those_of_real_tokens_and_a_few_hundred(tiny_llama, make_batch):
    model = attach(tiny_llama(), r=2, alpha=4, seed=0)
    batch = [make_batch(rows=3, tokens=9, seed=0), make_batch(rows=40, tokens=12, seed=1)]
    batch[0]["attention_mask"][1, 4:] = 0
    seen = {}
    name = "model.layers.0.self_attn.q_proj"
    layer = gated_layers(model)[name]
    hook = layer.register_forward_pre_hook(lambda _, args: seen.setdefault(args[0].shape[:2], args[0]))
    kept = sampled_inputs(model, batch, torch.Generator().manual_seed(0))
    hook.remove()
    for inputs in kept.values():
        assert TOKENS / 2 < sum(map(len, inputs)) <= TOKENS + 2
        assert 11 * len(inputs[0]) < len(inputs[1])  # as many of each as it has, but for shared prefixes
    # Every kept row is an input that the map had, at no padding.
    embedded = model.get_base_model().model.embed_tokens(batch[0]["input_ids"])
    normed = model.get_base_model().model.layers[0].input_layernorm(embedded)
    real = normed[batch[0]["attention_mask"].bool()].detach()
    nearest = torch.cdist(kept[name][0], real).min(dim=1)
    assert nearest.values.max() < 1e-3
    assert 8 <= len(kept[name][0]) <= len(real) / 2 + 2


@pytest.mark.parametrize(
    ("lengths", "count"), [([40] * 20, 13), ([600] * 20, 4), ([300, 300, 1, 1, 1, 1], 4), ([40] * 3, 3)]
)
def test_rows_are_drawn_until_they_have_tokens_enough(lengths, count):
    half = (len(lengths) + 1) // 2
    ids = torch.arange(len(lengths))[:, None].expand(-1, max(lengths))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    batch = [{"input_ids": ids[part], "attention_mask": mask[part]} for part in (slice(half), slice(half, None))]
    drawn = some_rows(batch, torch.Generator().manual_seed(0))
    rows = [row for micro in drawn for row in micro["input_ids"][:, 0].tolist()]
    assert len(set(rows)) == len(rows) >= count and (len(rows) == count or min(lengths) == 1)
    assert torch.equal(torch.cat([micro["attention_mask"] for micro in drawn]), mask[rows])
    other = some_rows(batch, torch.Generator().manual_seed(1))
    assert count == len(lengths) or [m["input_ids"].tolist() for m in other] != [m["input_ids"].tolist() for m in drawn]


def test_a_base_stored_in_4_bits_is_refused(save_tiny_llama, tmp_path):
    loaded = load_base(resolve(str(save_tiny_llama(tmp_path / "whole"))), dtype="float32")
    loaded.model.save_pretrained(tmp_path / "4bit")
    weights = original_weights(open_checkpoint(resolve(str(tmp_path / "whole")))[0], "whole")
    assert weights("model.layers.0.mlp.up_proj").shape == (128, 64)
    with pytest.raises(InputError, match=r"4bit is stored in 4 bits: use the 16-bit model"):
        original_weights(open_checkpoint(resolve(str(tmp_path / "4bit")))[0], "small-4bit")

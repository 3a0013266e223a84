"""The principal basis against the decompositions of the full matrices, and Adam in turned coordinates."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qalora.adapter.model import attach, gated_layers, load_adapter, ranks, save_adapter
from qalora.adapter.principal import into_basis, principal, turned_moments
from qalora.errors import AnswerNo


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 40, generator=generator) * torch.tensor([3.0, 1, 0.1, 2, 5, 0.01])[:, None]
    return A, torch.randn(30, 6, generator=generator)


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(200, 40, generator=generator) @ torch.randn(40, 40, generator=generator)


def test_the_function_stays(factors, inputs):
    A, B = factors
    for gram in (None, (inputs @ A.T).T @ (inputs @ A.T)):
        found = principal(A, B, gram)
        torch.testing.assert_close(found.B @ found.A, (B.double() @ A.double()), rtol=0, atol=1e-10)
        torch.testing.assert_close(found.turn @ A.double(), found.A, rtol=0, atol=1e-10)
        torch.testing.assert_close(B.double() @ found.back, found.B, rtol=0, atol=1e-8)
        torch.testing.assert_close(found.A.norm(dim=1), found.B.norm(dim=0))


def test_the_first_ranks_are_the_truncated_svd(factors):
    A, B = factors
    found = principal(A, B)
    U, S, Vh = torch.linalg.svd(B.double() @ A.double())
    torch.testing.assert_close(found.values, S[:6])
    for k in (1, 3, 5):
        torch.testing.assert_close(found.B[:, :k] @ found.A[:k], U[:, :k] * S[:k] @ Vh[:k], rtol=0, atol=1e-9)


def test_with_inputs_the_first_ranks_leave_least_of_the_outputs(factors, inputs):
    """Against Eckart-Young on the outputs themselves."""
    A, B = factors
    low = inputs @ A.T
    found = principal(A, B, low.T @ low)
    outputs = (low @ B.T).double()
    U, S, Vh = torch.linalg.svd(outputs, full_matrices=False)
    torch.testing.assert_close(found.values, S[:6], rtol=1e-5, atol=1e-4)
    for k in (1, 3, 5):
        kept = inputs.double() @ (found.B[:, :k] @ found.A[:k]).T
        torch.testing.assert_close(kept, U[:, :k] * S[:k] @ Vh[:k], rtol=1e-4, atol=1e-3 * float(S[0]))


@pytest.mark.parametrize("dead", ["B", "A", "both equal"])
def test_ranks_of_no_energy_leave(factors, dead):
    A, B = factors
    if dead == "B":
        B[:, 2] = 0
    elif dead == "A":
        A[4] = 0
    else:
        A[1] = A[0]
    found = principal(A, B)
    assert len(found.A) == 5
    torch.testing.assert_close(found.B @ found.A, B.double() @ A.double(), rtol=0, atol=1e-10)


def test_ranks_that_cancel_out_have_no_energy(factors):
    """Up to what fp32 factors can say of the sum."""
    A, B = factors
    A, B = torch.cat([A, A]), torch.cat([B, -B * (1 + 1e-9)], dim=1)
    assert len(principal(A, B).A) == 0


def test_an_adapter_that_is_zero_has_no_rank(factors):
    A, B = factors
    assert len(principal(A, torch.zeros_like(B)).A) == 0


def test_first_moments_go_over_exactly(factors):
    """Adam's first moment is a mean of gradients, which autograd takes in both coordinates."""
    A, B = (factor.double().requires_grad_() for factor in factors)
    found = principal(A.detach(), B.detach())
    A2, B2 = found.A.clone().requires_grad_(), found.B.clone().requires_grad_()
    target = torch.randn(30, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for left, right in ((B, A), (B2, A2)):
        (torch.tanh(left @ right) * target).sum().backward()
    of_A, of_B = turned_moments(found, A.grad, B.grad, order=1)
    torch.testing.assert_close(of_A, A2.grad, rtol=0, atol=1e-8)
    torch.testing.assert_close(of_B, B2.grad, rtol=0, atol=1e-8)


def test_second_moments_of_uncorrelated_gradients_go_over_in_the_mean(factors):
    A, B = factors
    found = principal(A, B)
    generator = torch.Generator().manual_seed(3)
    spread = torch.rand(6, 1, generator=generator, dtype=torch.float64) + 0.5
    gradients = torch.randn(20_000, 6, 5, generator=generator, dtype=torch.float64) * spread
    turned = found.back.T @ gradients
    of_A, _ = turned_moments(found, gradients.square().mean(0), torch.zeros(30, 6), order=2)
    torch.testing.assert_close(of_A, turned.square().mean(0), rtol=0.1, atol=0)


def test_more_ranks_than_the_module_is_wide():
    generator = torch.Generator().manual_seed(4)
    for shape in ((12, 6, 40), (12, 40, 6), (12, 6, 5)):
        r, fan_in, fan_out = shape
        A, B = torch.randn(r, fan_in, generator=generator), torch.randn(fan_out, r, generator=generator)
        for gram in (None, A.double() @ A.double().T):
            found = principal(A, B, gram)
            assert len(found.A) == min(fan_in, fan_out)
            torch.testing.assert_close(found.B @ found.A, B.double() @ A.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("basis", ["trained", "svd", "svd-act"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_a_model_computes_the_same_in_every_basis(tiny_adapter, make_batch, basis, four_bit):
    model, batch = tiny_adapter(four_bit=four_bit).eval(), make_batch()
    layers = gated_layers(model)
    dead = list(layers)[3]
    layers[list(layers)[1]].B.data[:, 1] = 0
    layers[dead].B.data.zero_()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = model(**inputs).logits
        values = into_basis(model, basis, [batch])
        after = model(**inputs).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6 * float(before.abs().max()) * 10)
    assert {name: len(of) for name, of in values.items()} == ranks(model)
    assert (dead in ranks(model)) == (basis == "trained")
    assert ranks(model)[list(layers)[1]] == (4 if basis == "trained" else 3)
    assert model.peft_config["default"].rank_pattern == ranks(model)


def test_values_are_the_singular_values_of_what_is_added(tiny_adapter, make_batch):
    model, batch = tiny_adapter(alpha=3).eval(), make_batch()
    name, layer = next(iter(gated_layers(model).items()))
    update = layer.s * layer.B.detach().double() @ layer.A.detach().double()
    assert into_basis(model, "svd")[name] == pytest.approx(torch.linalg.svdvals(update)[:4].tolist())
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hook.remove()
    outputs = torch.cat([x.flatten(0, 1) for x in seen]).double() @ update.T
    expected = torch.linalg.svdvals(outputs)[:4] / len(outputs) ** 0.5
    assert into_basis(model, "svd-act", [batch])[name] == pytest.approx(expected.tolist(), rel=1e-4)


def test_an_adapter_that_adds_nothing_has_no_basis(tiny_llama):
    with pytest.raises(AnswerNo, match="adds nothing"):
        into_basis(attach(tiny_llama(), r=2, alpha=2), "svd")


def test_scalings_of_rslora_stay_right(tiny_llama, randomize_B, tmp_path):
    """alpha over √r has no alpha that gives it exactly at another rank."""
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "up_proj"])
    get_peft_model(tiny_llama(), config).save_pretrained(str(tmp_path / "made"))
    model = randomize_B(load_adapter(tiny_llama(), tmp_path / "made")).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        into_basis(model, "svd")
        save_adapter(model, tmp_path / "turned")
        after = PeftModel.from_pretrained(tiny_llama(), tmp_path / "turned").eval()(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))

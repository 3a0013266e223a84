"""The sketch against ∂L/∂W itself, which autograd gives for an unfrozen copy of the base."""

from __future__ import annotations

from types import MethodType

import pytest
import torch

from qalora.adapter.gradient_start import START_NORM, gradient_directions, start_along_gradient, starting_rows
from qalora.adapter.model import gated_layers
from qalora.base.quantized import dequantize
from qalora.training.activations import set_checkpointing

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture
def problem(tiny_adapter, make_batch):
    """make(four_bit) → (the model, its batch in two micro-batches, module → ∂L/∂W of the mean loss, fp64)."""

    def make(four_bit: bool = False):
        model = tiny_adapter(four_bit=four_bit)
        batches = [make_batch(rows=2, seed=1), make_batch(rows=3, tokens=9, seed=2)]
        tokens = sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in batches)
        layers = gated_layers(model)
        wanted = {}
        for name in NAMES:
            layer = layers[name]
            weight = (dequantize(layer.base_layer) if four_bit else layer.base_layer.weight).detach().clone()
            delta = torch.zeros_like(weight, requires_grad=True)
            hook = layer.register_forward_hook(lambda _, x, z, delta=delta: z + x[0] @ delta.T)
            # Fused modules do not call their maps' forwards, so the whole module goes the plain way here.
            module = model.get_base_model().get_submodule(name.rpartition(".")[0])
            fused, module.forward = module.forward, MethodType(type(module).forward, module)
            loss = sum(model(**micro).row_losses.sum() for micro in batches) / tokens
            wanted[name] = torch.autograd.grad(loss, delta)[0].double()
            hook.remove()
            module.forward = fused
        return model, batches, wanted

    return make


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("kept", [False, True, "selective"])
def test_directions_are_the_leading_singular_vectors(problem, four_bit, kept):
    model, batches, wanted = problem(four_bit)
    set_checkpointing(model, kept)
    found = gradient_directions(model, batches, dict.fromkeys(NAMES, 60), torch.Generator().manual_seed(0))
    for name, gradient in wanted.items():
        # 64 columns are all that a map of width 64 has, so the sketch is exact.
        _, values, rows = torch.linalg.svd(gradient, full_matrices=False)
        directions = found[name]
        torch.testing.assert_close(directions.values.double(), values[:60], rtol=1e-3, atol=1e-6 * float(values[0]))
        for index in range(3):
            assert abs(float(directions.rows[index].double() @ rows[index])) == pytest.approx(1, abs=1e-3)


def test_a_narrow_sketch_holds_most_of_what_there_is(problem):
    model, batches, wanted = problem()
    found = gradient_directions(model, batches, dict.fromkeys(NAMES, 4), torch.Generator().manual_seed(0))
    for name, gradient in wanted.items():
        best = torch.linalg.svdvals(gradient)[:4].norm()
        rows = found[name].rows.double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
        assert (gradient @ rows.T).norm() > 0.8 * best  # a random span of four has a quarter of it


def test_the_start_leaves_the_function_and_everything_else(problem, make_batch):
    model, batches, _ = problem()
    layers = gated_layers(model)
    for layer in layers.values():
        layer.B.data.zero_()
    ids = make_batch()["input_ids"]
    before, A = model(ids).logits, {name: layer.A.detach().clone() for name, layer in layers.items()}
    modes = [module.training for module in model.modules()]
    start_along_gradient(model, batches, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-6, atol=1e-6)
    assert modes == [module.training for module in model.modules()]
    for name, layer in layers.items():
        assert layer.A.shape == A[name].shape and layer.B.shape[1] == len(A[name])
        assert layer.A.requires_grad and layer.B.requires_grad and layer.A.grad is None
        torch.testing.assert_close(layer.A.norm(dim=1), torch.full((len(A[name]),), START_NORM))
    again = {name: layer.A.detach().clone() for name, layer in layers.items()}
    start_along_gradient(model, batches, generator=torch.Generator().manual_seed(0))
    for name, layer in layers.items():
        torch.testing.assert_close(layer.A.abs(), again[name].abs(), rtol=1e-3, atol=1e-4)


def test_one_step_of_b_from_this_start_gains_more_than_from_a_random_one(problem):
    """To first order, a step of B by −η ∂L/∂B lowers the loss by η ‖∂L/∂B‖² = η s² ‖∂L/∂W Aᵀ‖²."""
    model, batches, wanted = problem()
    layers = gated_layers(model)
    random = {name: (wanted[name] @ layers[name].A.double().T).norm() for name in NAMES}
    start_along_gradient(model, batches, generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        assert (wanted[name] @ layers[name].A.double().T).norm() > 2 * random[name]


def test_no_gradient_no_direction():
    class Empty:
        values, rows = torch.zeros(3), torch.eye(3)

    assert not len(starting_rows(Empty))

"""The sketch against ∂L/∂W itself, which autograd gives for an unfrozen copy of the base, and the inputs' own second
moments."""

from __future__ import annotations

from types import MethodType

import pytest
import torch

from qalora.adapter.model import gated_layers
from qalora.adapter.start.gradient import START_NORM, Directions, gradient_directions, start_along_gradient
from qalora.base.quantized import dequantize
from qalora.kernels.activations import set_checkpointing
from qalora.kernels.loss import row_losses

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj"]


@pytest.fixture
def problem(tiny_adapter, make_batch):
    """make(four_bit) → (the model, its batch in two micro-batches, module → (∂L/∂W of the mean loss, E[x xᵀ] over E|x|²
    / in), fp64); a row of the batch is padded."""

    def make(four_bit: bool = False):
        model = tiny_adapter(four_bit=four_bit)
        batches = [make_batch(rows=2, seed=1), make_batch(rows=3, tokens=9, seed=2)]
        batches[1]["attention_mask"][1, 6:] = 0
        batches[1]["labels"][1, 6:] = -100
        tokens = sum(int((micro["labels"][:, 1:] != -100).sum()) for micro in batches)
        layers = gated_layers(model)
        wanted = {}
        for name in NAMES:
            layer, inputs = layers[name], []
            weight = (dequantize(layer.base_layer) if four_bit else layer.base_layer.weight).detach().clone()
            delta = torch.zeros_like(weight, requires_grad=True)

            def moved(_, x, z, delta=delta, inputs=inputs):
                inputs.append(x[0].detach())
                return z + x[0] @ delta.T

            hook = layer.register_forward_hook(moved)
            # Fused modules do not call their maps' forwards, so the whole module goes the plain way here.
            module = model.get_base_model().get_submodule(name.rpartition(".")[0])
            fused, module.forward = module.forward, MethodType(type(module).forward, module)
            loss = sum(row_losses(model, micro).sum() for micro in batches) / tokens
            gradient = torch.autograd.grad(loss, delta)[0].double()
            hook.remove()
            module.forward = fused
            x = torch.cat([distinct(x, micro).double() for x, micro in zip(inputs, batches, strict=True)])
            wanted[name] = gradient, x.T @ x / (x.square().sum() / x.shape[1])
        return model, batches, wanted

    return make


def distinct(x: torch.Tensor, micro) -> torch.Tensor:
    """(tokens, in) without padding, also where the model has worked on what is distinct only."""
    mask = micro["attention_mask"].bool()
    return x[mask] if x.shape[:2] == mask.shape else x.flatten(0, 1)


def whitened(gradient: torch.Tensor, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(∂L/∂W M, M) with M = (C + 1)^(−1/2)."""
    values, vectors = torch.linalg.eigh(moments + torch.eye(len(moments), dtype=torch.float64))
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    return gradient @ root, root


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("kept", [False, True, "selective"])
def test_directions_are_the_leading_singular_vectors_in_the_inputs_metric(problem, four_bit, kept):
    model, batches, wanted = problem(four_bit)
    set_checkpointing(model, kept)
    found = gradient_directions(model, batches, dict.fromkeys(NAMES, 60), torch.Generator().manual_seed(0))
    for name in NAMES[:2]:
        # 64 columns are all that a map of width 64 has, so the sketch is exact; of a wider one, some columns are
        # arbitrary.
        gradient, moments = wanted[name]
        in_metric, root = whitened(gradient, moments)
        _, values, vectors = torch.linalg.svd(in_metric, full_matrices=False)
        directions = found[name]
        torch.testing.assert_close(
            directions.slopes.double(), START_NORM * values[:60], rtol=1e-3, atol=1e-6 * float(values[0])
        )
        rows = START_NORM * vectors[:3] @ root
        for index in range(3):
            row = directions.rows[index].double()
            torch.testing.assert_close(row * torch.sign(row @ rows[index]), rows[index], rtol=5e-3, atol=1e-4)


def test_rows_move_the_output_alike_and_slopes_are_their_gradients(problem):
    model, batches, wanted = problem()
    found = gradient_directions(model, batches, dict.fromkeys(NAMES, 4), torch.Generator().manual_seed(0))
    for name, (gradient, moments) in wanted.items():
        rows = found[name].rows.double()
        metric = moments + torch.eye(len(moments), dtype=torch.float64)
        torch.testing.assert_close(
            rows @ metric @ rows.T, START_NORM**2 * torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-4
        )
        columns, slopes = gradient @ rows.T, found[name].slopes.double()
        torch.testing.assert_close(columns.norm(dim=0), slopes, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(
            columns.T @ columns, torch.diag(slopes**2), rtol=1e-2, atol=1e-3 * float(slopes[0]) ** 2
        )


def test_a_narrow_sketch_holds_most_of_what_there_is(problem):
    model, batches, wanted = problem()
    found = gradient_directions(model, batches, dict.fromkeys(NAMES, 4), torch.Generator().manual_seed(0))
    for name, (gradient, moments) in wanted.items():
        best = START_NORM * torch.linalg.svdvals(whitened(gradient, moments)[0])[:4].norm()
        assert found[name].slopes.norm() > 0.8 * best  # a random span of four has a quarter of it


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
        assert (layer.A.norm(dim=1) < START_NORM * 1.001).all()
    again = {name: layer.A.detach().clone() for name, layer in layers.items()}
    start_along_gradient(model, batches, generator=torch.Generator().manual_seed(0))
    for name, layer in layers.items():
        torch.testing.assert_close(layer.A.abs(), again[name].abs(), rtol=1e-3, atol=1e-4)


def test_ranks_from_this_start_gain_more_by_what_they_move_than_random_ones(problem):
    """To first order, a step of B by −η ∂L/∂B lowers the loss by η s² ‖∂L/∂W Aᵀ‖², and moves the output as far as A x
    is long."""
    model, batches, wanted = problem()
    layers = gated_layers(model)

    def gain(name: str) -> float:
        (gradient, moments), A = wanted[name], layers[name].A.detach().double()
        metric = moments + torch.eye(len(moments), dtype=torch.float64)
        return float((gradient @ A.T).square().sum() / (A @ metric @ A.T).trace())

    random = {name: gain(name) for name in NAMES}
    start_along_gradient(model, batches, generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        assert gain(name) > 2 * random[name]


def test_no_gradient_no_direction():
    assert not len(Directions(rows=torch.eye(3), slopes=torch.zeros(3)).known)

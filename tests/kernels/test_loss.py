from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from qalora.kernels import fused
from qalora.kernels import loss as module
from qalora.kernels.loss import fused_loss, label_only_loss, liger_loss, row_losses, summed_loss


@pytest.fixture
def problem():
    """hidden (3, 7, 16), labels (3, 7) with gaps, head (50, 16)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 50, (3, 7), generator=generator)
    labels[0, :4] = -100
    labels[1] = -100  # a row without any label
    labels[2, 3] = -100
    return torch.randn(3, 7, 16, generator=generator), labels, torch.randn(50, 16, generator=generator)


def reference(hidden, labels, head):
    """(rows,) sums from the full logits."""
    logits = F.linear(hidden, head).float()
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    return each.sum(1)


def test_row_losses_are_the_full_logits_cross_entropy(problem):
    torch.testing.assert_close(label_only_loss(*problem), reference(*problem), rtol=1e-6, atol=1e-5)
    assert label_only_loss(*problem)[1] == 0


def test_sums_over_a_large_vocabulary_lose_nothing():
    generator = torch.Generator().manual_seed(0)
    hidden, head = 4 * torch.randn(1, 9, 16, generator=generator), torch.randn(50_000, 16, generator=generator)
    labels = torch.randint(0, 50_000, (1, 9), generator=generator)
    logits = F.linear(hidden, head).double()
    exact = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    torch.testing.assert_close(label_only_loss(hidden, labels, head)[0].double(), exact, rtol=1e-6, atol=0)


def test_logits_beyond_the_range_of_exp_have_their_loss(problem):
    hidden, labels, head = problem
    hidden = (100 * hidden).requires_grad_()  # logits of some hundreds: exp overflows from 88 on
    found = label_only_loss(hidden, labels, head)
    torch.testing.assert_close(found, reference(hidden, labels, head), rtol=1e-6, atol=1e-4)
    found.sum().backward()
    assert hidden.grad.isfinite().all()


def test_gradient_is_autograds(problem):
    hidden, labels, head = problem
    weights = torch.tensor([1.0, 5.0, -0.5])  # a factor of its own for each row
    gradients = []
    for function in (label_only_loss, reference):
        leaf = hidden.clone().requires_grad_()
        (function(leaf, labels, head) * weights).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert not gradients[0][1].any() and not gradients[0][:, -1].any()


def test_a_fused_loss_gets_the_supervised_positions(problem):
    hidden, labels, head = problem
    leaf, other = (hidden.clone().requires_grad_() for _ in range(2))

    def fused(head, states, targets):
        return F.cross_entropy(F.linear(states, head), targets, reduction="sum")

    expected = label_only_loss(leaf, labels, head).sum()
    found = fused_loss(other, labels, head, fused)
    for loss in (expected, found):
        loss.backward()
    torch.testing.assert_close(found, reference(*problem).sum(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(other.grad, leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.fixture
def unknown_liger():
    """Whether Liger-Kernel is there is looked up once; in the test, and after it, anew."""
    fused.liger.cache_clear()
    yield
    fused.liger.cache_clear()


def test_liger_is_taken_where_it_is_installed(monkeypatch, unknown_liger):
    package, transformers = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    package.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    transformers.LigerFusedLinearCrossEntropyLoss = lambda reduction: ("liger", reduction)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    assert liger_loss() == ("liger", "sum")
    fused.liger.cache_clear()
    monkeypatch.delitem(sys.modules, "liger_kernel")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert liger_loss() is None


@pytest.mark.parametrize("tokens_a_chunk", [1, 2, 3, 100])
def test_chunks_change_nothing(problem, monkeypatch, tokens_a_chunk):
    hidden, labels, head = problem
    monkeypatch.setattr(module, "LOGITS_CHUNK", tokens_a_chunk * 4 * len(head))
    leaf, other = (hidden.clone().requires_grad_() for _ in range(2))
    label_only_loss(leaf, labels, head).sum().backward()
    reference(other, labels, head).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-6)


def test_bf16_loss_is_fp32_of_bf16_logits(problem):
    hidden, labels, head = problem
    hidden, head = hidden.bfloat16(), head.bfloat16()
    found = label_only_loss(hidden, labels, head)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, reference(hidden, labels, head), rtol=1e-6, atol=1e-5)
    leaf, other = (hidden.clone().requires_grad_() for _ in range(2))
    label_only_loss(leaf, labels, head).sum().backward()
    reference(other, labels, head).sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert (leaf.grad - other.grad).float().norm() <= 1e-2 * other.grad.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied-head"])
def test_model_loss_and_gradient_are_the_full_logits_ones(tiny_llama, make_batch, dtype, tied):
    batch, found = make_batch(), []
    tokens = (batch["labels"][:, 1:] != -100).sum()
    for label_only in (True, False):
        model = tiny_llama(dtype, tie_word_embeddings=tied)
        weight = model.model.layers[0].mlp.down_proj.weight.requires_grad_()
        loss = summed_loss(model, batch) / tokens if label_only else model(**batch).loss
        loss.backward()
        found.append((loss.detach(), weight.grad.float()))
    (loss, gradient), (full_loss, full_gradient) = found
    torch.testing.assert_close(loss, full_loss, rtol=1e-6, atol=1e-6)
    assert (gradient - full_gradient).norm() <= {torch.float32: 1e-5, torch.bfloat16: 2e-2}[
        dtype
    ] * full_gradient.norm()


@pytest.mark.parametrize("words", [1, 7, 50])
def test_a_head_of_another_dtype_goes_by_parts_of_the_vocabulary(problem, monkeypatch, words):
    hidden, labels, head = problem
    head = head.bfloat16()
    monkeypatch.setattr(module, "LOGITS_CHUNK", words * 4 * hidden.shape[-1])
    found = label_only_loss(hidden, labels, head)
    torch.testing.assert_close(found, reference(hidden, labels, head.float()), rtol=1e-5, atol=1e-5)


def test_row_losses_sum_to_each_row_alone(tiny_llama, make_batch):
    model, batch = tiny_llama(), make_batch()
    together = row_losses(model, batch)
    for row in range(4):
        alone = model(**{key: value[row : row + 1] for key, value in batch.items()}).loss
        tokens = (batch["labels"][row, 1:] != -100).sum()
        torch.testing.assert_close(together[row], alone * tokens, rtol=1e-5, atol=1e-5)


def test_the_head_runs_on_supervised_positions_alone(tiny_llama, make_batch, monkeypatch):
    rows = []
    linear = F.linear
    monkeypatch.setattr(
        module.F,
        "linear",
        lambda x, w, *b: (rows.append(len(x)) if len(w) == 128 else None, linear(x, w, *b))[1],
    )
    batch = make_batch()
    row_losses(tiny_llama(), batch)
    assert rows == [int((batch["labels"][:, 1:] != -100).sum())]


def test_without_grad_only_the_loss_is_formed(tiny_llama, make_batch):
    model, batch = tiny_llama(), make_batch()
    with torch.no_grad():
        found = summed_loss(model, batch)
    assert not found.requires_grad
    assert torch.equal(found, summed_loss(model, batch))


@pytest.mark.parametrize("chunk", [1, 10**9], ids=["token by token", "at once"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.7])
def test_smoothed_loss_and_gradient_are_those_of_transformers_label_smoother(
    tiny_llama, make_batch, monkeypatch, epsilon, chunk
):
    from transformers.trainer_pt_utils import LabelSmoother

    monkeypatch.setattr(module, "LOGITS_CHUNK", chunk)
    batch, found = make_batch(), []
    for ours in (True, False):
        model = tiny_llama()
        model.get_input_embeddings().weight.requires_grad_()
        if ours:
            loss = summed_loss(model, batch, smoothing=epsilon) / 5
        else:
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            smoother = LabelSmoother(epsilon=epsilon)
            loss = smoother({"logits": logits}, batch["labels"], shift_labels=True, num_items_in_batch=5)
        found.append((loss.detach(), *torch.autograd.grad(loss, model.get_input_embeddings().weight)))
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))

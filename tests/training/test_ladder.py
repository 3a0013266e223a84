"""Memory that runs out: every rung computes the same gradients, and the last one says what to do."""

from __future__ import annotations

import pytest
import torch

from qalora.adapter.model import gated_layers
from qalora.errors import AnswerNo
from qalora.kernels.activations import checkpointing_of
from qalora.sizes import MLP_TILE
from qalora.training.ladder import Ladder, pieces


@pytest.fixture
def ladder(tiny_adapter):
    said: list[str] = []
    ladder = Ladder(tiny_adapter().train(), said.append)
    return ladder, said


def gradients(model):
    return [p.grad.clone() for layer in gated_layers(model).values() for p in (layer.A, layer.B)]


def worker(model, tokens, allowed):
    """A forward and backward that runs out of memory, after some gradients are there, unless `allowed(inputs)`."""

    def work(inputs):
        loss = model(**inputs, num_items_in_batch=tokens).loss
        loss.backward()
        if not allowed(inputs):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss.detach()

    return work


def test_halves_give_the_loss_and_gradients_of_the_whole(ladder, make_batch):
    ladder, said = ladder
    batch = make_batch(rows=7)
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    whole = ladder.run(batch, worker(ladder.model, tokens, lambda inputs: True))
    expected = gradients(ladder.model)
    earlier = [torch.ones_like(grad) for grad in expected]
    parameters = [p for layer in gated_layers(ladder.model).values() for p in (layer.A, layer.B)]
    for parameter, grad in zip(parameters, earlier, strict=True):
        parameter.grad = grad.clone()  # of an earlier micro-batch of the same step
    loss = ladder.run(batch, worker(ladder.model, tokens, lambda inputs: len(inputs["labels"]) <= 2))
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(gradients(ladder.model), [g + 1 for g in expected], rtol=1e-5, atol=1e-6)
    assert [line.split(" pieces")[0][-1] for line in said] == ["2", "4"]
    said.clear()
    ladder.run(batch, worker(ladder.model, tokens, lambda inputs: len(inputs["labels"]) <= 2))
    assert not said  # the rung stays


def test_the_rungs_after_a_single_row_and_the_last_word(ladder, make_batch):
    ladder, said = ladder
    kinds = []

    def never(inputs):
        kinds.append(checkpointing_of(ladder.model))
        return False

    with pytest.raises(AnswerNo, match=r"one row of 12 tokens.*data\.max_seq_len or lora\.r"):
        ladder.run(make_batch(rows=2), worker(ladder.model, 9, never))
    assert kinds == [False, False, "selective", True, "offload", "offload"]
    rungs = ("2 pieces", "=selective", "=true", "=offload", f"mlp_tile={MLP_TILE}")
    assert [rung in line for rung, line in zip(rungs, said, strict=True)] == [True] * 5
    assert all(p.grad is None for p in ladder.model.parameters())


def test_packed_samples_are_parted_where_one_begins():
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 0, 1, 2]])
    batch = {"input_ids": torch.arange(10)[None], "labels": torch.arange(10)[None], "position_ids": positions}
    assert [part["input_ids"][0].tolist() for part in pieces(batch, 1)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [part["input_ids"][0].tolist() for part in pieces(batch, 2)] == [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]]
    assert all(part["position_ids"][0, 0] == 0 for part in pieces(batch, 3))


def test_other_errors_pass(ladder, make_batch):
    ladder, said = ladder

    def broken(inputs):
        raise ValueError("no memory error")

    with pytest.raises(ValueError, match="no memory error"):
        ladder.run(make_batch(), broken)
    assert not said

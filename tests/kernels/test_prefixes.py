"""Shared prefixes against the same rows computed one by one."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.neftune import activate_neftune

from qalora.adapter.layer import gated
from qalora.adapter.model import attach, gated_layers
from qalora.kernels import prefixes
from qalora.kernels.activations import set_checkpointing
from qalora.kernels.loss import row_losses
from qalora.kernels.prefixes import ATTENTION, can_share, final_hidden, share

ROWS = [  # prompts in common, a whole row in common, nothing in common, a row that ends where another goes on
    [5, 6, 7, 8, 9, 10, 11],
    [5, 6, 7, 8, 20, 21],
    [5, 6, 7, 8, 9, 10, 11],
    [30, 6, 7, 8],
    [5, 6, 7],
]


def padded(rows: list[list[int]], pad: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return ids, (torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]).long()


@pytest.fixture
def batch():
    ids, mask = padded(ROWS)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def counted(monkeypatch):
    """Positions that the decoder was given, a call each."""
    calls = []
    plain = prefixes.share

    def watched(*args):
        found = plain(*args)
        calls.append(None if found is None else len(found.tokens))
        return found

    monkeypatch.setattr(prefixes, "share", watched)
    return calls


def mean_loss(model, batch) -> torch.Tensor:
    return row_losses(model, batch).sum() / (batch["labels"][:, 1:] != -100).sum()


def gradients(model, loss) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6).filter(
        lambda rows: (
            len({tuple(row[: i + 1]) for row in rows for i in range(len(row))}) <= 0.9 * len(rows) * max(map(len, rows))
        )
    )
)
@settings(max_examples=100, deadline=None)
def test_there_is_one_token_for_each_distinct_prefix(rows):
    ids, mask = padded(rows)
    shared = share(ids, mask)
    prefixes_of_rows = [tuple(row[: i + 1]) for row in rows for i in range(len(row))]
    assert len(shared.tokens) == len(set(prefixes_of_rows))
    by_token = {}
    width = ids.shape[1]
    for r, row in enumerate(rows):
        for i in range(len(row)):
            token = int(shared.places[r, i])
            assert by_token.setdefault(token, tuple(row[: i + 1])) == tuple(row[: i + 1])
            assert shared.tokens[token] % width == i and ids.flatten()[shared.tokens[token]] == row[i]


def test_rows_with_little_in_common_are_left_padded():
    ids = torch.arange(3, 51).view(4, 12)
    assert share(ids, torch.ones_like(ids)) is None


def test_more_rows_than_can_be_compared_are_left_padded(monkeypatch):
    ids, mask = padded(ROWS)
    monkeypatch.setattr(prefixes, "MOST_COMPARED", 5 * 5 * 7 - 1)
    assert share(ids, mask) is None
    monkeypatch.setattr(prefixes, "MOST_COMPARED", 5 * 5 * 7)
    assert share(ids, mask) is not None


@pytest.mark.parametrize("kept", [False, "selective", True])
@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_the_padded_batch(tiny_adapter, batch, counted, kept, four_bit, dtype):
    model = tiny_adapter(four_bit=four_bit, dtype=dtype).train()
    set_checkpointing(model, kept)
    model.get_base_model().set_attn_implementation("sdpa")
    wanted = row_losses(model, batch)
    expected = gradients(model, wanted.sum())
    model.get_base_model().set_attn_implementation(ATTENTION)
    losses = row_losses(model, batch)
    found = gradients(model, losses.sum())
    assert counted == [13]  # 7 of the first row, 2 of the second, 4 of the fourth, where 35 were padded
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(losses, wanted, rtol=tolerance, atol=tolerance)
    for name, want in expected.items():
        assert (found[name] - want).norm() <= tolerance * want.norm() + 1e-7, name


@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_the_other_families(batch, counted, family):
    """Their masks and windows take other ways through transformers; the reference has neither our attention nor our
    sharing."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=32, initializer_range=0.2, use_cache=False,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).requires_grad_(False)
    adapter = attach(model, r=4, alpha=8, seed=1).train()
    for index, layer in enumerate(gated_layers(adapter).values()):
        layer.B.data.copy_(0.1 * torch.randn(layer.B.shape, generator=torch.Generator().manual_seed(index)))
    loss = mean_loss(adapter, batch)
    found = gradients(adapter, loss)
    assert counted == [13] and {name: len(modules) for name, modules in model.kernels.modules.items()} == {
        "RMSNorm": 5, "fused SwiGLU": 2, "fused q, k, v": 2
    }  # fmt: skip
    model.kernels.remove()
    padded_loss = adapter(**batch).loss
    expected = gradients(adapter, padded_loss)
    torch.testing.assert_close(loss, padded_loss, rtol=1e-6, atol=1e-6)
    for name, want in expected.items():
        assert (found[name] - want).norm() <= 1e-5 * want.norm() + 1e-7, name


def test_hidden_states_are_those_of_each_row_alone(tiny_adapter, batch):
    model = tiny_adapter().get_base_model()
    model.set_attn_implementation(ATTENTION)
    with torch.no_grad():
        hidden = final_hidden(model, batch["input_ids"], batch["attention_mask"])
        for row, ids in enumerate(ROWS):
            alone = model.base_model(torch.tensor([ids])).last_hidden_state[0]
            torch.testing.assert_close(hidden[row, : len(ids)], alone, rtol=1e-4, atol=1e-5)


def test_where_rows_would_differ_nothing_is_shared(tiny_adapter, batch, counted):
    dropping = tiny_adapter(dropout=0.5).train()
    gated_model = tiny_adapter()
    other = tiny_adapter()
    windowed = tiny_adapter()
    noisy, forgetful = tiny_adapter(), tiny_adapter(attention_dropout=0.5)
    activate_neftune(noisy, 5.0)
    for model in (dropping, gated_model, windowed, noisy, forgetful):
        model.get_base_model().set_attn_implementation(ATTENTION)
    mean_loss(dropping, batch)
    name, layer = next(iter(gated_layers(gated_model).items()))
    with gated(gated_layers(gated_model), {name: torch.ones(len(ROWS), 1, len(layer.A))}):
        mean_loss(gated_model, batch)
    other.get_base_model().set_attn_implementation("sdpa")
    mean_loss(other, batch)
    windowed.config.sliding_window = 6
    windowed.get_base_model().config.sliding_window = 6
    mean_loss(windowed, batch)
    mean_loss(noisy.train(), batch)
    mean_loss(forgetful.train(), batch)
    assert counted == []
    assert can_share(windowed.get_base_model(), 6) and not can_share(windowed.get_base_model(), 7)
    mean_loss(dropping.eval(), batch)
    with gated(gated_layers(gated_model), {name: torch.ones(len(layer.A))}):
        mean_loss(gated_model, batch)
    mean_loss(noisy.eval(), batch)
    mean_loss(forgetful.eval(), batch)
    assert len(counted) == 4


@pytest.mark.parametrize("what", ["noise", "attention dropout"])
def test_what_is_drawn_at_random_is_drawn_as_in_a_model_of_transformers(tiny_llama, batch, what):
    """The same seed, the same padded batch: the same loss."""
    losses = []
    for ours in (True, False):
        model = tiny_llama(attention_dropout=0.5 if what == "attention dropout" else 0.0).train()
        model.set_attn_implementation(ATTENTION if ours else "sdpa")
        if what == "noise":
            activate_neftune(model, 5.0)
        torch.manual_seed(3)
        losses.append(mean_loss(model, batch) if ours else model(**batch).loss)
    assert torch.allclose(*losses, rtol=1e-6)
    assert not torch.allclose(losses[0], tiny_llama()(**batch).loss, rtol=1e-3)


@pytest.mark.parametrize(
    "mask",
    [
        [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],  # padded on the left
        [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0]],  # on either side
        [[1, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1]],  # with gaps
    ],
    ids=["left", "either side", "gaps"],
)
@pytest.mark.parametrize("positions", [False, True])
def test_a_batch_padded_elsewhere_is_what_transformers_makes_of_it(tiny_llama, mask, positions):
    mask = torch.tensor(mask)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]] * 3)
    batch = {
        "input_ids": ids.masked_fill(mask == 0, 1),
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100),
    }
    if positions:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    for ours in (True, False):
        model = tiny_llama()
        model.set_attn_implementation(ATTENTION if ours else "sdpa")
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
        loss = mean_loss(model, batch) if ours else model(**batch).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, weight)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_positions_or_embeddings_that_are_given_are_used(tiny_llama, batch):
    """With shared prefixes too, which know of neither."""
    found = []
    for ours in (True, False):
        model = tiny_llama()
        model.set_attn_implementation(ATTENTION if ours else "sdpa")
        positions = torch.arange(7).expand(5, 7) * 3
        embedded = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"] + 1)}
        masked = {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
        given = ({**batch, "position_ids": positions}, {**embedded, **masked})
        found.append([mean_loss(model, one) if ours else model(**one).loss for one in given])
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-5)


def test_a_model_with_this_attention_generates_and_pads_as_with_sdpa(tiny_llama):
    ids, mask = padded(ROWS)
    models = [tiny_llama(), tiny_llama()]
    models[1].set_attn_implementation(ATTENTION)
    left = [torch.tensor([[1, 1, 5, 6], [7, 8, 9, 10]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])]
    with torch.no_grad():
        assert torch.equal(*(model(ids, attention_mask=mask).logits for model in models))
        answers = [
            model.generate(left[0], attention_mask=left[1], max_new_tokens=5, do_sample=False) for model in models
        ]
    assert torch.equal(*answers)

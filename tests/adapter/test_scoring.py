from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qalora.adapter.ablation import (
    ablate,
    gate_gradients,
    scoring_mode,
)
from qalora.adapter.layer import gated
from qalora.adapter.model import gated_layers
from qalora.adapter.scoring import midpoint_shares, score_ranks
from qalora.errors import AnswerNo

BASES = [pytest.param(False, id="plain"), pytest.param(True, id="4bit")]
V = "model.layers.0.self_attn.v_proj"
DOWN = "model.layers.1.mlp.down_proj"


def reference_loss(model, batch):
    """Mean cross-entropy from the model's full logits, in fp64."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].double().flatten(0, 1), batch["labels"][:, 1:].flatten()).item()


def uniform_gates(layers, value):
    return {name: torch.full((len(layer.A),), value) for name, layer in layers.items()}


def mean_gate_gradients(model, batch, value):
    """∂L/∂α of every rank, from the rows' own gradients."""
    _, gradients, tokens = gate_gradients(model, batch, value)
    return {name: gradient.sum(0) / tokens.sum() for name, gradient in gradients.items()}


def split(batch, *sizes):
    parts = zip(*(tensor.split(sizes) for tensor in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


class Deleted:
    """Context: only the given ranks of a layer are in its tensors."""

    def __init__(self, layer, keep):
        self.layer, self.keep, self.whole = layer, keep, (layer.A.data, layer.B.data)

    def __enter__(self):
        self.layer.A.data, self.layer.B.data = self.whole[0][self.keep], self.whole[1][:, self.keep]

    def __exit__(self, *_):
        self.layer.A.data, self.layer.B.data = self.whole


def naive_scores(model, batch):
    """Eq. 6 by deleting ranks from the tensors, one forward each: (loss, base loss, drop, alone)."""
    layers = gated_layers(model)
    ranks = {name: range(len(layer.A)) for name, layer in layers.items()}
    loss, drop, alone = reference_loss(model, batch), {}, {}
    for name, layer in layers.items():
        drop[name] = []
        for rank in ranks[name]:
            with Deleted(layer, [k for k in ranks[name] if k != rank]):
                drop[name].append(reference_loss(model, batch) - loss)
    whole = {name: (layer.A.data, layer.B.data) for name, layer in layers.items()}
    for layer in layers.values():
        layer.A.data, layer.B.data = layer.A.data[:0], layer.B.data[:, :0]
    base_loss = reference_loss(model, batch)
    for name, layer in layers.items():
        alone[name] = []
        for rank in ranks[name]:
            A, B = whole[name]
            layer.A.data, layer.B.data = A[[rank]], B[:, [rank]]
            alone[name].append(base_loss - reference_loss(model, batch))
            layer.A.data, layer.B.data = A[:0], B[:, :0]
    for name, layer in layers.items():
        layer.A.data, layer.B.data = whole[name]
    return loss, base_loss, drop, alone


def in_fp64(model):
    """The model in fp64 throughout: LLaMA's own norm works in fp32, which drowns finite differences."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight.data.copy_(child.weight.data)
                setattr(parent, name, norm)
    return model.double()


def slope(model, batch, module, rank, at, step):
    """Finite difference of the loss in one gate, the others all at `at`; in fp64 over a fp64 model."""
    layers, losses = gated_layers(model), []
    for value in (at, at + step):
        gates = {name: gate.double() for name, gate in uniform_gates(layers, at).items()}
        gates[module][rank] = value
        with gated(layers, gates):
            losses.append(reference_loss(model, batch))
    return (losses[1] - losses[0]) / step


def assert_close(found, expected, rtol=1e-3, atol=1e-7):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            torch.as_tensor(found[name], dtype=torch.float64),
            torch.as_tensor(expected[name], dtype=torch.float64),
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# ----------------------------------------------------------------------------------------------------- invariant 3


@pytest.mark.parametrize("four_bit", BASES)
def test_gate_gradient_is_the_product_of_weight_and_gradient(tiny_adapter, make_batch, four_bit):
    model, batch = tiny_adapter(r=3, four_bit=four_bit).train(), make_batch()
    gradients = mean_gate_gradients(model, [batch], 1.0)
    model(**batch).loss.backward()
    layers = gated_layers(model)
    by_A = {name: (layer.A.grad * layer.A).sum(1).detach() for name, layer in layers.items()}
    by_B = {name: (layer.B.grad * layer.B).sum(0).detach() for name, layer in layers.items()}
    assert_close(gradients, by_A, atol=1e-6)
    assert_close(gradients, by_B, atol=1e-6)


@pytest.mark.parametrize("at", [1.0, 0.0], ids=["gates-open", "gates-closed"])
def test_gate_gradient_is_the_finite_difference(tiny_adapter, make_batch, at):
    batch = make_batch()
    gradients = mean_gate_gradients(tiny_adapter(r=2), [batch], at)
    fp64 = in_fp64(tiny_adapter(r=2))
    expected = {
        name: [
            (slope(fp64, batch, name, rank, at, 1e-4) + slope(fp64, batch, name, rank, at, -1e-4)) / 2
            for rank in range(2)
        ]
        for name in gradients
    }
    assert_close(gradients, expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("four_bit", BASES)
def test_exact_is_the_naive_loop_that_deletes_ranks(tiny_adapter, make_batch, four_bit):
    model, batch = tiny_adapter(r=3, four_bit=four_bit).train(), make_batch()
    scores = score_ranks(model, [batch], "exact")
    loss, base_loss, drop, alone = naive_scores(model, batch)
    assert scores.loss == pytest.approx(loss, abs=2e-6)
    assert scores.base_loss == pytest.approx(base_loss, abs=2e-6)
    assert_close(scores.drop, drop, rtol=0, atol=3e-6)
    assert_close(scores.alone, alone, rtol=0, atol=3e-6)
    assert max(abs(score) for ranks in drop.values() for score in ranks) > 1e-3  # far above the tolerance


def test_first_order_is_a_small_step_of_one_gate(tiny_adapter, make_batch):
    batch = make_batch()
    scores = score_ranks(tiny_adapter(r=2), [batch], "first-order")
    fp64 = in_fp64(tiny_adapter(r=2))
    drop = {name: [-slope(fp64, batch, name, r, 1.0, -1e-5) for r in range(2)] for name in scores.drop}
    alone = {name: [-slope(fp64, batch, name, r, 0.0, 1e-5) for r in range(2)] for name in scores.alone}
    assert_close(scores.drop, drop, atol=2e-6)
    assert_close(scores.alone, alone, atol=2e-6)
    assert scores.loss == pytest.approx(reference_loss(fp64, batch), abs=2e-6)


def test_exact_scores_of_a_16_bit_base_are_computed_in_fp32(tiny_adapter, make_batch):
    model, batch = tiny_adapter(r=2, dtype=torch.bfloat16), make_batch()
    scores = score_ranks(model, [batch], "exact")
    found = ablate(model, [batch], [(V, 0), (DOWN, 1)], dtype=torch.float32)
    assert (scores.loss, scores.drop[V][0], scores.alone[DOWN][1]) == (
        found.loss,
        found.drop[V, 0],
        found.alone[DOWN, 1],
    )
    assert ablate(model, [batch], [(V, 0)]).drop[V, 0] != found.drop[V, 0]  # which 16 bits are not


def test_first_order_approaches_exact_as_ranks_get_small(tiny_adapter, randomize_B, make_batch):
    model, batch = randomize_B(tiny_adapter(r=2), std=1e-3), make_batch()
    exact, estimate = (score_ranks(model, [batch], method) for method in ("exact", "first-order"))
    largest = max(abs(score) for ranks in exact.drop.values() for score in ranks)
    assert_close(estimate.drop, exact.drop, rtol=0, atol=0.05 * largest)
    assert_close(estimate.alone, exact.alone, rtol=0, atol=0.05 * largest)


@pytest.mark.parametrize("method", ["exact", "first-order"])
def test_micro_batches_change_nothing(tiny_adapter, make_batch, method):
    model, batch = tiny_adapter(r=2), make_batch(rows=5)
    whole = score_ranks(model, [batch], method)
    parts = score_ranks(model, split(batch, 1, 3, 1), method)
    assert (parts.rows, parts.supervised_tokens) == (whole.rows, whole.supervised_tokens) == (5, 5 * 12 - 20)
    assert parts.loss == pytest.approx(whole.loss, abs=1e-6)
    assert_close(parts.drop, whole.drop, rtol=1e-4, atol=2e-6)
    assert_close(parts.alone, whole.alone, rtol=1e-4, atol=2e-6)


def test_padding_changes_nothing(tiny_adapter, make_batch):
    model, batch = tiny_adapter(r=2, pad_token_id=0), make_batch()
    padded = {
        "input_ids": F.pad(batch["input_ids"], (0, 3)),
        "attention_mask": F.pad(batch["attention_mask"], (0, 3)),
        "labels": F.pad(batch["labels"], (0, 3), value=-100),
    }
    plain, other = (score_ranks(model, [b]) for b in (batch, padded))
    assert_close(other.drop, plain.drop, rtol=1e-4, atol=1e-6)
    assert other.supervised_tokens == plain.supervised_tokens


@pytest.mark.parametrize("four_bit", BASES)
def test_checkpointing_is_kept_and_changes_nothing(tiny_adapter, make_batch, four_bit):
    model, batch, calls = tiny_adapter(r=2, four_bit=four_bit), make_batch(), []
    gated_layers(model)["model.layers.0.self_attn.o_proj"].register_forward_hook(lambda *_: calls.append(1))
    plain = score_ranks(model, [batch])
    assert len(calls) == 2
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = score_ranks(model, [batch])
    assert len(calls) == 2 + 4  # each of the two passes runs the block again for its backward
    assert (checkpointed.drop, checkpointed.alone) == (plain.drop, plain.alone)


@pytest.mark.parametrize("method", ["exact", "first-order"])
def test_dropout_is_off(tiny_adapter, make_batch, method):
    batch = make_batch()
    found = score_ranks(tiny_adapter(r=2, dropout=0.5).train(), [batch], method)
    expected = score_ranks(tiny_adapter(r=2), [batch], method)
    assert_close(found.drop, expected.drop, rtol=1e-4, atol=1e-6)
    assert_close(found.alone, expected.alone, rtol=1e-4, atol=1e-6)


def test_attention_dropout_is_off(tiny_adapter, make_batch):
    """transformers applies it by the attention module's own mode, without an nn.Dropout."""
    batch = make_batch()
    found = score_ranks(tiny_adapter(r=2, attention_dropout=0.5).train(), [batch])
    assert_close(found.drop, score_ranks(tiny_adapter(r=2), [batch]).drop, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "first-order", "certified"])
def test_importance_is_drop_plus_alone_or_either(tiny_adapter, make_batch, method):
    model, batch = tiny_adapter(r=2), [make_batch()]
    scores = score_ranks(model, batch, method)
    assert scores.importance == {
        name: [d + a for d, a in zip(scores.drop[name], scores.alone[name], strict=True)] for name in scores.drop
    }
    for kind in ("drop", "alone"):
        scores = score_ranks(model, batch, method, importance=kind)
        assert scores.importance == getattr(scores, kind)


def test_cost_in_forwards(tiny_adapter, make_batch):
    """14 modules of 2 ranks in 2 blocks: 2 forwards to keep inputs, then 14 ranks through two blocks and 14 through
    one, twice; or two passes of a forward and a backward. Counted in blocks."""
    model, batch, blocks = tiny_adapter(r=2), make_batch(), []
    for block in model.base_model.model.model.layers:
        block.register_forward_hook(lambda *_: blocks.append(1))
    assert score_ranks(model, [batch], "exact").forward_equivalents == len(blocks) / 2 == 2 + 2 * (14 + 14 / 2)
    blocks.clear()
    assert score_ranks(model, [batch]).forward_equivalents == 3 * len(blocks) / 2 == 6


def test_modules_of_different_ranks(tiny_adapter, make_batch):
    model, batch = tiny_adapter(r=3), make_batch()
    layer = gated_layers(model)[V]
    layer.A.data, layer.B.data = layer.A.data[:1], layer.B.data[:, :1]
    for method in ("exact", "first-order"):
        scores = score_ranks(model, [batch], method)
        assert [len(scores.drop[V]), len(scores.alone[V]), len(scores.drop[DOWN])] == [1, 1, 3]


def test_stderr_is_that_of_a_ratio_over_rows(tiny_adapter, make_batch):
    """Against the jackknife, which needs no formula: leave one row out, score again."""
    model, batch = tiny_adapter(r=2), make_batch(rows=24)
    scores = score_ranks(model, [batch])
    left_out = [
        score_ranks(model, [{key: torch.cat([v[:i], v[i + 1 :]]) for key, v in batch.items()}]).importance[V]
        for i in range(24)
    ]
    values = torch.tensor(left_out, dtype=torch.float64)
    jackknife = ((values - values.mean(0)).square().sum(0) * 23 / 24).sqrt()
    torch.testing.assert_close(torch.tensor(scores.stderr[V], dtype=torch.float64), jackknife, rtol=0.05, atol=0)


def test_one_row_has_no_stderr(tiny_adapter, make_batch):
    assert score_ranks(tiny_adapter(r=2), [make_batch(rows=1)]).stderr is None


def test_path_shares_add_up_to_what_the_adapter_achieved(tiny_adapter, make_batch):
    scores = score_ranks(tiny_adapter(r=4), [make_batch()], "path", importance="path")
    total = sum(score for ranks in scores.importance.values() for score in ranks)
    assert abs(scores.base_loss - scores.loss) > 0.05
    assert total == pytest.approx(scores.base_loss - scores.loss, rel=0.01)


def test_path_is_the_integral_of_the_gate_gradients(tiny_adapter, make_batch):
    """Against the trapezoidal rule on a fine grid."""
    model, batch = tiny_adapter(r=2), make_batch()
    scores = score_ranks(model, [batch], "path", importance="path")
    grid = torch.linspace(0, 1, 33).tolist()
    values = torch.stack([-mean_gate_gradients(model, [batch], t)[V] for t in grid])
    torch.testing.assert_close(
        torch.tensor(scores.importance[V], dtype=torch.float64),
        torch.trapezoid(values, dx=1 / 32, dim=0),
        rtol=0.01,
        atol=1e-5,
    )


def test_midpoint_shares_are_the_slopes_half_way(tiny_adapter, randomize_B, make_batch):
    """And the smaller the ranks, the nearer they are to the whole integral."""
    model, batch = tiny_adapter(), make_batch(rows=4)
    half = mean_gate_gradients(model, [batch], 0.5)
    assert_close(midpoint_shares(model, split(batch, 1, 3)), {name: (-of).tolist() for name, of in half.items()})
    randomize_B(model, std=5e-3)
    whole = score_ranks(model, [batch], "path", importance="path").importance
    assert_close(midpoint_shares(model, [batch]), whole, rtol=2e-2, atol=1e-6)


def test_path_goes_with_path(tiny_adapter, make_batch):
    for method, importance in (("path", "sum"), ("exact", "path")):
        with pytest.raises(ValueError, match="does not give"):
            score_ranks(tiny_adapter(r=2), [make_batch()], method, importance=importance)


BASE = {
    "4bit": dict(four_bit=True, dtype=torch.bfloat16), "bf16": dict(dtype=torch.bfloat16),
    "fp16": dict(dtype=torch.float16), "fp32": {},
}  # fmt: skip
TARGETS = {"all": "all-linear", "some": ["q_proj", "v_proj"], "one": ["down_proj"]}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("base", BASE)
def test_every_engine_over_every_base_and_target(tiny_adapter, make_batch, base, targets):
    """Against forwards of the model in fp32 whose weights are those of the base."""
    from qalora.base.quantized import dequantize, is_4bit, linear_maps

    base = BASE[base] | dict(num_hidden_layers=1, targets=TARGETS[targets])
    model, batch = tiny_adapter(r=2, **base), make_batch()
    found = {method: score_ranks(model, [batch], method) for method in ("exact", "certified", "first-order")}
    path = score_ranks(model, [batch], "path", importance="path")
    twin = tiny_adapter(r=2, **base | {"four_bit": False}).float()
    for (_, mine), (_, other) in zip(linear_maps(model).items(), linear_maps(twin).items(), strict=True):
        if is_4bit(mine):  # rounded to the dtype that it trains in
            other.weight.data = dequantize(mine, mine.compute_dtype).float()
    truth = score_ranks(twin, [batch], "exact")
    for method in ("exact", "certified"):
        for name, flags in found[method].exact.items():
            for rank, flag in enumerate(flags):
                assert not flag or found[method].drop[name][rank] == pytest.approx(truth.drop[name][rank], abs=3e-6)
                assert not flag or found[method].alone[name][rank] == pytest.approx(truth.alone[name][rank], abs=3e-6)
    assert found["exact"].loss == pytest.approx(truth.loss, abs=3e-6)
    assert found["first-order"].loss == pytest.approx(truth.loss, abs=0.05) == path.loss


@pytest.mark.parametrize("method", ["exact", "first-order", "certified", "path"])
def test_scores_that_are_not_finite_are_no_answer(tiny_adapter, make_batch, method):
    model = tiny_adapter(r=2)
    gated_layers(model)[V].B.data[0, 0] = float("nan")
    with pytest.raises(AnswerNo, match=r"is not finite, so ranks cannot be ordered"):
        score_ranks(model, [make_batch()], method, importance="path" if method == "path" else "sum")


# ------------------------------------------------------------------------------------------ the model is left as it was


def state(model):
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: layer.gate for name, layer in gated_layers(model).items()},
    )


@pytest.fixture
def mixed_model(tiny_adapter):
    """In train mode but for one block, with one frozen A and a gradient that is not yet used."""
    model = tiny_adapter(r=2, four_bit=True, dropout=0.1).train()
    model.base_model.model.model.layers[0].eval()
    layers = gated_layers(model)
    layers[V].A.requires_grad_(False)
    layers[DOWN].A.grad = torch.ones_like(layers[DOWN].A)
    return model


@pytest.mark.parametrize("method", ["exact", "first-order", "certified"])
def test_model_is_left_as_it_was(mixed_model, make_batch, method):
    before, weights = state(mixed_model), {k: v.clone() for k, v in mixed_model.state_dict().items()}
    score_ranks(mixed_model, [make_batch()], method)
    assert state(mixed_model) == before
    assert all(torch.equal(value, weights[key]) for key, value in mixed_model.state_dict().items())
    gradients = {name: p.grad for name, p in mixed_model.named_parameters() if p.grad is not None}
    assert [bool((gradient == 1).all()) for gradient in gradients.values()] == [True]


def test_model_is_left_as_it_was_after_an_error(mixed_model, make_batch):
    before = state(mixed_model)
    with pytest.raises(RuntimeError, match="stop"), scoring_mode(mixed_model):
        raise RuntimeError("stop")
    assert state(mixed_model) == before
    broken = {**make_batch(), "input_ids": torch.full((4, 12), 10_000)}
    with pytest.raises(IndexError):
        score_ranks(mixed_model, [broken])
    assert state(mixed_model) == before


def test_stderr_of_rows_of_like_length_is_that_of_a_mean(tiny_adapter, make_batch):
    """Three rows: there n − 1 is far from n."""
    model, batch = tiny_adapter(r=2), make_batch(rows=3)
    batch["labels"][:, :3], batch["labels"][:, 3:] = -100, batch["input_ids"][:, 3:]
    each = [score_ranks(model, [{key: value[i : i + 1] for key, value in batch.items()}]) for i in range(3)]
    values = torch.tensor([scores.importance[V] for scores in each], dtype=torch.float64)
    expected = values.std(0, correction=1) / 3**0.5
    found = torch.tensor(score_ranks(model, [batch]).stderr[V], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)

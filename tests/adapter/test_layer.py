from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model

from qalora.adapter.layer import gated
from qalora.adapter.model import gated_layers, load_adapter
from qalora.base.quantized import dequantize
from qalora.kernels.low_rank import THIN, thin_product

BASES = [
    pytest.param(False, torch.float32, id="plain-fp32"),
    pytest.param(False, torch.bfloat16, id="plain-bf16"),
    pytest.param(True, torch.float32, id="4bit-fp32"),
    pytest.param(True, torch.bfloat16, id="4bit-bf16"),
]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def twins(tiny_llama, tiny_adapter):
    """make(four_bit, dtype, **) → (ours, plain PEFT's) with equal weights."""

    def make(four_bit, dtype, dropout=0.0, **base):
        ours = tiny_adapter(four_bit=four_bit, dtype=dtype, dropout=dropout, **base)
        config = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=dropout, target_modules=ours.peft_config["default"].target_modules
        )
        plain = get_peft_model(tiny_llama(dtype, four_bit=four_bit, **base), config)
        modules = dict(plain.base_model.model.named_modules())
        for name, layer in gated_layers(ours).items():
            modules[name].lora_A["default"].weight.data.copy_(layer.A.data)
            modules[name].lora_B["default"].weight.data.copy_(layer.B.data)
        return ours, plain

    return make


@pytest.fixture
def layer(tiny_adapter):
    """make(four_bit, dtype, dropout) → one gated layer, (64 → 64), r = 4, scaling 2."""

    def make(four_bit=False, dtype=torch.float32, dropout=0.0):
        return gated_layers(tiny_adapter(four_bit=four_bit, dtype=dtype, dropout=dropout))[Q].train()

    return make


def random_input(dtype=torch.float32, rows=3, tokens=5, width=64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(rows, tokens, width, generator=generator).to(dtype)


# ----------------------------------------------------------------------------------------------------- invariant 1


def assert_same(found, expected):
    """Bit for bit in 16 bit. In fp32 the update is summed onto z instead of added to it: the last bits may differ."""
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 0}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("four_bit", "dtype"), BASES)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_gates_open_is_plain_peft(twins, make_batch, four_bit, dtype, grad):
    ours, plain = twins(four_bit, dtype)
    tokens = make_batch()["input_ids"]
    with torch.set_grad_enabled(grad):
        assert_same(ours(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize(("four_bit", "dtype"), BASES)
def test_layer_with_bias_is_plain_peft(twins, four_bit, dtype):
    ours, plain = twins(four_bit, dtype, attention_bias=True)
    layer, other = gated_layers(ours)[Q], plain.base_model.model.get_submodule(Q)
    bias = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer.base_layer.bias.data, other.base_layer.bias.data = bias, bias.clone()
    x = random_input(dtype)
    assert_same(layer(x), other(x))
    with torch.no_grad():
        assert_same(layer(x), other(x))


@pytest.mark.parametrize(("four_bit", "dtype"), BASES)
def test_disabled_adapter_is_the_base(twins, make_batch, four_bit, dtype):
    ours, plain = twins(four_bit, dtype)
    tokens = make_batch()["input_ids"]
    with ours.disable_adapter(), plain.disable_adapter():
        assert torch.equal(ours(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize(("four_bit", "dtype"), BASES)
def test_gradients_are_plain_pefts(twins, make_batch, four_bit, dtype):
    ours, plain = twins(four_bit, dtype)
    modules = dict(plain.base_model.model.named_modules())
    batch = make_batch()
    for model in (ours, plain):
        model.train()
        model(**batch).loss.backward()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for name, layer in gated_layers(ours).items():
        other = modules[name]
        for got, want in (
            (layer.A.grad, other.lora_A["default"].weight.grad),
            (layer.B.grad, other.lora_B["default"].weight.grad),
        ):
            assert got.dtype == torch.float32
            assert (got - want).norm() <= tolerance * want.norm(), name


@pytest.mark.parametrize(("four_bit", "dtype"), BASES)
def test_gradient_of_the_input_is_plain_pefts(twins, four_bit, dtype):
    ours, plain = twins(four_bit, dtype)
    weights = torch.linspace(-1, 1, 64)
    grads = []
    for layer in (gated_layers(ours)[Q], plain.base_model.model.get_submodule(Q)):
        x = random_input(dtype).requires_grad_()
        (layer(x).float() * weights).sum().backward()
        grads.append(x.grad)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert (grads[0] - grads[1]).float().norm() <= tolerance * grads[1].float().norm()


def reference(layer, x, rows_of_A=None):
    """z = W x + s · B A x from the definition, in fp64, over the given ranks."""
    keep = list(range(len(layer.A))) if rows_of_A is None else rows_of_A
    weight = dequantize(layer.base_layer).double()
    low = x.double() @ layer.A.detach().double()[keep].T
    return x.double() @ weight.T + layer.s * low @ layer.B.detach().double()[:, keep].T


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("rank", range(4))
@pytest.mark.usefixtures("stretch")
def test_closed_gate_is_the_layer_without_that_rank(layer, four_bit, rank):
    layer, x = layer(four_bit), random_input()
    gate = torch.ones(4)
    gate[rank] = 0
    with gated({Q: layer}, {Q: gate}):
        z = layer(x)
    keep = [k for k in range(4) if k != rank]
    torch.testing.assert_close(z.double(), reference(layer, x, keep), rtol=1e-5, atol=1e-5)
    without = copy.deepcopy(layer)
    without.A.data, without.B.data = layer.A.data[keep], layer.B.data[:, keep]
    torch.testing.assert_close(z, without(x), rtol=1e-6, atol=1e-6)


def test_closed_gates_are_the_base_bit_for_bit(layer):
    layer, x = layer(), random_input()
    with gated({Q: layer}, {Q: torch.zeros(4)}):
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
def test_a_gate_for_each_row_is_each_row_alone(layer, grad):
    layer, x = layer(True), random_input(rows=3)
    gates = torch.tensor([[1.0, 1, 1, 1], [0, 1, 0, 1], [0.3, 0, 0, 0]])
    with torch.set_grad_enabled(grad):
        with gated({Q: layer}, {Q: gates[:, None, :]}):
            together = layer(x)
        for row in range(3):
            with gated({Q: layer}, {Q: gates[row]}):
                torch.testing.assert_close(together[row], layer(x[row : row + 1])[0], rtol=1e-5, atol=1e-5)


def test_gates_are_open_again_after_an_exception(layer):
    layer, x = layer(), random_input()
    open_ = layer(x)
    with pytest.raises(ZeroDivisionError), gated({Q: layer}, {Q: torch.zeros(4)}):
        raise ZeroDivisionError
    assert layer.gate is None
    assert torch.equal(layer(x), open_)


def test_an_unknown_module_leaves_no_gate_closed(layer):
    layer = layer()
    with pytest.raises(KeyError), gated({Q: layer}, {Q: torch.zeros(4), "no.such.module": torch.zeros(4)}):
        pass
    assert layer.gate is None


def test_gates_never_reach_the_state_dict(layer):
    layer = layer()
    with gated({Q: layer}, {Q: torch.zeros(4)}):
        assert not [key for key in layer.state_dict() if "gate" in key]


# ------------------------------------------------------------------------------------------------------- gradients


def plain_autograd(layer, x, gate, mask=None):
    """The same function written with torch's own operations."""
    x_low = x if mask is None else x * mask
    low = F.linear(x_low, layer.A)
    return F.linear(x, dequantize(layer.base_layer)) + layer.s * F.linear(low * gate, layer.B)


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("per_row", [False, True], ids=["gate-shared", "gate-per-row"])
@pytest.mark.usefixtures("stretch")
def test_gradients_are_autograds(layer, four_bit, per_row):
    layer = layer(four_bit)
    weights = torch.randn(64, generator=torch.Generator().manual_seed(9))
    results = []
    for function in (layer, lambda x: plain_autograd(layer, x, gate)):  # noqa: B023
        x = random_input().requires_grad_()
        gate = torch.linspace(0.2, 1.0, 4 * (3 if per_row else 1)).view((3, 1, 4) if per_row else (4,)).requires_grad_()
        with gated({Q: layer}, {Q: gate}):
            loss = (torch.tanh(function(x)) * weights).sum()
        results.append(torch.autograd.grad(loss, [x, layer.A, layer.B, gate]))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_are_finite_differences(layer):
    """gradcheck in fp64, base and adapter alike."""
    layer = layer().double()
    x = random_input(torch.float64, rows=2, tokens=2).requires_grad_()
    gate = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)

    def function(x, A, B, gate):
        with gated({Q: layer}, {Q: gate}):
            return layer(x)[..., :5]

    assert torch.autograd.gradcheck(function, (x, layer.A, layer.B, gate))


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.usefixtures("stretch")
def test_dropout_touches_the_low_rank_path_alone(layer, four_bit):
    layer = layer(four_bit, dropout=0.5)
    gate = torch.ones(4)
    x = random_input().requires_grad_()
    torch.manual_seed(11)
    got = layer(x)
    torch.manual_seed(11)
    mask = F.dropout(torch.ones_like(x), 0.5)
    want = plain_autograd(layer, x, gate, mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    inputs = [x, layer.A, layer.B]
    for ours, autograds in zip(
        torch.autograd.grad(got.tanh().sum(), inputs),
        torch.autograd.grad(want.tanh().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, autograds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.eval()(x), plain_autograd(layer, x, gate), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
def test_dropout_off_while_the_layer_trains_gives_the_whole_gradient(layer, four_bit):
    """Scoring's state: the layer in train mode, its dropout in eval mode, so both paths see the very same input."""
    layer = layer(four_bit, dropout=0.5)
    layer.lora_dropout.eval()
    x = random_input().requires_grad_()
    got = torch.autograd.grad(layer(x).tanh().sum(), x)[0]
    want = torch.autograd.grad(plain_autograd(layer, x, torch.ones(4)).tanh().sum(), x)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_dropout_is_plain_pefts(twins, make_batch):
    ours, plain = twins(False, torch.float32, dropout=0.3)
    logits = []
    for model in (ours.train(), plain.train()):
        torch.manual_seed(11)
        logits.append(model(make_batch()["input_ids"]).logits)
    assert_same(*logits)


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient(tiny_adapter, make_batch, four_bit, dropout):
    gradients = []
    for checkpoint in (False, True):
        model = tiny_adapter(four_bit=four_bit, dropout=dropout).train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        model(**make_batch()).loss.backward()
        gradients.append([p.grad for layer in gated_layers(model).values() for p in (layer.A, layer.B)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_frozen_base_gets_no_gradient(tiny_adapter, make_batch):
    model = tiny_adapter(four_bit=True).train()
    model(**make_batch()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("r", [1, 7, THIN - 1, THIN])
def test_a_thin_product_is_the_product(r):
    generator = torch.Generator().manual_seed(r)
    x = torch.randn(3, 6, 48, dtype=torch.float64, generator=generator).transpose(0, 1)  # not contiguous
    A = torch.randn(r, 48, dtype=torch.float64, generator=generator)
    found = thin_product(x, A)
    assert found.shape == (6, 3, r)
    torch.testing.assert_close(found, torch.einsum("abi,ri->abr", x, A))
    found.mul_(2)  # in place, as the caller scales it


@pytest.fixture
def two_adapters(tiny_llama, randomize_B, tmp_path):
    """make(*active, kind=ours|PEFT's) → a model with the adapters `wide` on every layer and `narrow` on q_proj and
    down_proj, of other rank and scaling."""
    targets = {"wide": dict(r=4, lora_alpha=8, target_modules="all-linear")}
    targets["narrow"] = dict(r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    for name, settings in targets.items():
        model = get_peft_model(tiny_llama(), LoraConfig(**settings, task_type="CAUSAL_LM"))
        randomize_B(model).save_pretrained(tmp_path / name)

    def make(*active: str, ours: bool = True, first: str = "wide"):
        second = "narrow" if first == "wide" else "wide"
        base = tiny_llama()
        model = (load_adapter if ours else PeftModel.from_pretrained)(base, tmp_path / first)
        model.load_adapter(str(tmp_path / second), second)
        model.base_model.set_adapter(["default" if name == first else name for name in active])
        return model.train(False)

    return make


@pytest.mark.parametrize("active", [["wide"], ["narrow"], ["wide", "narrow"], ["narrow", "wide"]])
@pytest.mark.parametrize("first", ["wide", "narrow"])
def test_several_adapters_are_plain_pefts(two_adapters, make_batch, first, active):
    ours, theirs = (two_adapters(*active, ours=kind, first=first) for kind in (True, False))
    batch = make_batch()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-4)
    gradients = []
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*[mM]erge")
def test_merging_in_place_is_plain_pefts(twins, make_batch):
    ours, theirs = (model.eval() for model in twins(False, torch.float32))
    batch = make_batch()
    with torch.no_grad():
        for step in ("merge_adapter", "merge_adapter", "disable", "unmerge_adapter", "unmerge_adapter"):
            for model in (ours, theirs):
                if step != "disable":
                    getattr(model, step)()
            if step == "disable":
                with ours.disable_adapter(), theirs.disable_adapter():
                    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, rtol=1e-4, atol=1e-4)

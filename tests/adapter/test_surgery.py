from __future__ import annotations

import copy
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from transformers.optimization import Adafactor

from qalora.adapter.allocation import AllocationPlan
from qalora.adapter.layer import gated
from qalora.adapter.model import gated_layers, load_adapter, ranks, write_adapter
from qalora.adapter.surgery import apply_plan

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.0.self_attn.v_proj"
GATE = "model.layers.1.mlp.gate_proj"
DOWN = "model.layers.1.mlp.down_proj"

OPTIMIZERS = {
    "torch-fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True, foreach=False),
    "torch-foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "torch-loop": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=False),
    "bnb-32bit": lambda parameters: bnb.optim.PagedAdamW32bit(parameters, lr=1e-3),
    "bnb-8bit": lambda parameters: bnb.optim.PagedAdamW8bit(parameters, lr=1e-3),
}
# bitsandbytes has 8-bit moments only for tensors of 4,096 elements and more: most of the modules at this rank.
R = 64
PLAN = AllocationPlan(pruned={Q: (0, 5, 63), GATE: (1,)}, grown={V: 3, DOWN: 1})


@pytest.fixture(params=OPTIMIZERS)
def make_optimizer(request):
    def make(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # paged is plain on a CPU
            return OPTIMIZERS[request.param](parameters_of(model))

    make.is_8bit = request.param == "bnb-8bit"
    return make


def parameters_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.fixture
def train(make_batch):
    """train(model, optimizer, steps, first) takes steps on batches of their own and returns the losses."""

    def run(model, optimizer, steps, first=0):
        losses = []
        for step in range(first, first + steps):
            optimizer.zero_grad()
            loss = model(**make_batch(seed=step)).loss
            loss.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                optimizer.step()
            losses.append(loss.item())
        return losses

    return run


def moments(optimizer, parameter):
    """(first, second) in fp32, whatever form the optimizer keeps them in."""
    state = optimizer.state[parameter]
    if "exp_avg" in state:
        return state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    found = []
    for key in ("1", "2"):
        moment = state[f"state{key}"]
        if moment.dtype == torch.uint8:
            blocks = state[f"qmap{key}"][moment.flatten().long()].split(256)
            moment = torch.cat([b * a for b, a in zip(blocks, state[f"absmax{key}"], strict=True)]).view(
                parameter.shape
            )
        found.append(moment.clone())
    return tuple(found)


def weights(model):
    return {name: (layer.A.detach().clone(), layer.B.detach().clone()) for name, layer in gated_layers(model).items()}


# ----------------------------------------------------------------------------------------------------- invariant 4


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
def test_pruning_closed_ranks_leaves_the_logits(tiny_adapter, make_batch, four_bit):
    model, tokens = tiny_adapter(r=4, four_bit=four_bit), make_batch()["input_ids"]
    layers = gated_layers(model)
    gates = {Q: torch.tensor([0.0, 1, 1, 0]), DOWN: torch.tensor([1.0, 1, 0, 1]), V: torch.zeros(4)}
    with torch.no_grad():
        with gated(layers, gates):
            masked = model(tokens).logits
        apply_plan(model, AllocationPlan({Q: (0, 3), DOWN: (2,), V: (0, 1, 2, 3)}, {}))
        torch.testing.assert_close(model(tokens).logits, masked, rtol=1e-5, atol=1e-5)
    now = ranks(model)
    assert (now[Q], now[DOWN], now[GATE]) == (2, 3, 4) and V not in now


def test_given_rows_come_first_and_the_rest_is_random(tiny_adapter):
    model = tiny_adapter(r=4)
    rows = {Q: torch.eye(64)[:2], V: torch.eye(64)[:5]}
    apply_plan(model, AllocationPlan({}, {Q: 3, V: 3}), new_rows=rows, generator=torch.Generator().manual_seed(0))
    A = gated_layers(model)[Q].A
    assert torch.equal(A[4:6], rows[Q]) and 0 < A[6].abs().max() <= 1 / 8
    assert torch.equal(gated_layers(model)[V].A[4:], rows[V][:3])
    assert not gated_layers(model)[Q].B[:, 4:].any()


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_growing_leaves_the_logits(tiny_adapter, make_batch, four_bit, dtype):
    model, tokens = tiny_adapter(r=4, four_bit=four_bit, dtype=dtype), make_batch()["input_ids"]
    before = model(tokens).logits
    apply_plan(model, AllocationPlan({}, {Q: 1, V: 3, DOWN: 8}))
    # A processor may sum the old rows' products in another order once there are more rows.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 0}[dtype]
    torch.testing.assert_close(model(tokens).logits, before, rtol=tolerance, atol=tolerance)
    assert [ranks(model)[name] for name in (Q, V, DOWN)] == [5, 7, 12]


def test_scaling_never_changes(tiny_adapter):
    model = tiny_adapter(r=4, alpha=12)
    apply_plan(model, AllocationPlan({Q: (1, 2)}, {DOWN: 5}))
    layers = gated_layers(model)
    assert {layer.s for layer in layers.values()} == {3.0}
    assert [(layers[name].r["default"], layers[name].lora_alpha["default"]) for name in (Q, DOWN)] == [
        (2, 6),
        (9, 27),
    ]


def test_weights_of_survivors_and_newcomers(tiny_adapter):
    model = tiny_adapter(r=4)
    before = weights(model)
    apply_plan(model, AllocationPlan({Q: (0, 2)}, {DOWN: 50}), generator=torch.Generator().manual_seed(0))
    after = weights(model)
    assert torch.equal(after[Q][0], before[Q][0][[1, 3]]) and torch.equal(after[Q][1], before[Q][1][:, [1, 3]])
    A, B = after[DOWN]
    assert torch.equal(A[:4], before[DOWN][0]) and torch.equal(B[:, :4], before[DOWN][1])
    assert not B[:, 4:].any()
    bound = A.shape[1] ** -0.5  # PEFT's Kaiming-uniform start
    assert 0.9 * bound < A[4:].abs().max() <= bound
    assert A[4:].mean().abs() < 0.05 * bound


def test_newcomers_depend_on_the_generator_alone(tiny_adapter):
    grown = []
    for seed in (0, 0, 1):
        model = tiny_adapter(r=2)
        torch.rand(seed + 3)
        apply_plan(model, AllocationPlan({}, {Q: 2}), generator=torch.Generator().manual_seed(seed))
        grown.append(gated_layers(model)[Q].A.detach())
    assert torch.equal(grown[0], grown[1]) and not torch.equal(grown[0], grown[2])


# ----------------------------------------------------------------------------------------------------- invariant 5


def test_survivors_keep_their_moments(tiny_adapter, train, make_optimizer):
    model = tiny_adapter(r=R)
    optimizer = make_optimizer(model)
    train(model, optimizer, 3)
    layers = gated_layers(model)
    before = {name: (moments(optimizer, layer.A), moments(optimizer, layer.B)) for name, layer in layers.items()}
    states = {name: optimizer.state[layer.A].get("state1", torch.zeros(0)).dtype for name, layer in layers.items()}
    apply_plan(model, PLAN, optimizer)
    for name in (Q, V, GATE, DOWN):
        assert (states[name] == torch.uint8) == make_optimizer.is_8bit
        keep = [rank for rank in range(R) if rank not in PLAN.pruned.get(name, ())]
        for parameter, dim, old_pair in (
            (layers[name].A, 0, before[name][0]),
            (layers[name].B, 1, before[name][1]),
        ):
            pair = moments(optimizer, parameter)
            for order, (old, new) in enumerate(zip(old_pair, pair, strict=True)):
                index = torch.tensor(keep)
                want, got = old.index_select(dim, index), new.index_select(dim, torch.arange(len(keep)))
                assert new.shape == parameter.shape
                if make_optimizer.is_8bit:
                    assert (got - want).norm() <= 0.02 * want.norm()
                else:
                    assert torch.equal(got, want)
                entering = new.index_select(dim, torch.arange(len(keep), parameter.shape[dim]))
                if not entering.numel():
                    continue
                if order == 0:
                    # bitsandbytes rounds 0 to the code beside it.
                    assert entering.abs().max() <= (1e-4 * old.abs().max() if make_optimizer.is_8bit else 0)
                else:
                    mean = want.mean(dim, keepdim=True).expand_as(entering)
                    assert (entering - mean).norm() <= (0.05 if make_optimizer.is_8bit else 1e-6) * mean.norm()


def test_step_counts_stay(tiny_adapter, train, make_optimizer):
    model = tiny_adapter(r=R)
    optimizer = make_optimizer(model)
    train(model, optimizer, 3)
    apply_plan(model, PLAN, optimizer)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


def test_the_optimizer_still_moves_every_rank(tiny_adapter, train, make_optimizer):
    model = tiny_adapter(r=R)
    optimizer = make_optimizer(model)
    identities = {name: (layer.A, layer.B) for name, layer in gated_layers(model).items()}
    train(model, optimizer, 3)
    apply_plan(model, PLAN, optimizer)
    before = weights(model)
    train(model, optimizer, 2, first=3)  # two, for a new row of A moves once its column of B has
    for name, layer in gated_layers(model).items():
        assert (layer.A is identities[name][0]) and (layer.B is identities[name][1])
        assert ((layer.A - before[name][0]).abs().amax(1) > 0).all(), name
        assert ((layer.B - before[name][1]).abs().amax(0) > 0).all(), name


def test_surgery_before_the_first_step(tiny_adapter, train, make_optimizer):
    model = tiny_adapter(r=R)
    optimizer = make_optimizer(model)
    apply_plan(model, PLAN, optimizer)
    before = weights(model)
    train(model, optimizer, 1)
    assert all((before[name][1] != layer.B).any() for name, layer in gated_layers(model).items())


def test_pruned_training_is_masked_training(tiny_adapter, train, make_optimizer):
    pruned, masked = tiny_adapter(r=R), tiny_adapter(r=R)
    keep = [rank for rank in range(R) if rank not in PLAN.pruned[Q]]
    gate = torch.zeros(R)
    gate[keep] = 1
    losses = []
    for model in (pruned, masked):
        optimizer = make_optimizer(model)
        train(model, optimizer, 3)
        if model is pruned:
            apply_plan(model, AllocationPlan({Q: PLAN.pruned[Q]}, {}), optimizer)
            losses.append(train(model, optimizer, 5, first=3))
        else:
            with gated(gated_layers(model), {Q: gate}):
                losses.append(train(model, optimizer, 5, first=3))
    tolerance = 1e-3 if make_optimizer.is_8bit else 1e-5
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)
    ours, theirs = weights(pruned), weights(masked)
    moved = 5 * 1e-3  # Adam's steps are about lr each
    for name in ours:
        A, B = theirs[name]
        want = (A[keep], B[:, keep]) if name == Q else (A, B)
        for got, expected in zip(ours[name], want, strict=True):
            assert (got - expected).abs().mean() <= (0.1 if make_optimizer.is_8bit else 1e-3) * moved, name


def test_shared_state_of_others_is_untouched(tiny_adapter, train, make_optimizer):
    model = tiny_adapter(r=R)
    optimizer = make_optimizer(model)
    train(model, optimizer, 2)
    others = {name: layer for name, layer in gated_layers(model).items() if name not in (Q, V, GATE, DOWN)}
    before = {name: copy.deepcopy(dict(optimizer.state[layer.A])) for name, layer in others.items()}
    apply_plan(model, PLAN, optimizer)
    for name, layer in others.items():
        for key, value in optimizer.state[layer.A].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[name][key])), (name, key)


def test_accelerates_wrapper_is_looked_through(tiny_adapter, train):
    model = tiny_adapter(r=4)
    wrapped = Accelerator(cpu=True).prepare(torch.optim.AdamW(parameters_of(model), lr=1e-3))
    train(model, wrapped, 2)
    apply_plan(model, AllocationPlan({Q: (0,)}, {V: 1}), wrapped)
    layers = gated_layers(model)
    assert wrapped.optimizer.state[layers[Q].A]["exp_avg"].shape == (3, 64)
    assert wrapped.optimizer.state[layers[V].B]["exp_avg_sq"].shape == (32, 5)
    before = layers[Q].A.detach().clone()
    train(model, wrapped, 1, first=2)
    assert (before != layers[Q].A).all()


# ----------------------------------------------------------------------------------------------------- invariant 6


def test_first_updates_of_new_ranks_are_no_larger_than_those_of_old(tiny_adapter, train, make_optimizer):
    model = tiny_adapter(r=R)
    optimizer = make_optimizer(model)
    train(model, optimizer, 20)
    apply_plan(model, AllocationPlan({}, {V: 8, DOWN: 8}), optimizer, generator=torch.Generator().manual_seed(0))
    layers = gated_layers(model)
    for step in range(5):
        before = weights(model)
        train(model, optimizer, 1, first=20 + step)
        for name in (V, DOWN):
            for moved in (
                (layers[name].A - before[name][0]).abs(),
                (layers[name].B - before[name][1]).abs().T,
            ):
                assert moved[R:].mean() <= 1.2 * moved[:R].mean(), (name, step)


# ---------------------------------------------------------------------------------------------------------- rank 0


def test_a_module_cut_to_rank_0_leaves_model_and_optimizer(tiny_adapter, train, make_optimizer, make_batch):
    model = tiny_adapter(r=R)
    optimizer = make_optimizer(model)
    train(model, optimizer, 2)
    layer = gated_layers(model)[Q]
    base, gone = layer.base_layer, {id(layer.A), id(layer.B)}
    apply_plan(model, AllocationPlan({Q: tuple(range(R))}, {}), optimizer)
    assert Q not in gated_layers(model)
    assert model.base_model.model.get_submodule(Q) is base
    assert not gone & {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not gone & {id(p) for p in optimizer.state}
    assert not gone & {id(p) for p in model.parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(optimizer.state) == 2 * 13
    before = weights(model)
    train(model, optimizer, 1, first=2)
    assert all((gated_layers(model)[name].B != B).any() for name, (_, B) in before.items())


def test_memory_follows_the_ranks(tiny_adapter, train, make_optimizer):
    model = tiny_adapter(r=R)
    optimizer = make_optimizer(model)
    train(model, optimizer, 1)
    plan = AllocationPlan({name: tuple(range(0, R, 2)) for name in ranks(model)}, {})
    apply_plan(model, plan, optimizer)
    for layer in gated_layers(model).values():
        for parameter in (layer.A, layer.B):
            assert parameter.grad is None
            stored = [
                parameter,
                *(optimizer.state[parameter].get(k) for k in ("exp_avg", "exp_avg_sq", "state1", "state2")),
            ]
            for tensor in (tensor for tensor in stored if tensor is not None):
                assert tensor.untyped_storage().nbytes() == parameter.numel() * tensor.element_size()


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "4bit"])
def test_a_module_comes_back_from_rank_0_and_a_resumed_run_goes_on_the_same(
    tiny_adapter, tiny_llama, train, make_batch, tmp_path, four_bit
):
    """Saved and loaded after the revival, with the optimizer's state by place as a checkpoint has it: the same weights
    after."""
    model = tiny_adapter(r=2, four_bit=four_bit)
    optimizer = torch.optim.AdamW(parameters_of(model), lr=1e-3)
    train(model, optimizer, 2)
    apply_plan(model, AllocationPlan({Q: (0, 1), DOWN: (0, 1)}, {}), optimizer)
    train(model, optimizer, 1, first=2)
    with torch.no_grad():
        before = model(**make_batch()).loss
    apply_plan(model, AllocationPlan({}, {Q: 3}), optimizer, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(**make_batch()).loss, before)
    layer = gated_layers(model)[Q]
    assert (len(layer.A), layer.s, layer.A.requires_grad, layer.B.any().item()) == (3, 2.0, True, False)
    live = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert live == [id(p) for p in parameters_of(model)]
    train(model, optimizer, 2, first=3)
    assert layer.B.any() and layer.A in optimizer.state

    write_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = load_adapter(tiny_llama(four_bit=four_bit), tmp_path, trainable=True)
    assert ranks(resumed) == ranks(model) and DOWN not in ranks(resumed)
    again = torch.optim.AdamW(parameters_of(resumed), lr=1e-3)
    again.load_state_dict(state)
    for run, its in ((model, optimizer), (resumed, again)):
        apply_plan(run, AllocationPlan({}, {DOWN: 1}), its, generator=torch.Generator().manual_seed(1))
    assert train(model, optimizer, 3, first=5) == train(resumed, again, 3, first=5)
    straight, other = weights(model), weights(resumed)
    assert all(torch.equal(a, b) for name in straight for a, b in zip(straight[name], other[name], strict=True))


def test_a_revived_module_is_trained_by_every_optimizer(tiny_adapter, train, make_optimizer):
    model = tiny_adapter(r=R)
    optimizer = make_optimizer(model)
    train(model, optimizer, 2)
    apply_plan(model, AllocationPlan({Q: tuple(range(R))}, {}), optimizer)
    apply_plan(model, AllocationPlan({}, {Q: 4}), optimizer)
    before = weights(model)[Q]
    train(model, optimizer, 2, first=2)
    after = weights(model)[Q]
    assert all((old != new).any() for old, new in zip(before, after, strict=True))


# ------------------------------------------------------------------------------------- optimizers of other moments


@pytest.fixture(params=["adafactor", "lion-32bit", "lion-8bit"])
def other_optimizer(request):
    kind = {
        "adafactor": lambda p: Adafactor(p, lr=1e-3, scale_parameter=False, relative_step=False),
        "lion-32bit": lambda p: bnb.optim.Lion32bit(p, lr=1e-3),
        "lion-8bit": lambda p: bnb.optim.Lion8bit(p, lr=1e-3),
    }[request.param]
    return lambda model: kind(parameters_of(model))


def moment_of(optimizer, parameter):
    """The one moment of an element: Lion's first, Adafactor's second as it makes it of its factors."""
    state = optimizer.state[parameter]
    if "state1" not in state:
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        return torch.outer(row / row.mean(), col)
    moment = state["state1"]
    if moment.dtype == torch.uint8:
        blocks = state["qmap1"][moment.flatten().long()].split(256)
        moment = torch.cat([b * a for b, a in zip(blocks, state["absmax1"], strict=True)]).view(parameter.shape)
    return moment.clone()


def test_the_one_moment_of_survivors_stays_and_newcomers_have_their_mean_or_none(tiny_adapter, train, other_optimizer):
    model = tiny_adapter(r=R)
    optimizer = other_optimizer(model)
    train(model, optimizer, 3)
    layers = gated_layers(model)
    before = {name: (moment_of(optimizer, layer.A), moment_of(optimizer, layer.B)) for name, layer in layers.items()}
    apply_plan(model, PLAN, optimizer)
    second = isinstance(optimizer, Adafactor)
    for name in (Q, V, GATE, DOWN):
        keep = torch.tensor([rank for rank in range(R) if rank not in PLAN.pruned.get(name, ())])
        for parameter, dim, old in ((layers[name].A, 0, before[name][0]), (layers[name].B, 1, before[name][1])):
            new, want = moment_of(optimizer, parameter), old.index_select(dim, keep)
            assert new.shape == parameter.shape
            assert (new.narrow(dim, 0, len(keep)) - want).norm() <= (0.02 if not second else 1e-5) * want.norm(), name
            entering = new.narrow(dim, len(keep), parameter.shape[dim] - len(keep))
            if second:
                mean = want.mean(dim, keepdim=True).expand_as(entering)
                assert torch.allclose(entering, mean, rtol=1e-4, atol=0)
                state = optimizer.state[parameter]  # both factors are means of one matrix
                assert torch.allclose(state["exp_avg_sq_row"].mean(), state["exp_avg_sq_col"].mean(), rtol=1e-4)
            elif entering.numel():
                assert entering.abs().max() <= 1e-4 * old.abs().max()


def test_the_other_optimizers_still_move_every_rank(tiny_adapter, train, other_optimizer):
    model = tiny_adapter(r=R)
    optimizer = other_optimizer(model)
    train(model, optimizer, 3)
    apply_plan(model, PLAN, optimizer)
    before = weights(model)
    train(model, optimizer, 2, first=3)
    for name, layer in gated_layers(model).items():
        assert ((layer.A - before[name][0]).abs().amax(1) > 0).all(), name
        assert ((layer.B - before[name][1]).abs().amax(0) > 0).all(), name


def test_pages_of_moments_that_are_gone_are_forgotten(tiny_adapter, train, make_batch):
    """On a GPU each buffer of a paged optimizer is also held, and prefetched, by the page manager of the process."""
    model = tiny_adapter(r=R)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paged is plain on a CPU
        optimizer = bnb.optim.PagedAdamW32bit(parameters_of(model), lr=1e-3)
    plain, pages = optimizer.get_state_buffer, optimizer.page_mng.paged_tensors

    def paged(parameter, dtype=torch.float32):
        page = plain(parameter, dtype=dtype)
        page.is_paged, page.page_deviceid = True, 0
        pages.append(page)
        return page

    optimizer.get_state_buffer = paged
    before = len(pages)
    train(model, optimizer, 1)
    whole = next(name for name in gated_layers(model) if name not in PLAN.pruned | PLAN.grown)
    apply_plan(model, AllocationPlan(PLAN.pruned | {whole: tuple(range(R))}, PLAN.grown), optimizer)
    held = {id(optimizer.state[p][key]) for p in parameters_of(model) for key in ("state1", "state2")}
    assert {id(page) for page in pages[before:]} == held

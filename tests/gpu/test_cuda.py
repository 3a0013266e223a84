"""What only a CUDA device can show; skipped by name elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from qalora.adapter.ablation import ablate, scoring_mode
from qalora.adapter.allocation import AllocationPlan
from qalora.adapter.allocation_round import keep_best_corrections
from qalora.adapter.model import attach, gated_layers, ranks, write_adapter
from qalora.adapter.start.quantization import start_at_quantization_error
from qalora.adapter.surgery import apply_plan
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.quantized import dequantize, linear_maps, quantize_
from qalora.base.registry import resolve
from qalora.deploy.merging import merge
from qalora.kernels import attention, fused, norm
from qalora.kernels.activations import set_checkpointing
from qalora.kernels.loss import fused_loss, label_only_loss, liger_loss, row_losses, summed_loss
from qalora.training.ladder import Ladder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def mean_loss(model, batch):
    return summed_loss(model, batch) / (batch["labels"][:, 1:] != -100).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_gradients_on_a_4_bit_base_equal_those_in_fp32(tiny_llama, make_batch, randomize_B, dtype):
    gradients = []
    for compute in (dtype, torch.float32):
        base = tiny_llama().to("cuda", dtype).to(compute)  # both quantize the same, rounded weights
        quantize_(base, compute_dtype=compute)
        model = randomize_B(attach(base, r=4, alpha=8))
        mean_loss(model, {key: value.cuda() for key, value in make_batch().items()}).backward()
        gradients.append(torch.cat([layer.A.grad.flatten() for layer in gated_layers(model).values()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("name", ["PagedAdamW32bit", "PagedAdamW8bit", "AdamW8bit"])
def test_training_goes_on_after_surgery_with_bitsandbytes_optimizers(tiny_llama, make_batch, name):
    import bitsandbytes as bnb

    # bitsandbytes pages the moments of 100,000 elements and more.
    base = tiny_llama(hidden_size=1600, intermediate_size=64, num_hidden_layers=1).to("cuda", torch.bfloat16)
    quantize_(base, compute_dtype=torch.bfloat16)
    model = attach(base, r=64, alpha=128, target_modules=["q_proj", "o_proj"])
    optimizer = getattr(bnb.optim, name)([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = {key: value.cuda() for key, value in make_batch().items()}

    def step() -> float:
        loss = mean_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses = [step() for _ in range(3)]
    paged = [state["state1"] for state in optimizer.state.values() if getattr(state["state1"], "is_paged", False)]
    assert bool(paged) == name.startswith("Paged")
    first, *_, last = ranks(model)
    apply_plan(model, AllocationPlan({first: tuple(range(0, 64, 2))}, {last: 32}), optimizer)
    losses += [step() for _ in range(3)]
    assert ranks(model)[first] == 32
    assert ranks(model)[last] == 96
    assert losses[-1] < losses[2] < losses[0]


def test_corrections_give_the_16_bit_model_back_and_the_best_of_them_lower_the_loss(tiny_llama, make_batch):
    whole = tiny_llama(seed=3)
    weights = {name: module.weight.detach() for name, module in whole.named_modules() if hasattr(module, "weight")}
    batch = make_batch(rows=8, tokens=24)
    on_card = {key: value.cuda() for key, value in batch.items()}

    def model(r):
        base = tiny_llama(seed=3).to("cuda", torch.bfloat16)
        quantize_(base, compute_dtype=torch.bfloat16)
        return attach(base, r=r, alpha=2 * r)

    @torch.no_grad()
    def losses(model, batch):
        return row_losses(model, batch).cpu()

    wanted, corrected, best = losses(whole, batch), model(192), model(48)
    before = losses(best, on_card)
    start_at_quantization_error(corrected, [on_card], weights.__getitem__, generator=torch.Generator().manual_seed(0))
    assert (losses(corrected, on_card) - wanted).abs().max() < 0.3 * (before - wanted).abs().max()
    limits = dict(budget=48 * 14, parameters=None, min_rank=0, max_rank=None, seed=0)
    record, _ = keep_best_corrections(best, None, [on_card], weights.__getitem__, ranks(best), **limits)
    assert record["total_rank"] == 48 * 14
    assert losses(best, on_card).sum() < before.sum()


def test_ablation_is_the_same_with_block_inputs_in_host_memory(tiny_llama, make_batch, randomize_B):
    model = randomize_B(attach(tiny_llama().to("cuda"), r=4, alpha=8))
    batch = [{key: value.cuda() for key, value in make_batch().items()}]
    chosen = [(name, rank) for name in list(ranks(model))[::3] for rank in (0, 3)]
    with scoring_mode(model):
        on_host, on_device = (ablate(model, batch, chosen, memory=memory) for memory in (0, 1 << 30))
    assert on_host.drop == pytest.approx(on_device.drop, abs=2e-6)
    assert on_host.alone == pytest.approx(on_device.alone, abs=2e-6)


@pytest.mark.parametrize("rows", [1, 4])
def test_what_a_step_keeps_does_not_change_its_gradients(tiny_llama, make_batch, randomize_B, rows):
    model = randomize_B(attach(tiny_llama(num_hidden_layers=3).to("cuda"), r=4, alpha=8)).train()
    batches = [{key: value.cuda() for key, value in make_batch(rows=rows, seed=seed).items()} for seed in (1, 2)]
    gradients = []
    for kept in (True, "offload", "selective"):
        set_checkpointing(model, kept)
        model.zero_grad()
        for batch in batches:
            mean_loss(model, batch).backward()
        gradients.append(
            [grad.clone() for layer in gated_layers(model).values() for grad in (layer.A.grad, layer.B.grad)]
        )
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def test_fp16_with_a_grad_scaler_trains_fp32_adapters(tiny_llama, make_batch):
    base = tiny_llama().to("cuda", torch.float16)
    quantize_(base, compute_dtype=torch.float16)
    model = attach(base, r=4, alpha=8).train()
    set_checkpointing(model, True)
    parameters = [p for layer in gated_layers(model).values() for p in (layer.A, layer.B)]
    optimizer, scaler = torch.optim.AdamW(parameters, lr=1e-2), torch.amp.GradScaler("cuda")
    batch = {key: value.cuda() for key, value in make_batch().items()}
    losses = []
    for _ in range(8):
        with torch.autocast("cuda", torch.float16):
            loss = mean_loss(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.dtype == p.dtype == torch.float32 for p in parameters)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]  # also False for nan


def test_the_ladder_gives_the_same_gradients_after_a_real_out_of_memory(tiny_llama, make_batch, randomize_B):
    base = tiny_llama(
        torch.bfloat16, four_bit=False, hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
        max_position_embeddings=512,
    ).to("cuda")  # fmt: skip
    model = randomize_B(attach(base, r=4, alpha=8)).train()
    batch = {key: value.cuda() for key, value in make_batch(rows=32, tokens=512).items()}
    count = int((batch["labels"][:, 1:] != -100).sum())
    parameters = [p for layer in gated_layers(model).values() for p in (layer.A, layer.B)]

    def work(inputs):
        loss = summed_loss(model, inputs, fused=liger_loss()) / count
        loss.backward()
        return loss.detach()

    def gradients():
        found = [p.grad.clone() for p in parameters]
        model.zero_grad()
        return torch.cat([grad.flatten() for grad in found])

    said: list[str] = []
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = Ladder(model, said.append).run(batch, work)
    expected, peak = gradients(), torch.cuda.max_memory_allocated()
    assert not said
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 0.6 * (peak - before)) / total)
    try:
        loss = Ladder(model, said.append).run(batch, work)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said and "in 2 pieces" in said[0]
    assert loss.item() == pytest.approx(whole.item(), rel=1e-4)
    assert torch.cosine_similarity(gradients(), expected, dim=0) > 0.999


def test_a_gguf_base_is_quantized_on_the_card_without_its_16_bit_model_there(save_tiny_llama, tmp_path):
    from accelerate import Accelerator

    wide = dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    folder = save_tiny_llama(tmp_path / "model", **wide)
    source = resolve(str(folder))
    (tmp_path / "adapter").mkdir()
    write_adapter(attach(AutoModelForCausalLM.from_pretrained(folder), r=1, alpha=1), tmp_path / "adapter")
    merge(source, tmp_path / "adapter", tmp_path / "gguf", quantization=None, format="gguf", gguf_type="f32")
    tokenizer = load_tokenizer(source)
    expected = load_base(source, dtype="bfloat16", tokenizer=tokenizer).model
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    base = load_base(resolve(str(tmp_path / "gguf" / "model.gguf")), dtype="bfloat16", tokenizer=tokenizer).model
    held = torch.cuda.memory_allocated() - before
    # And not the 16-bit maps, four times as much.
    assert torch.cuda.max_memory_allocated() - before < held + 8 * 512 * 1024
    for name, module in linear_maps(base).items():
        assert torch.equal(dequantize(module), dequantize(expected.get_submodule(name))), name
    assert {parameter.device.type for parameter in base.parameters()} == {"cuda"}
    assert Accelerator().prepare_model(attach(base, r=2, alpha=4)).device.type == "cuda"


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def assert_close(theirs, ours):
    """Up to what bf16 rounds away of sums that are taken in another order."""
    for other, own in zip(theirs, ours, strict=True):
        assert (other.float() - own.float()).norm() <= 1e-2 * own.float().norm()


@pytest.mark.parametrize("weighing", ["before", "after"])
def test_torchs_norm_computes_ours(weighing):
    weight, grad, results = 1 + normal(256, seed=0) / 8, normal(2, 40, 256, seed=1), []
    for compute in (fused.rms_norm, norm._FrozenRMSNorm.apply):
        x = normal(2, 40, 256, seed=2).requires_grad_()
        out = compute(x, weight, 1e-5, weighing)
        out.backward(grad)
        results.append((out.detach(), x.grad))
    assert_close(*results)


def test_liger_turns_q_and_k_as_we_do(monkeypatch):
    pytest.importorskip("liger_kernel")
    angles = normal(1, 40, 32, seed=0).float().repeat(1, 1, 2)
    turn, results = (angles.cos().bfloat16(), angles.sin().bfloat16(), 64), []
    for name in ("Liger-Kernel", None):
        if name is None:
            monkeypatch.setattr(fused, "rotates", lambda z: False)
        q, k, v = normal(2, 40, 256, seed=1), normal(2, 40, 128, seed=2), normal(2, 40, 128, seed=3)
        back = attention.turned_back((q, k, v), *turn)
        results.append([*back, *attention.rotated_(q, k, *turn)])
    assert_close(*results)


def test_liger_computes_our_swiglu():
    pytest.importorskip("liger_kernel")
    gate, up, grad = (normal(2, 40, 192, seed=seed) for seed in range(3))
    leaves = [z.float().requires_grad_() for z in (gate, up)]
    ours = F.silu(leaves[0]) * leaves[1]
    ours.backward(grad.float())
    assert fused.multiplies(gate, up)
    theirs = fused.silu_product(gate, up)
    assert_close([theirs, *fused.silu_product_backward(gate, up, grad)], [ours, *(z.grad for z in leaves)])


def test_liger_computes_our_loss():
    pytest.importorskip("liger_kernel")
    hidden, head = normal(2, 40, 256, seed=0), normal(5000, 256, seed=1) / 16
    labels = torch.randint(0, 5000, (2, 40), generator=torch.Generator().manual_seed(0)).cuda()
    results = []
    for compute in (lambda *problem: label_only_loss(*problem).sum(), partial(fused_loss, fused=liger_loss())):
        leaf = hidden.clone().requires_grad_()
        loss = compute(leaf, labels, head)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert_close(*reversed(results))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_make_the_run_of_one(save_tiny_llama, tmp_path):
    """Over NCCL, as torchrun starts it: the same ranks, losses up to rounding, and one line of output a step."""
    base = save_tiny_llama(tmp_path / "base", hidden_size=256, intermediate_size=512, max_position_embeddings=64)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i} ", "completion": "ab" * (1 + i % 9)}) + "\n" for i in range(64))
    )
    losses, ranks_of = [], []
    for size in (1, 2):
        words = [
            "--model", str(base), "--recipe", "alpaca", "--output-dir", str(tmp_path / str(size)), "--dtype", "float32",
            f"data.train={rows}", "data.format=auto", "training.max_steps=20", "allocation.rounds=2", "logging.steps=1",
            "allocation.warmup=5", "allocation.interval=6", "training.micro_batch_size=4",
        ]  # fmt: skip
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
        subprocess.run([*launcher, "-m", "qalora.finetune", *words], check=True, timeout=600)
        log = (tmp_path / str(size) / "log_history.jsonl").read_text().splitlines()
        losses.append([entry["loss"] for entry in map(json.loads, log) if "loss" in entry])
        records = (tmp_path / str(size) / "allocation.jsonl").read_text().splitlines()
        ranks_of.append([json.loads(line)["ranks"] for line in records])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert ranks_of[0] == ranks_of[1]

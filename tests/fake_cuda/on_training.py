"""Training on the device without hardware, with values: gradients and runs as on a CPU, and how often the host
waits."""

from __future__ import annotations

import json
import random

import pytest
import torch

from qalora import finetune
from qalora.adapter.allocation import AllocationPlan
from qalora.adapter.model import attach, gated_layers, ranks
from qalora.adapter.surgery import apply_plan, page_again
from qalora.base.quantized import quantize_
from qalora.kernels import activations
from qalora.kernels.loss import summed_loss
from qalora.training.ladder import Ladder

MOST_KERNELS = {"padded": 444, "packed": 413}


def gradients(model, batch):
    model.zero_grad()
    summed_loss(model, batch).backward()
    return torch.cat(
        [g.flatten().cpu() for layer in gated_layers(model).values() for g in (layer.A.grad, layer.B.grad)]
    )


def on_the_card(batch):
    return {key: value.cuda() for key, value in batch.items()}


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 1 - 1e-6), (torch.bfloat16, 0.9995)], ids=["fp32", "bf16"]
)
def test_gradients_are_those_of_a_cpu(device, tiny_llama, make_batch, randomize_B, dtype, least):
    found = []
    for place in ("cpu", "cuda"):
        base = tiny_llama(dtype).to(place)
        quantize_(base, compute_dtype=dtype)
        model = randomize_B(attach(base, r=4, alpha=8)).train()
        batch = make_batch()
        found.append(gradients(model, batch if place == "cpu" else on_the_card(batch)))
    assert torch.cosine_similarity(*found, dim=0) > least


def test_the_ladder_cuts_a_micro_batch_that_the_card_has_no_room_for(device, tiny_llama, make_batch, randomize_B):
    model = randomize_B(attach(tiny_llama().to("cuda"), r=4, alpha=8)).train()
    batch = on_the_card(make_batch(rows=8))
    before = device.allocated
    device.reset_peak()
    expected = gradients(model, batch)
    peak = device.peak
    model.zero_grad()
    said = []

    def work(inputs):
        loss = summed_loss(model, inputs)
        loss.backward()
        return loss.detach()

    device.set_fraction((before + 0.7 * (peak - before)) / device.total)
    Ladder(model, said.append).run(batch, work)
    assert said and "in 2 pieces" in said[0]
    found = torch.cat(
        [g.flatten().cpu() for layer in gated_layers(model).values() for g in (layer.A.grad, layer.B.grad)]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_broken_forward_leaves_no_block_inputs_to_the_next(device, tiny_llama, make_batch):
    model = attach(tiny_llama(num_hidden_layers=3).to("cuda"), r=2, alpha=4).train()
    activations.set_checkpointing(model, "offload")
    batch, fetched, broken = on_the_card(make_batch(rows=2)), [], [True]

    def work(inputs):
        loss = summed_loss(model, inputs)
        if broken.pop() if broken else False:
            raise torch.OutOfMemoryError("in the forward")
        fetch = activations._Kept.fetch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(activations._Kept, "fetch", lambda kept: fetched.append(kept) or fetch(kept))
            loss.backward()
        return loss.detach()

    ladder = Ladder(model, lambda line: None)
    ladder.halvings = 1  # so that a single row is the next piece
    ladder.run(batch, work)
    assert len({id(kept) for kept in fetched}) == 2 * 3 * 2 // 2  # of two rungs' rows: each block's input, and no other


def test_block_inputs_share_pieces_of_host_memory_from_step_to_step(device, tiny_llama, make_batch, monkeypatch):
    pinned = []
    monkeypatch.setattr(activations, "_pin", lambda piece: pinned.append(piece.nbytes))
    model = attach(tiny_llama(num_hidden_layers=3).to("cuda"), r=2, alpha=4).train()
    activations.set_checkpointing(model, "offload")
    for rows in (3, 2, 3):
        gradients(model, on_the_card(make_batch(rows=rows, tokens=11)))
    assert pinned == [3 * 11 * 64 * 4] * 3  # the bytes of each block's input, and no power of two


def paged_model(tiny_llama):
    import bitsandbytes as bnb

    base = tiny_llama(hidden_size=1600, intermediate_size=64, num_hidden_layers=1).to("cuda", torch.bfloat16)
    quantize_(base, compute_dtype=torch.bfloat16)
    model = attach(base, r=64, alpha=128, target_modules=["q_proj", "o_proj"])
    optimizer = bnb.optim.PagedAdamW32bit([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_resized_moments_take_the_managed_memory_that_others_left(device, tiny_llama):
    model, optimizer = paged_model(tiny_llama)
    first, last = ranks(model)
    taken = []
    for there, back in ((first, last), (last, first)) * 3:
        apply_plan(model, AllocationPlan({there: (0,)}, {back: 1}), optimizer)
        taken.append(device.paged)
    assert all(
        getattr(state["state1"], "is_paged", False)
        for state in optimizer.state.values()
        if state["state1"].numel() >= 1e5
    )
    assert taken[2:] == taken[1:2] * 4


def test_paged_moments_are_paged_again_after_a_resume(device, tiny_llama):
    _, optimizer = paged_model(tiny_llama)
    saved = {
        "state": {i: {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in state.items()} for i,
        state in enumerate(optimizer.state.values())},
        "param_groups": optimizer.state_dict()["param_groups"],
    }  # fmt: skip
    optimizer.load_state_dict(saved)
    assert not any(getattr(state["state1"], "is_paged", False) for state in optimizer.state.values())
    page_again(optimizer)
    for i, state in enumerate(optimizer.state.values()):
        assert state["state1"].is_paged == state["state2"].is_paged == (state["state1"].numel() >= 1e5)
        assert torch.equal(state["state1"], saved["state"][i]["state1"])


@pytest.fixture(scope="session")
def run(save_tiny_llama, tmp_path_factory):
    """run(*settings) → metrics of a run of 4 steps on tiny data, with its folder."""
    folder = tmp_path_factory.mktemp("run")
    save_tiny_llama(folder / "model")
    random.seed(0)
    rows = [{"instruction": f"say {i}", "input": "", "output": f"word{i} " * (1 + i % 3)} for i in range(24)]
    for name, part in (("train", rows[:16]), ("validation", rows[20:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))

    def of(name, *settings):
        out = folder / name
        finetune.main(
            [
                "--model", str(folder / "model"), "--recipe", "alpaca", "--output-dir", str(out),
                f"data.train={folder}/train.jsonl",
                f"data.validation={folder}/validation.jsonl", "data.max_seq_len=300", "training.micro_batch_size=2",
                "lora.r=4", "lora.alpha=8", "allocation.val_batch_size=2",
                "allocation.scoring=first-order",
                "evaluation.before=false", "evaluation.after=false", "training.eval_steps=2", "training.save_steps=2",
                "logging.quiet=true", "logging.steps=100", "--dtype", "float32", *settings,
            ]
        )  # fmt: skip
        return out

    return of


def test_a_run_with_a_round_a_checkpoint_and_a_resume(device, run, monkeypatch):
    from safetensors.torch import load_file

    settings = ["training.max_steps=4", "training.gradient_accumulation_steps=1", "allocation.rounds=1",
                "allocation.warmup=1", "allocation.interval=1"]  # fmt: skip
    whole = run("whole", *settings)
    (record,) = map(json.loads, (whole / "allocation.jsonl").read_text().splitlines())
    assert record["pruned"]
    state = json.loads((whole / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    (whole / "checkpoint-4").rename(whole / "gone")
    straight = load_file(whole / "adapter" / "adapter_model.safetensors")
    loaded = []
    monkeypatch.setattr("qalora.training.trainer.page_again", lambda optimizer: loaded.append(len(optimizer.state)))
    again = run("whole", *settings, "--resume-from-checkpoint", str(whole / "checkpoint-2"))
    resumed = load_file(again / "adapter" / "adapter_model.safetensors")
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor)
    assert loaded and loaded[0]  # moments are there, and go back into managed memory


def test_a_step_has_one_synchronization_and_no_more_kernels_than_counted(device, run, monkeypatch):
    """A change that makes the host wait, or launches more, is seen here; the counts are of 2 blocks and 2 rows,
    shared or packed."""
    from qalora.training.trainer import QaloraTrainer

    step, found = QaloraTrainer.training_step, []

    def counted(self, *args, **kwargs):
        with device.counted() as (syncs, kernels):
            loss = step(self, *args, **kwargs)
        found.append((dict(syncs), sum(kernels.values())))
        return loss

    monkeypatch.setattr(QaloraTrainer, "training_step", counted)
    for name, more in {"padded": [], "packed": ["data.packing=true"]}.items():
        found.clear()
        nothing_else = ["training.eval_strategy=no", "training.save_strategy=no", "allocation.rounds=0"]
        run(name, "training.max_steps=1", "training.gradient_accumulation_steps=2", *nothing_else, *more)
        assert len(found) == 2
        for syncs, kernels in found:
            assert sum(syncs.values()) <= 1, syncs
            assert kernels <= MOST_KERNELS[name]

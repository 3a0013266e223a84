"""What needs a GPU: memory and speed of training steps against PEFT's under other trainers, the longest context, a
round of scoring, and the planned bytes against the measured ones. Random weights in real shapes, made a block at a
time: nothing is downloaded.

    python bench/gpu.py --describe                    # what will run, in which part
    python bench/gpu.py --part 1                      # tests/gpu and the 8B cases; under 9 minutes
    python bench/gpu.py --part 2                      # the others; under 9 minutes
    python bench/gpu.py --only 7b 33b                 # some of the cases, by the beginnings of their names
    python bench/gpu.py --shapes tiny --device cpu    # every path on any machine; the figures mean nothing

In a checkout that is not installed, with PYTHONPATH=. before it. Each case has a process of its own, and gpu.json and
gpu.md in --out are written after each: what is there without an error is not run again. One that fails leaves its error
in the results. Smaller cards are imitated by a limit on what torch may reserve: the card's bytes less those of a CUDA
context. That limits memory, not speed, and an imitated T4 still has this card's attention kernels.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import bitsandbytes as bnb
import torch
from common import RESULTS, environment, random_llama, table, write_results
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn

from qalora.adapter.allocation_round import RoundSettings, allocation_round
from qalora.adapter.model import attach, gated_layers
from qalora.adapter.scoring import score_ranks
from qalora.base.registry import MODELS, ModelShape
from qalora.fitting import HEADROOM, fit, largest
from qalora.kernels.activations import set_checkpointing, set_mlp_tile
from qalora.kernels.layout import prepared
from qalora.kernels.loss import liger_loss, summed_loss
from qalora.memory import CUDA_CONTEXT, Checkpointing, plan_memory
from qalora.sizes import MLP_TILE

ROOT = Path(__file__).resolve().parents[1]
GIB, GB = 2**30, 10**9
TINY = ModelShape(64, 192, 4, 4, 2, 16, 128)
TINY_CARD = 5 * 2**20
OPTIMIZERS = {
    "adamw_torch": torch.optim.AdamW,
    "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
}
LEFT = 25  # seconds, without which no further case is begun
LONGEST_SECONDS = 200
TRIES, TRY_BLOCKS = 4, 3  # of the longest context: lengths, and the blocks that each is tried on
ROUND_STEP, ROUND_TOKENS = 150, 16 * 512  # the round of `auto` that is timed, and the tokens of a step before it

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        work: train, fitted, longest or scoring.
        samples: texts packed into each row.
        kept: gradient_checkpointing; tile: mlp_tile.
        card: bytes of the card that is imitated; None: this one.
        steps: timed ones, after `warm_up` that are not.
    """

    work: str
    model: str
    side: str = "qalora"
    rows: int = 1
    tokens: int = 512
    samples: int = 1
    r: int = 8
    dtype: str = "bfloat16"
    optim: str = "paged_adamw_32bit"
    kept: Checkpointing = True
    tile: int | None = None
    card: int | None = None
    warm_up: int = 3
    steps: int = 8


LLAMA_8B = Case("train", "llama3.1-8b", warm_up=2, steps=5)
T4 = Case("fitted", "llama-7b", dtype="float16", card=15 * GB)
TESTS = Case("tests", "llama-7b")
# In the order in which they run: what a bar stands on first, for the time may not suffice for all.
PARTS = {
    1: {
        "tests": TESTS,
        "8b": replace(LLAMA_8B, rows=2, tokens=2048),
        "8b-trl": replace(LLAMA_8B, side="trl", rows=2, tokens=2048),
        "8b-trl-liger": replace(LLAMA_8B, side="trl-liger", rows=2, tokens=2048),
        "8b-hf": replace(LLAMA_8B, side="hf", rows=2, tokens=2048),
        "8b-selective": replace(LLAMA_8B, rows=2, tokens=2048, kept="selective"),
        "8b-packed": replace(LLAMA_8B, tokens=4096, samples=2, kept="offload"),
        "7b": Case("train", "llama-7b"),
    },
    2: {
        "7b-hf": Case("train", "llama-7b", side="hf"),
        "33b-24gib": Case("train", "llama-30b", card=24 * GIB, warm_up=2, steps=3),
        "8b-longest-24gib": Case("longest", "llama3.1-8b", r=32, kept="offload", tile=MLP_TILE, card=24 * GIB),
        "7b-fp16-15gb": T4,
        "7b-scoring": Case("scoring", "llama-7b", rows=8, tokens=128),
        "8b-packed-on-device": replace(LLAMA_8B, tokens=4096, samples=2),
        "7b-fp16-15gb-fit": replace(T4, rows=16),
        "7b-8bit": Case("train", "llama-7b", optim="paged_adamw_8bit"),
        "7b-peft": Case("train", "llama-7b", side="peft"),
    },
}
CASES = {name: case for part in PARTS.values() for name, case in part.items()}


def main() -> None:
    args = parser().parse_args()
    if args.worker:
        print(json.dumps(work(args.worker, args.shapes, args.device, args.seconds)))
    elif args.describe:
        print(description())
    elif args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"no GPU: torch {torch.__version__} sees no CUDA device here, so nothing was measured "
            "(--shapes tiny --device cpu tries every path without one)"
        )
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    """The cases that were asked for and are not in the results yet, one after another."""
    deadline = time.perf_counter() + 60 * args.minutes
    file = args.out / "gpu.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["cases"] if file.exists() else {}
    # In a process of its own like the cases: a CUDA context here would take memory beside each of them.
    facts = {**run("facts", args, 60), "command": " ".join(["python", *sys.argv])}
    for name in asked(args):
        if "error" not in found.get(name, {"error": "not run"}):
            continue
        left = deadline - time.perf_counter()
        found[name] = run(name, args, left) if left > LEFT else {"error": "not run: out of time"}
        print(f"{name}: {found[name].get('error', 'measured')}", file=sys.stderr)
        write_results("gpu", {**facts, "cases": found}, report(facts, found), folder=args.out)


def asked(args: argparse.Namespace) -> list[str]:
    names = PARTS[args.part] if args.part else CASES
    return [name for name in names if not args.only or name.startswith(tuple(args.only))]


def description() -> str:
    """What the parts will do, and what they need of a machine."""
    lines = ["Carried: the checkout alone (qalora/, bench/, tests/); weights are random, and nothing is downloaded."]
    for number, cases in PARTS.items():
        lines += ["", f"python bench/gpu.py --part {number}"]
        for name, case in cases.items():
            does = (
                "tests/gpu"
                if case.work == "tests"
                else f"{case.work}, {case.model}, {case.rows} × {case.tokens} by {case.side}"
            )
            lines.append(f"  {name:<22}{does}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="no case begins after these (default: %(default)s)")
    parser.add_argument("--part", type=int, choices=tuple(PARTS), help="of the cases (default: all)")
    parser.add_argument("--describe", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"cases: {', '.join(CASES)}")
    parser.add_argument("--shapes", choices=("real", "tiny"), default="real")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    return parser


def run(name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What the worker of that name found, or {"error": why it did not}."""
    command = [sys.executable, __file__, "--shapes", args.shapes, "--device", args.device, "--worker", name]
    try:
        done = subprocess.run(
            [*command, "--seconds", str(seconds)], capture_output=True, text=True, timeout=seconds + 10
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds + 10:.0f} s: out of time"}
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        return {"error": lines[-1].strip()[:500]}
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------- in a worker


def work(name: str, shapes: str, device: str, seconds: float) -> dict[str, Any]:
    if name == "facts":
        return card_facts(device)
    case, shape = CASES[name], MODELS[CASES[name].model][1]
    if shapes == "tiny":
        # A context is as large beside tiny shapes, and a plan leaves a share of it too.
        card = TINY_CARD + (int(CUDA_CONTEXT / HEADROOM) if device == "cuda" else 0)
        case = replace(case, tokens=case.tokens // 32, card=case.card and card, warm_up=1, steps=1)
        shape = TINY
    return {**asdict(case), **WORK[case.work](case, shape, device, seconds)}


def card_facts(device: str) -> dict[str, Any]:
    facts = environment()
    if device == "cpu":
        return facts
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip() or None
    free, total = torch.cuda.mem_get_info()
    return {
        **facts,
        "driver": driver,
        "cuda": torch.version.cuda,
        "memory_bytes": total,
        "in_use_before_any_tensor_bytes": total - free,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }


def train(case: Case, shape: ModelShape, device: str, seconds: float) -> dict[str, Any]:
    """Whole optimizer steps, all tokens supervised: median time, and the peak over all of them."""
    limit(device, case.card)
    times, losses, optimizer = (steps_of if case.side in SIDES else rivals_steps)(case, shape, device)
    duration = statistics.median(times[case.warm_up :])
    found = {
        "step_seconds": duration,
        "tokens_per_second": case.rows * case.tokens / duration,
        **peaks(device),
        "paged_bytes": paged_bytes(optimizer),
        "losses": losses,
    }
    if case.side == "qalora":
        # Paged moments are managed memory, which torch's counters do not see.
        context = CUDA_CONTEXT if device == "cuda" else 0
        planned = plan_of(case, shape, device)().total - context - found["paged_bytes"]
        found |= {"planned": planned, "plan_error": planned / found["allocated"] - 1}
    return found


def steps_of(case: Case, shape: ModelShape, device: str) -> tuple[list[float], list[float], Any]:
    """(seconds, losses, the optimizer)."""
    model = SIDES[case.side](case, shape, device)
    step, optimizer = stepper(case, model, device)
    batch = batch_of(case, shape, device)
    fresh_peak(device)
    times, losses = [], []
    for _ in range(case.warm_up + case.steps):
        loss, duration = timed(device, partial(step, batch))
        times.append(duration)
        losses.append(loss.item())
    return times, losses, optimizer


def rivals_steps(case: Case, shape: ModelShape, device: str) -> tuple[list[float], list[float], Any]:
    import gpu_rivals

    if absent := gpu_rivals.missing(case.side):
        raise SystemExit(absent)
    base, ids = base_of(case, shape, device), tokens_of(case, shape, "cpu")["input_ids"]
    fresh_peak(device)
    return gpu_rivals.trained_by(
        case.side, base, ids, r=case.r, optim=case.optim, steps=case.warm_up + case.steps, device=device,
        wait=partial(wait, device),
    )  # fmt: skip


def tests(case: Case, shape: ModelShape, device: str, seconds: float) -> dict[str, Any]:
    """tests/gpu, in this process."""
    import pytest

    code = pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")])
    if code:
        raise SystemExit(f"tests/gpu: exit code {int(code)}")
    return {"passed": True}


def fitted(case: Case, shape: ModelShape, device: str, seconds: float) -> dict[str, Any]:
    """The step that `training.fit=auto` chooses for the card and so many rows an optimizer step."""
    chosen = fit(plan_of(case, shape, device), int(case.card or 0), batch_size=case.rows, seq_len=case.tokens)
    if chosen is None:
        raise RuntimeError("no settings fit this card by the plan")
    case = replace(
        case, rows=chosen.micro_batch_size, kept=chosen.gradient_checkpointing, tile=chosen.mlp_tile, warm_up=2, steps=4
    )
    return {**asdict(case), **train(case, shape, device, seconds)}


def longest(case: Case, shape: ModelShape, device: str, seconds: float) -> dict[str, Any]:
    """The longest row whose forward and backward fit the card.

    Lengths are tried on the first few blocks, with the weights, gradients and moments of all of them there: a step
    holds two block inputs and the insides of one block, however many blocks there are. What then counts is a step
    through all.
    """
    start = time.perf_counter()
    seconds = min(seconds, LONGEST_SECONDS)
    model = by_qalora(case, shape, device)
    step, optimizer = stepper(case, model, device)
    step(tokens_of(replace(case, tokens=min(case.tokens, 256)), shape, device))
    for parameter in trained(model):
        parameter.grad = torch.zeros_like(parameter)
    # A card that small may have none of the moments paged out.
    limit(device, case.card, beside=paged_bytes(optimizer))

    def attempt(tokens: int, blocks: int) -> dict[str, Any]:
        return long_step(model, batch_of(replace(case, tokens=tokens), shape, device), blocks, device)

    def left() -> float:
        return seconds - (time.perf_counter() - start)

    planned = largest(plan_of(case, shape, device), int(case.card or 0), "seq_len")
    tries: list[dict[str, Any]] = []
    low, high, tokens = 0, 0, planned
    while len(tries) < TRIES and left() > 0.6 * seconds:
        tries.append(attempt(tokens, TRY_BLOCKS))
        if "error" in tries[-1]:
            high = tokens
        else:
            low = tokens
        tokens = (low + high) // 2 if low and high else int(1.15 * low) if low else int(0.8 * high)
    found = {"planned_tokens": planned, "tries": tries, "whole_steps": [], "longest": 0}
    if not low:
        return found
    # Attention grows with the square of the length, so this is no less than a whole step will take.
    of_all = shape.num_hidden_layers / TRY_BLOCKS * max(t["seconds"] for t in tries if t["tokens"] == low)
    tokens = int(low * min(1.0, (max(0.0, left() - 10) / of_all) ** 0.5))
    for length in (tokens, int(0.94 * tokens)):
        if length < 2:
            break
        found["whole_steps"].append(attempt(length, shape.num_hidden_layers))
        if "error" not in found["whole_steps"][-1]:
            found["longest"] = length
            break
    return found


def long_step(model: nn.Module, batch: Batch, blocks: int, device: str) -> dict[str, Any]:
    """One forward and backward through the first blocks; an error is an answer, and leaves nothing behind."""
    decoder: Any = model.get_base_model().model  # type: ignore[operator]
    every, found = decoder.layers, {"tokens": batch["input_ids"].shape[1], "blocks": blocks}
    fresh_peak(device)
    try:
        decoder.layers = every[:blocks]
        found["seconds"] = timed(device, lambda: summed_loss(model, batch).backward())[1]
    except RuntimeError as error:  # torch.OutOfMemoryError, and what pinning host memory raises
        found["error"] = " ".join(str(error).split())[:200]
    finally:
        decoder.layers = every
    found |= peaks(device)
    if "error" in found:
        set_checkpointing(model, "offload")  # a store of its own, without the block inputs of the broken attempt
        fresh_peak(device)
    return found


def scoring(case: Case, shape: ModelShape, device: str, seconds: float) -> dict[str, Any]:
    """A round of allocation, and first order alone, beside a training step on the same tokens; half of them
    supervised."""
    model = by_qalora(case, shape, device)
    for layer in gated_layers(model).values():
        nn.init.normal_(layer.B, std=0.01)
    step, optimizer = stepper(case, model, device)
    batch = tokens_of(case, shape, device)
    batch["labels"][:, : case.tokens // 2] = -100
    fresh_peak(device)
    step(batch)  # moments are there from now on, and the peak that a round may use

    def forward_backward() -> None:
        (summed_loss(model, batch) / batch["labels"].numel()).backward()
        optimizer.zero_grad()

    training, first = (
        statistics.median(timed(device, task)[1] for _ in range(4))
        for task in (forward_backward, lambda: score_ranks(model, [batch], "first-order"))
    )
    ranks = sum(len(layer.A) for layer in gated_layers(model).values())
    settings = RoundSettings(
        budget=ranks, prune=len(gated_layers(model)), scoring="auto", importance="sum", min_rank=0, max_rank=None,
        seed=0, step_tokens=ROUND_TOKENS, modules=tuple(gated_layers(model)),
    )  # fmt: skip
    (record, scores), whole = timed(device, lambda: allocation_round(model, optimizer, [batch], settings, ROUND_STEP))
    after = step(batch).item()
    return {
        "ranks": ranks,
        "training_seconds": training,
        "first_order_seconds": first,
        "first_order_steps": first / training,
        "round_seconds": whole,
        "round_steps": whole / training,
        "round_steps_counted": record["forward_equivalents"] / 3,
        "round_share": whole / (training * ROUND_STEP * ROUND_TOKENS / (case.rows * case.tokens)),
        "exact_evaluations": record["exact_evaluations"],
        "certified": record["certified"],
        "residual": scores.residual and asdict(scores.residual),
        "loss_after_surgery": after,
        **peaks(device),
    }


WORK: dict[str, Callable[[Case, ModelShape, str, float], dict[str, Any]]] = {
    "train": train,
    "fitted": fitted,
    "longest": longest,
    "scoring": scoring,
    "tests": tests,
}

# ----------------------------------------------------------------------------------------------------- models and steps


def base_of(case: Case, shape: ModelShape, device: str) -> Any:
    """The frozen base, a block at a time, so that the 16-bit weights of one block alone are ever there."""
    dtype = getattr(torch, case.dtype)
    model: Any = random_llama(replace(shape, num_hidden_layers=1), device=device, compute_dtype=dtype)
    for index in range(1, shape.num_hidden_layers):
        one = replace(shape, num_hidden_layers=1, vocab_size=8)
        block = random_llama(one, device=device, compute_dtype=dtype).model.layers[0]  # type: ignore[operator]
        block.self_attn.layer_idx, block.self_attn.config = index, model.config
        model.model.layers.append(block)
    model.config.num_hidden_layers = shape.num_hidden_layers
    return model


def by_qalora(case: Case, shape: ModelShape, device: str) -> Any:
    """As training/trainer.py puts it together."""
    base = base_of(case, shape, device)
    model = attach(base, r=case.r, alpha=2 * case.r)
    set_checkpointing(base, case.kept)
    set_mlp_tile(base, case.tile)
    return model.train()


def by_peft(case: Case, shape: ModelShape, device: str) -> Any:
    """As QLoRA's users write it."""
    base = prepare_model_for_kbit_training(
        base_of(case, shape, device), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    config = LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


SIDES = {"qalora": by_qalora, "peft": by_peft}


def stepper(case: Case, model: nn.Module, device: str) -> tuple[Callable[[Batch], torch.Tensor], Any]:
    """(one optimizer step as Hugging Face's Trainer takes it, its optimizer)."""
    parameters, fused = trained(model), liger_loss() if torch.cuda.is_available() else None
    optimizer: Any = OPTIMIZERS[case.optim](parameters, lr=2e-4)
    scaler = torch.amp.GradScaler(device, enabled=case.dtype == "float16")
    # The Trainer's fp16 means autocast; so does bf16, which QLoRA's users set and our bf16 base does without.
    autocast = case.dtype == "float16" or case.side == "peft"

    def loss_of(model: Any, batch: Batch) -> torch.Tensor:
        if case.side == "peft":
            return model(**batch).loss  # type: ignore[no-any-return]
        return summed_loss(model, batch, fused=fused) / (batch["labels"][:, 1:] != -100).sum()

    def step(batch: Batch) -> torch.Tensor:
        with torch.autocast(device, getattr(torch, case.dtype)) if autocast else nullcontext():
            loss = loss_of(model, batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    return step, optimizer


def tokens_of(case: Case, shape: ModelShape, device: str) -> Batch:
    """What the collators of data/batching.py give: a mask, or, packed, positions that restart and none."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, shape.vocab_size, (case.rows, case.tokens), generator=generator).to(device)
    if case.samples == 1:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    length = case.tokens // case.samples
    positions = torch.arange(case.tokens, device=device) % length
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(positions == 0, -100),
        "position_ids": positions.expand(case.rows, -1),
    }


def batch_of(case: Case, shape: ModelShape, device: str) -> Batch:
    """A micro-batch as a trainer hands it over: ours with what was found of it on the host (kernels/layout.py)."""
    batch = tokens_of(case, shape, "cpu" if case.side == "qalora" else device)
    return cast(Batch, prepared(batch, torch.device(device))) if case.side == "qalora" else batch


def plan_of(case: Case, shape: ModelShape, device: str = "cuda") -> Callable[..., Any]:
    """`plan_memory` with the case's settings, of which any can be set anew."""
    return partial(
        plan_memory, shape, ranks=case.r, micro_batch_size=case.rows, seq_len=case.tokens, compute_dtype=case.dtype,
        optim=case.optim, gradient_checkpointing=case.kept, mlp_tile=case.tile, packed=case.samples > 1,
        device=device,
    )  # fmt: skip


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def paged_bytes(optimizer: Any) -> int:
    """Of moments in managed memory; bitsandbytes pages those of tensors with 100,000 elements or more."""
    tensors = [value for state in optimizer.state.values() for value in state.values()]
    return sum(tensor.nbytes for tensor in tensors if getattr(tensor, "is_paged", False))


# ------------------------------------------------------------------------------------------------------ time and memory


def timed(device: str, task: Callable[[], Any]) -> tuple[Any, float]:
    wait(device)
    start = time.perf_counter()
    result = task()
    wait(device)
    return result, time.perf_counter() - start


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def limit(device: str, card: int | None, beside: int = 0) -> None:
    """Lets torch reserve what a card of so many bytes has beside a CUDA context."""
    if device == "cuda" and card is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (card - CUDA_CONTEXT - beside) / total))


def fresh_peak(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks(device: str) -> dict[str, float]:
    """Bytes: allocated, those and what a stream may still read (active), and reserved from the driver."""
    if device == "cpu":
        return dict.fromkeys(("allocated", "active", "reserved"), float("nan"))
    return {
        "allocated": torch.cuda.max_memory_allocated(),
        "active": torch.cuda.memory_stats()["active_bytes.all.peak"],
        "reserved": torch.cuda.max_memory_reserved(),
    }


# ------------------------------------------------------------------------------------------------------------ reporting

Answer = tuple[str, bool]


def faster(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Answer:
    ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
    rates = f"{ours['tokens_per_second']:,.0f} against {theirs['tokens_per_second']:,.0f} tokens/s"
    return f"{ratio:.2f} times: {rates}", ratio >= 1.5


def equal(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Answer:
    """Before the first step an adapter changes nothing, so both have the base's own loss."""
    first, other = ours["losses"][0], theirs["losses"][0]
    return f"{first:.4f} and {other:.4f} before the first step", abs(first - other) <= 0.01 * other


def fits(case: Mapping[str, Any]) -> Answer:
    shown = f"{case['reserved'] / GIB:.2f} GiB reserved, losses {case['losses'][0]:.3f} → {case['losses'][-1]:.3f}"
    return shown, all(loss == loss for loss in case["losses"])


def plans(*cases: Mapping[str, Any]) -> Answer:
    worst = max(cases, key=lambda case: abs(case["plan_error"]))
    error = worst["plan_error"]
    shown = f"{error:+.1%}: {worst['model']}, {worst['rows']} × {worst['tokens']}, {worst['dtype']}"
    return f"{shown}, the largest of {len(cases)}", abs(error) <= 0.05


# (bar, the cases it is read from, what they say). The plan's is read from every training step that was measured.
BARS: tuple[tuple[str, tuple[str, ...], Callable[..., Answer]], ...] = (
    (
        "LLaMA-7B, 1 × 512: at most 4.6 GB allocated",
        ("7b",),
        lambda ours: (f"{ours['allocated'] / GB:.2f} GB", ours["allocated"] <= 4.6 * GB),
    ),
    (
        "Llama-3.1-8B, 2 × 2048: at most 7.0 GiB allocated",
        ("8b-packed",),
        lambda ours: (f"{ours['allocated'] / GIB:.2f} GiB", ours["allocated"] <= 7.0 * GIB),
    ),
    ("… and at least 1.5 times TRL's tokens a second", ("8b-packed", "8b-trl"), faster),
    ("… with TRL's loss on the same tokens", ("8b", "8b-trl"), equal),
    (
        "Llama-3.1-8B, r = 32, 24 GiB: one row of at least 100,000 tokens",
        ("8b-longest-24gib",),
        lambda ours: (f"{ours['longest']:,} tokens", ours["longest"] >= 100_000),
    ),
    ("LLaMA-33B, 1 × 512, trains in 24 GiB", ("33b-24gib",), fits),
    ("LLaMA-7B in fp16, 1 × 512, trains in 15 GB", ("7b-fp16-15gb",), fits),
)


def report(facts: Mapping[str, Any], cases: Mapping[str, Any]) -> str:
    measured = {name: case for name, case in cases.items() if "error" not in case}
    steps = {name: case for name, case in measured.items() if "tokens_per_second" in case}
    planned = [case for case in steps.values() if "planned" in case]
    bars = [(bar, [cases.get(name, {"error": "not run"}) for name in names], ask) for bar, names, ask in BARS]
    if planned:
        bars.append(("planned bytes within 5 % of the measured ones", planned, plans))
    versions = ", ".join(f"{name} {facts.get(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    lines = [
        "# gpu\n",
        f"{facts.get('device', facts.get('error'))}, {facts.get('memory_bytes', 0) / GIB:.1f} GiB, driver "
        f"{facts.get('driver')}, CUDA "
        f"{facts.get('cuda')}; {versions}; {facts.get('date')}, commit {facts.get('commit')}.\n",
        f"    {facts['command']}\n",
        "Random NF4 weights, every linear map adapted, all tokens supervised, AdamW with paged moments, gradients "
        "clipped; medians of whole optimizer steps. Smaller cards are imitated by a limit on torch's memory. PEFT: "
        "`prepare_model_for_kbit_training`, non-reentrant checkpointing, autocast, the model's own loss.\n",
        table([bar_row(*bar) for bar in bars]),
    ]
    if steps:
        lines += ["## Training steps\n", table([step_row(name, case) for name, case in steps.items()])]
    if planned:
        lines += [
            "Planned is without the CUDA context and without paged moments, which torch does not count either; active "
            "is what "
            "was allocated and what a stream could still read.\n"
        ]
    for case in measured.values():
        if case["work"] == "longest":
            lines += longest_section(case)
        if case["work"] == "scoring":
            lines += scoring_section(case)
    if errors := [f"- {name}: {case['error']}" for name, case in cases.items() if "error" in case]:
        lines += ["## Not measured\n", *errors]
    return "\n".join(lines) + "\n"


def bar_row(bar: str, cases: Sequence[Mapping[str, Any]], ask: Callable[..., Answer]) -> dict[str, Any]:
    if errors := [case["error"] for case in cases if "error" in case]:
        return {"bar": bar, "measured": errors[0], "holds": None}
    shown, holds = ask(*cases)
    return {"bar": bar, "measured": shown, "holds": "yes" if holds else "no"}


def step_row(name: str, case: Mapping[str, Any]) -> dict[str, Any]:
    packed = f", {case['samples']} packed" if case["samples"] > 1 else ""
    kept = {
        False: "all",
        True: "block inputs",
        "offload": "block inputs, on the host",
        "selective": "block inputs, maps' outputs",
    }[case["kept"]]
    planned = f"{case['planned'] / GIB:.3f} ({case['plan_error']:+.1%})" if "planned" in case else None
    return {
        "case": name,
        "rows × tokens": f"{case['rows']} × {case['tokens']}{packed}",
        "kept": kept,
        "optimizer": case["optim"],
        "ms a step": f"{1000 * case['step_seconds']:.0f}",
        "tokens/s": f"{case['tokens_per_second']:,.0f}",
        **{f"GiB {kind}": f"{case[kind] / GIB:.3f}" for kind in ("allocated", "active", "reserved")},
        "GiB planned": planned,
    }


def longest_section(case: Mapping[str, Any]) -> list[str]:
    rows = [
        {
            "tokens": f"{row['tokens']:,}",
            "blocks": row["blocks"],
            "fits": "no" if "error" in row else "yes",
            "seconds": row.get("seconds"),
            "GiB allocated": f"{row['allocated'] / GIB:.2f}",
            "GiB reserved": f"{row['reserved'] / GIB:.2f}",
        }
        for row in (*case["tries"], *case["whole_steps"])
    ]
    return [
        f"## Longest context: {case['model']}, r = {case['r']}, {case['card'] / GIB:.3g} GiB\n",
        f"The plan's answer is {case['planned_tokens']:,} tokens. Lengths are tried on {TRY_BLOCKS} blocks, with the "
        "weights, "
        "gradients and moments of all; a step through all of them is what counts, at a length that there was time "
        "for.\n",
        table(rows) if rows else "No time for a try.\n",
    ]


def scoring_section(case: Mapping[str, Any]) -> list[str]:
    seconds = {
        "forward and backward of training": case["training_seconds"],
        "first order": case["first_order_seconds"],
        f"round of `auto` after {ROUND_STEP} steps of {ROUND_TOKENS} tokens": case["round_seconds"],
    }
    rows = [
        {"what": what, "seconds": value, "training steps": value / case["training_seconds"]}
        for what, value in seconds.items()
    ]
    return [
        f"## Scoring: {case['model']}, {case['ranks']} ranks, {case['rows']} × {case['tokens']} tokens, half of them "
        "supervised\n",
        table(rows),
        f"The round counts itself as {case['round_steps_counted']:.0f} training steps on these tokens, ablates "
        f"{case['exact_evaluations']} ranks exactly, and takes {case['round_share']:.1%} of the training before it.\n",
    ]


if __name__ == "__main__":
    main()

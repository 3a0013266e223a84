"""Speed and memory of training steps: qalora against PEFT's own layers under Hugging Face's own Trainer.

    python bench/train_step.py --recipe e2e --data data/e2e/train.jsonl
    python bench/train_step.py --recipe alpaca --data data/alpaca/train.jsonl --micro-batch-size 4
    python bench/train_step.py --recipe e2e --data data/e2e/train.jsonl --backends qalora-auto trl peft --dtype bfloat16

The same rows, the same NF4 base of SmolLM2-135M and compute dtype, r = 8 on every linear map, AdamW. Each backend in a
process of its own; they take their steps in turns, one at a time, so that a machine's slow minutes fall on all of them.

qalora-auto       as installed: training.gradient_checkpointing=auto
qalora            training.gradient_checkpointing=false: short rows are small beside what PEFT's logits take
qalora-selective  training.gradient_checkpointing=selective
qalora-blocks     training.gradient_checkpointing=true
peft              as QLoRA's users write it, checkpointed, in qalora's batches (length-grouped, padded to the longest)
peft-random       the same in the batches that the Trainer makes by itself (random rows, padded to the longest)
trl               TRL's SFTTrainer with its defaults, prompts not learned (completion_only_loss)
peft-adalora      AdaLoRA at the same average rank, in qalora's batches
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from common import TARGETS, AllocateAdaLora, environment, peak_rss, reset_peak, table, write_results
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

from qalora.adapter.allocation import Schedule
from qalora.adapter.model import attach, gated_layers
from qalora.base.device import available_memory
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import ModelShape, resolve, shape_of
from qalora.data.tokenization import load_dataset
from qalora.memory import Checkpointing
from qalora.recipe import Recipe, load_recipe
from qalora.training.planning import at_fastest_level
from qalora.training.trainer import GroupedByLength, build_trainer

READY, GO = "ready", "go"
PAUSE = 0.3  # seconds, in which a worker's idle threads go to sleep
BACKENDS = ("qalora-auto", "qalora", "qalora-selective", "qalora-blocks", "trl", "peft", "peft-random", "peft-adalora")


def main() -> None:
    args = parser().parse_args()
    if args.worker:
        work(args)
        return
    speed = products_per_second(getattr(torch, args.dtype))
    found = in_turns(args.backends, args.steps)
    ours = next(name for name in args.backends if name.startswith("qalora"))
    seconds = {name: sum(worker["step_seconds"]) for name, worker in found.items()}
    rows = [
        {
            "backend": name,
            "s a step": f"{seconds[name] / args.steps:.2f}",
            "rows/s": f"{args.steps * args.micro_batch_size / seconds[name]:.2f}",
            "tokens of the rows/s": f"{worker['tokens'] / seconds[name]:.0f}",
            "peak MB": round(worker["peak_bytes"] / 1e6),
            "of the machine's products": f"{worker['useful_operations'] / seconds[name] / speed:.0%}",
            f"{ours}'s rows/s": f"{seconds[name] / seconds[ours]:.2f} x",
            f"{ours}'s memory": f"{found[ours]['peak_bytes'] / worker['peak_bytes']:.2f} x",
        }
        for name, worker in found.items()
    ]
    pairs = zip(found[ours]["losses"], found.get("peft", found[ours])["losses"], strict=True)
    difference = max(abs(own - theirs) for own, theirs in pairs)
    results = {**environment(), "backends": found, "largest_loss_difference_to_peft": difference, "products": speed}
    useful = "frozen linear layers forward and backward over the rows' tokens, the head over learned ones"
    text = (
        f"# train_step-{args.recipe}\n\nSmolLM2-135M, NF4 computed in {args.dtype}, {args.steps} micro-batches of "
        f"{args.micro_batch_size} rows, step by step in turns. Memory is the peak over the loaded model. "
        f"The machine multiplies matrices at {speed / 1e9:.0f} billion operations a second; useful work is {useful}.\n"
        f"{results['device']}; torch {results['torch']}, transformers {results['transformers']}, peft "
        f"{results['peft']}, "
        f"bitsandbytes {results['bitsandbytes']}; {results['date']}, commit {results['commit']}.\n\n"
        f"    {results['command']}\n\n{table(rows)}\n"
        f"The losses of the steps differ from peft's, on the same batches, by at most {difference:.1e}.\n"
    )
    write_results(f"train_step-{args.recipe}" + ("" if args.dtype == "float32" else f"-{args.dtype}"), results, text)


def products_per_second(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Operations a second of a matrix product of a step's size, by the best of many."""
    a, b = torch.randn(1024, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    a @ b  # the first one is slower
    best, start = float("inf"), time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        a @ b
        best = min(best, time.perf_counter() - now)
    return float(2 * a.numel() * b.shape[1] / best)


def useful_operations(shape: ModelShape, items: Sequence[Any]) -> int:
    """Of a forward and backward over frozen weights, whose own gradient nobody needs."""
    linear = sum(fan_in * fan_out for fan_in, fan_out in shape.linear_maps().values())
    learned = sum(label != -100 for item in items for label in item["labels"])
    return 4 * (linear * sum(len(i["input_ids"]) for i in items) + shape.hidden_size * shape.vocab_size * learned)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="e2e")
    parser.add_argument("--data", type=Path, required=True, help="rows in the recipe's columns")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument(
        "--steps", type=int, default=8, help="all of them are counted, after a forward and backward that are not"
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="qalora and peft, and more")
    parser.add_argument("--dtype", default="float32", help="to compute in")
    parser.add_argument("--worker", choices=BACKENDS, help=argparse.SUPPRESS)
    return parser


def in_turns(backends: Sequence[str], steps: int, script: str = __file__) -> dict[str, dict[str, Any]]:
    """Starts a worker of the script for each backend, lets each take a step after the other, and returns what they
    report."""
    workers = {}
    for name in backends:  # one at a time: loading takes every core too
        print(name, file=sys.stderr)
        workers[name] = subprocess.Popen(
            [sys.executable, script, *sys.argv[1:], "--worker", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        hear(workers[name], READY)
    for step in range(steps):
        print(f"step {step + 1} of {steps}", file=sys.stderr)
        for worker in workers.values():
            print(GO, file=worker.stdin, flush=True)
            hear(worker, READY)
            time.sleep(PAUSE)
    found = {}
    for name, worker in workers.items():
        print(GO, file=worker.stdin, flush=True)
        found[name] = json.loads(worker.stdout.readlines()[-1])
    return found


def hear(worker: subprocess.Popen[str], word: str) -> None:
    """Waits until a worker says the word."""
    while (line := worker.stdout.readline()).strip() != word:
        if not line:
            sys.exit(f"a worker ended early: {worker.args}")


def work(args: argparse.Namespace) -> None:
    """The steps of one backend in this process, each when the other side of the pipe says so, and a report in the
    end."""
    steps = args.steps
    own_columns = [("data.columns", {})] if args.recipe == "e2e" else []
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(
            args.recipe,
            [
                *own_columns,
                ("model", "smollm2-135m"),
                ("data.train", str(args.data)),
                ("quantization.bnb_4bit_compute_dtype", args.dtype),
                ("allocation.rounds", 0),
                ("training.micro_batch_size", args.micro_batch_size),
                ("training.gradient_accumulation_steps", 1),
                ("training.max_steps", steps),
                ("training.eval_steps", 1000),
                ("training.save_steps", 1000),
                ("logging.steps", 1),
                ("logging.quiet", True),
            ],
        )
        tokenizer = load_tokenizer(resolve(recipe.model))
        data = load_dataset(
            recipe.data.train, tokenizer, split="train", limit=steps * args.micro_batch_size, **recipe.data.reading()
        )
        base = load_base(resolve(recipe.model), tokenizer=tokenizer, dtype=args.dtype)
        set_seed(recipe.training.seed)
        useful = useful_operations(shape_of(resolve(recipe.model)), data.items)
        make = by_qalora if args.worker.startswith("qalora") else by_trl if args.worker == "trl" else by_peft
        trainer = make(args.worker, recipe, base, tokenizer, data.items, steps, Path(folder))
        loaded = reset_peak()
        warm_up(trainer, args.micro_batch_size)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    found = {
        "step_seconds": clock.seconds,
        "tokens": sum(len(item["input_ids"]) for item in data.items),
        "useful_operations": useful,
        "peak_bytes": peak_rss() - loaded,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }
    print(json.dumps(found))


def warm_up(trainer: Trainer, rows: int) -> None:
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
    batch.pop("rows", None)
    if trainer.args.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    trainer.model.train()
    count = (batch["labels"][:, 1:] != -100).sum()
    trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=count).backward()
    trainer.model.zero_grad()


def by_qalora(
    backend: str, recipe: Recipe, base: Any, tokenizer: Any, items: list[Any], steps: int, folder: Path
) -> Trainer:
    levels: dict[str, Checkpointing] = {"qalora": False, "qalora-selective": "selective", "qalora-blocks": True}
    kept = levels[backend] if backend in levels else as_installed(recipe, items)
    recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"gradient_checkpointing": kept})})
    model = attach(base.model, r=recipe.lora.r, alpha=recipe.lora.alpha, seed=0)
    trainer, _, _ = build_trainer(
        recipe, model, tokenizer, rows=items, train=items, validation=items[:1], scoring=items[:1], rounds=Schedule((),
        False), total_steps=steps, compute_dtype=base.compute_dtype, output_dir=folder,
    )  # fmt: skip
    trainer.args.save_strategy = "no"
    return trainer


def as_installed(recipe: Recipe, items: list[Any]) -> Checkpointing:
    """The level that `auto` comes to on this machine."""
    longest = max(len(item["input_ids"]) for item in items)
    shape, memory = shape_of(resolve(recipe.model)), available_memory()
    settled = at_fastest_level(recipe, shape, memory, seq_len=longest, device="cpu")
    return cast(Checkpointing, settled.training.gradient_checkpointing)


def by_trl(
    backend: str, recipe: Recipe, base: Any, tokenizer: Any, items: list[Any], steps: int, folder: Path
) -> Trainer:
    """Rows of prompt and completion, tokenized already, and nothing set that need not be."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([
        {"input_ids": item["input_ids"], "completion_mask": [int(label != -100) for label in item["labels"]]}
        for item in items
    ])  # fmt: skip
    training = recipe.training
    arguments = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=training.micro_batch_size, max_steps=steps,
        completion_only_loss=True, bf16=base.compute_dtype == torch.bfloat16, logging_steps=1, seed=training.seed,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    lora = LoraConfig(r=recipe.lora.r, lora_alpha=recipe.lora.alpha, target_modules=TARGETS, task_type="CAUSAL_LM")
    return SFTTrainer(base.model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def by_peft(
    backend: str, recipe: Recipe, base: Any, tokenizer: Any, items: list[Any], steps: int, folder: Path
) -> Trainer:
    """As QLoRA's users write it, with the initial A of the other backend, so that losses can be compared."""
    twin = attach(base.model, r=recipe.lora.r, alpha=recipe.lora.alpha, seed=0)
    initial = {name: layer.A.detach().clone() for name, layer in gated_layers(twin).items()}
    plain = twin.unload()
    shared = {"lora_alpha": recipe.lora.alpha, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if backend == "peft-adalora":
        r = recipe.lora.r
        model = get_peft_model(
            plain, AdaLoraConfig(init_r=r * 3 // 2, target_r=r, tinit=1, tfinal=1, total_step=steps + 3, **shared)
        )
    else:
        model = get_peft_model(plain, LoraConfig(r=recipe.lora.r, **shared))
        for name, A in initial.items():
            model.get_submodule(f"base_model.model.{name}").lora_A.default.weight.data.copy_(A)
    training = recipe.training
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=training.micro_batch_size, max_steps=steps,
        learning_rate=training.learning_rate, lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=-(-int(training.warmup_ratio * steps * 1000) // 1000), max_grad_norm=training.max_grad_norm,
        optim=training.optim, seed=training.seed,
        train_sampling_strategy="random" if backend == "peft-random" else "group_by_length",
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    rows = [{key: item[key] for key in ("input_ids", "labels")} for item in items]
    kind = Trainer if backend == "peft-random" else InOurBatches
    trainer = kind(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))
    if backend == "peft-adalora":
        trainer.add_callback(AllocateAdaLora(model))
    return trainer


class InOurBatches(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedByLength:
        lengths = [len(item["input_ids"]) for item in self.train_dataset]
        return GroupedByLength(self.args.per_device_train_batch_size, lengths=lengths, seed=self.args.seed)


class Clock(TrainerCallback):
    """Seconds of every step, which begins when it is this backend's turn."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        print(READY, flush=True)
        sys.stdin.readline()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        control.should_evaluate = False
        if state.global_step == state.max_steps:
            print(READY, flush=True)
            sys.stdin.readline()


if __name__ == "__main__":
    main()

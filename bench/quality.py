"""Does moving ranks pay? Methods of equal budget on real tasks: the same 4-bit base, rows, order and steps.

    python bench/quality.py --data data                 # the core grid; runs that are in the file are skipped
    python bench/quality.py --data data --grid long     # what rounds of allocation give in runs of hundreds of steps
    python bench/quality.py --data data --grid budgets  # a quarter of the ranks, and twice as many
    python bench/quality.py --data data --grid full     # everything, for a GPU
    python bench/quality.py --data data --grid gpu      # 1,000 steps, in as many processes as the cards hold
    python bench/quality.py --data data --only e2e/lora '*/eva'  # some of it, by patterns of names
    python bench/quality.py --data data --jobs 2        # on a CPU: so many runs at a time, a thread each
    python bench/quality.py --data data --jobs 8        # on 8 GPUs: a run on each
    python bench/quality.py --data data --smoke         # minutes: a grid's methods for two steps; nothing is kept
    python bench/quality.py --report                    # table and plot of what is there, at the core grid's rates

First the learning rate of each method, on validation rows, one seed; then every seed at that rate, measured on test
rows that chose nothing. Each run is a process of its own and one line of bench/results/quality.jsonl, so that a grid
can be filled in pieces and on several machines. `data` is a folder with e2e, sst2, boolq, gsm8k and alpaca, each with
train.jsonl, test.jsonl and, but for gsm8k, validation.jsonl. PEFT's LoRA-GA is not among the methods: it refuses a
quantized base.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cache, partial
from multiprocessing.util import Finalize
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from common import RESULTS, TARGETS, AllocateAdaLora, environment, peak_rss, reset_peak
from peft import AdaLoraConfig, EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from quality_report import CONTROLS, Measure, answer_measures, report
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from qalora.adapter import allocation_round as rounds_module
from qalora.adapter.callback import AllocationCallback
from qalora.adapter.model import attach, rank_parameters, ranks
from qalora.adapter.scores import RankScores
from qalora.answers import generate_answers
from qalora.base.checkpoint import Weights, open_checkpoint, original_weights
from qalora.base.loading import LoadedBase, load_base, load_tokenizer
from qalora.base.registry import resolve, shape_of
from qalora.data.batching import on_device
from qalora.data.tokenization import TokenizedDataset, load_dataset, tokenize_prompt
from qalora.metrics import evaluate
from qalora.processes import see_one_gpu
from qalora.recipe import Recipe, load_recipe
from qalora.training.planning import planner
from qalora.training.trainer import QaloraTrainer, begin_ranks, build_trainer, schedule_of

MODEL = "smollm2-135m"
FILE = RESULTS / "quality.jsonl"
LEARNING_RATES = (1e-3, 2e-3, 4e-3)  # lower ones were worse for every method tried: runs are short
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Task:
    """Steps of 8 rows that take about three minutes on 2 CPU cores, and how the result is measured.

    Attributes:
        measure: what decides, of evaluate()'s results; losses are better when lower.
        answers: what greedy answers are measured by, in the full grid; on a CPU they take longer than the training.
        settings: of the recipe, for these files and lengths.
    """

    steps: int
    measure: str
    metrics: tuple[str, ...]
    answers: tuple[str, ...]
    test_rows: int
    settings: tuple[tuple[str, Any], ...] = ()


TASKS = {
    "e2e": Task(36, "loss", ("loss",), ("bleu", "rougeL"), 500, (("data.columns", {}), ("data.max_seq_len", 192))),
    "sst2": Task(80, "accuracy", ("accuracy", "loss"), (), 500),
    "boolq": Task(20, "accuracy", ("accuracy", "loss"), (), 500, (("data.max_seq_len", 384),)),
    "gsm8k": Task(20, "loss", ("loss",), ("exact_match",), 500, (("data.max_seq_len", 256),)),
    "alpaca": Task(20, "loss", ("loss",), ("rougeL",), 250, (("data.max_seq_len", 256),)),
}
CHOSEN_ON = ("sst2", "e2e")  # in the core grid, a method's learning rate is chosen once, on these


@dataclass(frozen=True)
class Method:
    """`kind` builds and trains; the settings are the recipe's; a control, or another rank, has the rate of its
    original."""

    kind: str = "qalora"
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate_of: str | None = None
    learning_rates: tuple[float, ...] = LEARNING_RATES


def ours(*, kind: str = "qalora", rate_of: str | None = None, **settings: Any) -> Method:
    return Method(kind, {name.replace("__", "."): value for name, value in settings.items()}, rate_of)


ALLOCATION = dict(
    allocation__rounds=4, allocation__warmup=0.3, allocation__interval=0.08, allocation__budget="parameters"
)
THREE = dict(allocation__rounds=3, allocation__budget="parameters")  # after 171, 214 and 257 of 300 steps
SCORES = dict(
    lora__init="quantization", allocation__start="scores", allocation__rounds=0, allocation__budget="parameters"
)
CORE = {
    "lora": ours(allocation__rounds=0),
    "lora-gradient": ours(allocation__rounds=0, lora__init="gradient"),
    "lora-quantization": ours(allocation__rounds=0, lora__init="quantization"),
    "lora-r16": ours(allocation__rounds=0, lora__r=16, lora__alpha=32),
    # All of its factors start at zero or near it; on E2E every doubling up to 16e-3 was better.
    "adalora": Method("adalora", learning_rates=(8e-3, 16e-3, 32e-3)),
    "eva": Method("eva"),
    "random": ours(**ALLOCATION, kind="random", rate_of="alora"),
    "alora": ours(**ALLOCATION),
}
FULL = CORE | {
    "random-gradient": ours(**ALLOCATION, lora__init="gradient", kind="random", rate_of="alora-gradient"),
    "alora-gradient": ours(**ALLOCATION, lora__init="gradient"),
    "random-scores": ours(**SCORES, kind="random", rate_of="alora-scores"),
    "alora-scores": ours(**SCORES),
    "alora-scores-rounds": ours(**SCORES | ALLOCATION),
    "alora-drop": ours(**ALLOCATION, allocation__importance="drop"),
    "alora-alone": ours(**ALLOCATION, allocation__importance="alone"),
    "alora-path": ours(**ALLOCATION, allocation__importance="path", allocation__scoring="path"),
    **{
        f"{name}-r{r}": replace(
            method, settings={**method.settings, "lora.r": r, "lora.alpha": 2 * r}, rate_of=method.rate_of or name
        )
        for r in (2, 16)
        for name, method in CORE.items()
        if name in ("lora", "lora-quantization", "random", "alora") and f"{name}-r{r}" not in CORE
    },
}
LONG = {
    "lora": CORE["lora"],
    "lora-quantization": CORE["lora-quantization"],
    "alora-quantization": ours(lora__init="quantization", **THREE, rate_of="lora-quantization"),
    "random-quantization": ours(lora__init="quantization", **THREE, kind="random", rate_of="lora-quantization"),
}
BUDGETS = {name: method for name, method in FULL.items() if name.endswith(("-r2", "-r16"))}
METHODS = FULL | LONG


@dataclass(frozen=True)
class Grid:
    """`steps` of its tasks; `choosing`: the tasks whose validation rows choose a method's learning rate, None: each
    task its own."""

    methods: Mapping[str, Method]
    steps: Mapping[str, int]
    choosing: Sequence[str] | None


STEPS = {name: task.steps for name, task in TASKS.items()}
GRIDS = {
    "core": Grid(CORE, STEPS, CHOSEN_ON),
    "full": Grid(FULL, STEPS, None),
    "long": Grid(LONG, {"e2e": 300}, CHOSEN_ON),
    "gpu": Grid(LONG, {"e2e": 1000}, CHOSEN_ON),
    "budgets": Grid(BUDGETS, {"e2e": STEPS["e2e"]}, CHOSEN_ON),
}


@dataclass(frozen=True)
class Run:
    task: str
    method: str
    seed: int
    learning_rate: float
    split: str  # measured on: validation, which chooses the learning rate, or test
    steps: int
    dtype: str  # in which the 4-bit base computes


def main() -> None:
    args = parser().parse_args()
    args.jobs = args.jobs or jobs_held(args.dtype)
    if args.report:
        shown = {
            shown_as(task, steps): (task, steps)
            for grid in ("core", "long", "gpu")
            for task, steps in GRIDS[grid].steps.items()
        }
        measures = {name: Measure(m := TASKS[task].measure, m == "loss") for name, (task, _) in shown.items()}
        defaults = {name: default_method(task, steps) for name, (task, steps) in shown.items()}
        there = [line for line in read(FILE) if line["run"]["method"] in METHODS]
        rates = {method: best_rate(there, method, CHOSEN_ON) for method in METHODS}
        lines = []
        for line in there:
            run = line["run"]
            lines.append(line | {"run": run | {"task": shown_as(run["task"], run["steps"])}})
        text = report(lines, measures, rates, defaults, RESULTS / "quality.png")
        (RESULTS / "quality.md").write_text(text + "\n", encoding="utf-8")
        print(text)
    elif args.smoke:
        runs = [Run(task, name, 0, 1e-3, "validation", 2, args.dtype) for task, name in asked(args)]
        for line in processes(runs, args):
            print(f"{line['run']['method']}: loss {line['result']['loss']:.4f}, {line['seconds']:.0f} s")
    else:
        fill(args)


def shown_as(task: str, steps: int) -> str:
    return task if steps == TASKS[task].steps else f"{task}, {steps} steps"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with TASK/train.jsonl, validation.jsonl and test.jsonl")
    parser.add_argument("--grid", choices=tuple(GRIDS), default="core")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="TASK/METHOD", help="patterns of names")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--dtype", default="bfloat16", help="to compute in: float32 on a CPU without bf16 products")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: as many as the GPUs hold, or 1 on a CPU)")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--report", action="store_true")
    return parser


def asked(args: argparse.Namespace) -> list[tuple[str, str]]:
    """(task, method) of the grid, those of --only."""
    grid = GRIDS[args.grid]
    names = [(task, method) for task in grid.steps for method in grid.methods]
    return [name for name in names if any(fnmatch("/".join(name), pattern) for pattern in args.only)]


def fill(args: argparse.Namespace) -> None:
    """Runs what the file lacks, learning rates first, and appends each result as it comes."""
    grid = GRIDS[args.grid]
    names = asked(args)

    def run_all(runs: Iterable[Run]) -> None:
        there = {Run(**line["run"]) for line in read(FILE) if args.grid != "full" or complete(line)}
        for line in processes([run for run in runs if run not in there], args):
            with FILE.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")

    lines = read(FILE)
    run_all(
        Run(task, method, SEEDS[0], rate, "validation", STEPS[task], args.dtype)
        for task, method in names
        if grid.choosing is None or task in grid.choosing
        if not grid.methods[method].rate_of and validation_losses(lines, method, task) is None
        for rate in grid.methods[method].learning_rates
    )
    lines = read(FILE)
    rates = {(task, method): best_rate(lines, method, grid.choosing or (task,)) for task, method in names}
    if without := [f"{task}/{method}" for (task, method), rate in rates.items() if rate is None]:
        print(f"no learning rate was chosen yet for {', '.join(without)}; the core grid does it", file=sys.stderr)
    # What allocation adds is read off at one rate: a method's controls are also measured at its own.
    controls = [
        ((task, control), rate)
        for (task, method), rate in rates.items()
        for control in CONTROLS.get(method, ())
        if control in grid.methods
    ]
    wanted = dict.fromkeys([*rates.items(), *controls])
    run_all(
        Run(task, method, seed, rate, "test", grid.steps[task], args.dtype)
        for seed in args.seeds
        for (task, method), rate in wanted
        if rate is not None
    )


def complete(line: Mapping[str, Any]) -> bool:
    """Whether a line has all that the full grid measures."""
    run = line["run"]
    return run["split"] != "test" or set(TASKS[run["task"]].answers) <= set(line["result"])


def best_rate(lines: Sequence[Mapping[str, Any]], method: str, tasks: Sequence[str]) -> float | None:
    """The learning rate with the lowest mean of the tasks' validation losses, in nats a token; None where a run is
    missing."""
    chosen = METHODS[method].rate_of or method
    found = [validation_losses(lines, chosen, task) for task in tasks]
    if None in found:
        return None
    return min(METHODS[chosen].learning_rates, key=lambda rate: sum(losses[rate] for losses in found if losses))


def validation_losses(lines: Sequence[Mapping[str, Any]], method: str, task: str) -> dict[float, float] | None:
    """Learning rate → loss on validation rows, all computed in one dtype; None where a rate is missing in each."""
    found: dict[str, dict[float, float]] = {}
    for line in lines:
        run = line["run"]
        if (run["task"], run["method"], run["split"], run["steps"]) == (task, method, "validation", STEPS[task]):
            found.setdefault(run["dtype"], {})[run["learning_rate"]] = line["result"]["loss"]
    rates = set(METHODS[method].learning_rates)
    return next((losses for losses in found.values() if rates <= set(losses)), None)


def jobs_held(dtype: str) -> int:
    """Processes that the GPUs hold together, by the plan of a step, with as much again for what measuring takes; no
    more than the CPU has cores."""
    if not torch.cuda.is_available():
        return 1
    recipe = load_recipe("e2e", [("model", MODEL), ("quantization.bnb_4bit_compute_dtype", dtype)])
    each = 2 * planner(recipe, shape_of(resolve(MODEL)))().total
    cards = [torch.cuda.mem_get_info(index)[0] // each for index in range(torch.cuda.device_count())]
    return max(1, min(sum(cards), os.cpu_count() or 1))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def processes(runs: Sequence[Run], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every run in a process of its own; what each gave, as it comes."""
    if not runs:
        return
    if torch.cuda.is_available():
        context = multiprocessing.get_context("spawn")
    else:
        context = multiprocessing.get_context("fork")
        if args.jobs > 1:
            torch.set_num_threads(1)
        loaded(args.dtype)  # once: the processes inherit it
    free = context.SimpleQueue()
    for job in range(args.jobs):
        free.put(job % max(1, torch.cuda.device_count()))
    with tempfile.TemporaryDirectory() as shared, context.Pool(args.jobs, on_own_gpu, (free,), 1) as pool:
        yield from pool.imap_unordered(partial(work, args=args, shared=Path(shared)), runs, chunksize=1)


# ---------------------------------------------------------------------------------------------------------- in a worker


def on_own_gpu(free: Any) -> None:
    """Has the worker see a GPU that no other one uses, which is free again when it ends."""
    place = free.get()
    see_one_gpu(os.environ, place)
    Finalize(None, free.put, (place,), exitpriority=0)


@cache
def loaded(dtype: str) -> tuple[LoadedBase, PreTrainedTokenizerBase, Weights]:
    """The base, its tokenizer, and a way to its 16-bit weights, which are read when they are needed."""
    source = resolve(MODEL)
    tokenizer = load_tokenizer(source)
    original = original_weights(open_checkpoint(source)[0], MODEL)
    return load_base(source, tokenizer=tokenizer, dtype=dtype), tokenizer, original


def work(run: Run, args: argparse.Namespace, shared: Path) -> dict[str, Any]:
    """Trains, measures, and says what it took. In `shared` runs leave what is the same for every seed."""
    print(f"{run.task}/{run.method}, seed {run.seed}, lr {run.learning_rate:g}, {run.split}", file=sys.stderr)
    task, method = TASKS[run.task], METHODS[run.method]
    recipe = recipe_of(run, task, method, args.data)
    base, tokenizer, original = loaded(run.dtype)
    # GSM8K has no validation split: the rows behind those that are trained on take its place.
    has_validation = (args.data / run.task / "validation.jsonl").is_file()
    needed = 8 * run.steps

    def rows(split: str, limit: int) -> TokenizedDataset:
        return load_dataset(
            str(args.data / run.task / f"{split}.jsonl"), tokenizer, split=split, limit=limit, **recipe.data.reading()
        )

    train = rows("train", needed if has_validation else needed + 400)
    items = train.items[:needed]
    validation = rows("validation", 400) if has_validation else train.subset(range(needed, len(train)))
    # The rows that score ranks do not also choose the learning rate.
    first = min(recipe.allocation.val_batch_size, len(validation) // 2)
    scoring, others = (
        validation.subset(range(first)),
        validation.subset(range(first, min(len(validation), first + 200))),
    )
    measured = rows("test", task.test_rows) if run.split == "test" else others
    set_seed(run.seed)
    start, before = Seconds.now(), reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        train_with = {"adalora": by_peft, "eva": by_peft}.get(method.kind, by_qalora)
        model, reused = train_with(
            Setup(method, recipe, base, tokenizer, original, items, scoring.items, run, Path(folder), shared)
        )
    taken, peak = start.until_now(), peak_rss()
    final = ranks(model) if method.kind in ("qalora", "random") else {}
    result = evaluate(
        model, tokenizer, measured, metrics=task.metrics, batch_size=16, choices=recipe.evaluation.choices
    )
    if args.grid == "full" and run.split == "test" and task.answers:
        result |= answered(model, tokenizer, rows("test", 10**9), task.answers, recipe)
    return {
        "run": vars(run),
        "result": result,
        "seconds": round(taken.wall + reused.wall, 1),
        "cpu_seconds": round(taken.cpu + reused.cpu, 1),
        "peak_bytes": peak - before,
        "parameters": sum(p.numel() for n, p in model.named_parameters() if "lora_" in n),
        "ranks": final if len(set(final.values())) > 1 else None,
        **{key: value for key, value in environment().items() if key != "command"},
    }


def answered(
    model: Any, tokenizer: PreTrainedTokenizerBase, data: TokenizedDataset, measures: Sequence[str], recipe: Recipe
) -> dict[str, float]:
    """Greedy answers to 630 different prompts, or as many as there are, each against every reference that its prompt
    has."""
    references: dict[tuple[int, ...], list[str]] = {}
    for example in data.examples:
        references.setdefault(tuple(tokenize_prompt(example, tokenizer)), []).append(example.reference.strip())
    references = dict(list(references.items())[:630])  # E2E's test set has so many
    evaluation = recipe.evaluation
    answers = generate_answers(
        model, tokenizer, list(references), max_new_tokens=evaluation.max_new_tokens, batch_size=64
    )
    return answer_measures(answers, list(references.values()), measures, evaluation.answer_pattern)


def default_method(task: str, steps: int) -> str:
    """What `qalora finetune` does in a run of this length when nothing about the adapter is set."""
    run = Run(task, "", 0, 1e-3, "test", steps, "auto")
    recipe = recipe_of(run, TASKS[task], ours(lora__init="auto", allocation__rounds=None), Path())
    moves = "alora" if recipe.allocation.rounds_in(steps) else "lora"
    return f"{moves}-{recipe.chosen_init(sixteen_bit=True)}"


def recipe_of(run: Run, task: Task, method: Method, data: Path) -> Recipe:
    return load_recipe(
        run.task,
        {
            **dict(task.settings),
            "model": MODEL,
            "data.train": str(data / run.task / "train.jsonl"),
            "quantization.bnb_4bit_compute_dtype": run.dtype,
            "training.micro_batch_size": 8,
            "training.gradient_accumulation_steps": 1,
            "training.gradient_checkpointing": False,
            "training.max_steps": run.steps,
            "training.eval_steps": 10_000,
            "training.save_steps": 10_000,
            "training.learning_rate": run.learning_rate,
            "training.seed": run.seed,
            "training.early_stopping_patience": None,
            "lora.init": "kaiming",
            "allocation.start": "even",
            "allocation.rounds": 0,
            "allocation.val_batch_size": 16,
            "logging.quiet": True,
            **method.settings,
        },
    )


class Seconds(NamedTuple):
    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Seconds:
        return cls(time.perf_counter(), time.process_time())

    def until_now(self) -> Seconds:
        now = Seconds.now()
        return Seconds(now.wall - self.wall, now.cpu - self.cpu)


class Trained(NamedTuple):
    model: Any
    reused: Seconds = Seconds()  # what an earlier run spent on a part that this one read


@dataclass(frozen=True)
class Setup:
    """What the methods share, so that nothing else differs."""

    method: Method
    recipe: Recipe
    base: Any
    tokenizer: Any
    original: Weights
    items: list[Any]
    scoring: list[Any]
    run: Run
    folder: Path
    shared: Path

    def trainer(self) -> QaloraTrainer:
        """Of an adapter like the recipe's; it saves nothing."""
        recipe, steps, items = self.recipe, self.run.steps, self.items
        model = attach(self.base.model, r=recipe.lora.r, alpha=recipe.lora.alpha, seed=self.run.seed)
        trainer, allocator, _ = build_trainer(
            recipe, model, self.tokenizer, rows=items, train=items, validation=items[:1], scoring=self.scoring,
            rounds=schedule_of(recipe, steps, steps), total_steps=steps, compute_dtype=self.base.compute_dtype,
            output_dir=self.folder,
        )  # fmt: skip
        begin_ranks(recipe, trainer, allocator, items, self.original if recipe.lora.init == "quantization" else None)
        trainer.args.save_strategy = trainer.args.eval_strategy = "no"
        trainer.args.load_best_model_at_end = False
        # Hugging Face's order of rows, which PEFT's methods have too.
        trainer._get_train_sampler = MethodType(Trainer._get_train_sampler, trainer)  # type: ignore[method-assign]
        return trainer


def by_qalora(setup: Setup) -> Trained:
    """LoRA, and ALoRA with its own scores or, as a control, with random ones, at the start as in the rounds."""
    if setup.method.kind == "random":
        draw = random.Random(setup.run.seed)

        def scores_at_random(model: Any, *args: Any, **kwargs: Any) -> RankScores:
            """No rank is scored, so a random run's seconds leave out what scoring takes."""
            drawn = {name: [draw.random() for _ in range(rank)] for name, rank in ranks(model).items()}
            return RankScores(
                method="first-order", rows=0, supervised_tokens=0, loss=math.nan, base_loss=math.nan, drop=drawn,
                alone=drawn, importance=drawn, stderr=None, exact={}, forward_equivalents=0, certified=False,
            )  # fmt: skip

        def shares_at_random(model: Any, batch: Any) -> dict[str, list[float]]:
            cost = rank_parameters(model, ranks(model))  # by which shares will be divided
            return {name: [cost[name] * draw.random() for _ in range(rank)] for name, rank in ranks(model).items()}

        rounds_module.midpoint_shares = shares_at_random
    trainer = setup.trainer()
    if setup.method.kind == "random":
        (allocator,) = (cb for cb in trainer.callback_handler.callbacks if isinstance(cb, AllocationCallback))
        allocator.scorer = scores_at_random
    trainer.train()
    return Trained(trainer.model)


def by_peft(setup: Setup) -> Trained:
    """PEFT's own adapters under Hugging Face's Trainer, in the batches that our trainer makes of the same rows."""
    ours, steps = setup.trainer(), setup.run.steps
    r, alpha = setup.recipe.lora.r, setup.recipe.lora.alpha
    plain, collate = ours.model.unload(), RowsLeftOut(ours.data_collator)
    reused = Seconds()
    shared: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    if setup.method.kind == "adalora":
        # PEFT divides AdaLoRA's alpha by init_r, after pruning too: twice LoRA's alpha gives LoRA's alpha / r.
        config: LoraConfig = AdaLoraConfig(
            init_r=2 * r, target_r=r, lora_alpha=2 * alpha, tinit=steps // 5, tfinal=steps // 3,
            deltaT=max(1, steps // 20), total_step=steps, **shared,
        )  # fmt: skip
        model = get_peft_model(plain, config)
    else:
        config = LoraConfig(
            r=r, lora_alpha=alpha, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0, whiten=False), **shared
        )
        model = get_peft_model(plain, config, low_cpu_mem_usage=True)
        directions, reused = eva_directions(setup, model, collate)
        initialize_lora_eva_weights(model, eva_state_dict=directions)
    trainer = Trainer(model, ours.args, train_dataset=setup.items, data_collator=collate)
    trainer.model_accepts_loss_kwargs = True
    if setup.method.kind == "adalora":
        trainer.add_callback(AllocateAdaLora(model))
    trainer.train()
    return Trained(model, reused)


def eva_directions(setup: Setup, model: Any, collate: Any) -> tuple[dict[str, Tensor], Seconds]:
    """EVA's directions, and what they took if another run found them: base and rows decide them, not seed or rate, and
    on a CPU they take as long as the training."""
    file = setup.shared / f"eva-{setup.run.task}-{setup.run.steps}.pt"
    if file.is_file():
        found = torch.load(file, weights_only=True)
        return found["directions"], Seconds(*found["seconds"])
    start = Seconds.now()
    batches: DataLoader[Any] = DataLoader(setup.items, batch_size=8, collate_fn=collate)  # type: ignore[arg-type]
    directions = get_eva_state_dict(model, batches, forward_fn=row_by_row, show_progress_bar=False)
    whole = setup.folder / file.name
    torch.save({"directions": directions, "seconds": list(start.until_now())}, whole)
    shutil.move(whole, file)
    return directions, Seconds()


def row_by_row(model: Any, batch: Mapping[str, Any]) -> None:
    """A forward whose maps see (rows, tokens, width), as EVA's mask expects; with labels our models share prefixes."""
    model(batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=1)


class RowsLeftOut:
    """Our collator's batches without the row numbers, which only our trainer takes."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return on_device([self.collate(items)], "cpu")[0]


if __name__ == "__main__":
    main()

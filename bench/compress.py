"""What is lost when the ranks of a trained LoRA leave, by the basis they are taken in and the order they leave in.

    python bench/compress.py --data data --work DIR                  # adapters first, then their cuts
    python bench/compress.py --data data --work DIR --part train     # the adapters alone
    python bench/compress.py --data data --work DIR --part cut       # cuts of the adapters that are there
    python bench/compress.py --data data --work DIR --only 'e2e/*' --cuts core   # some of it, by patterns of names
    python bench/compress.py --report                                # table and picture of what is there

Each adapter is a run of `qalora.finetune` and a folder of DIR; each cut is one line of bench/results/compress.jsonl, or
of the file that `--lines` names. What is there is not done again, and a run that was killed begins anew. The control
is LoRA trained at the size of the cut, at its own best learning rate. `data` is the folder of bench/quality.py.

Rows are the short ones of each file, for a CPU's sake. Those that train, those that score ranks, those that choose
among cuts and those that measure are all distinct.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from common import RESULTS, environment
from compress_report import OF_BASIS, REFITTED, point_of, report
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

import qalora
from qalora.adapter.ablation import MicroBatch
from qalora.adapter.compression import SHARES, Kept, Per, Point, Size, kept, parameters_of
from qalora.adapter.cutting import losses, rank_orders
from qalora.adapter.layer import Factors
from qalora.adapter.model import load_adapter, rank_parameters
from qalora.adapter.model import ranks as ranks_of
from qalora.adapter.principal import Basis, into_basis
from qalora.adapter.refit import refitted
from qalora.adapter.scores import PerRank
from qalora.adapter.search import best_of
from qalora.base.loading import LoadedBase, load_base, load_tokenizer
from qalora.base.registry import resolve
from qalora.data.batching import Collator, micro_batches, on_device
from qalora.data.rows import Row
from qalora.data.tokenization import load_dataset
from qalora.errors import AnswerNo
from qalora.recipe import load_recipe

Line = dict[str, Any]  # of compress.jsonl
MODEL = "smollm2-135m"
FILE = RESULTS / "compress.jsonl"
SEEDS = (0, 1, 2)
ROWS_PER_STEP = 8
BATCH = {"scoring": 32, "choosing": 32, "test": 32}  # rows per forward


@dataclass(frozen=True)
class Task:
    """Attributes:
    steps: of 8 rows, three to five minutes of one CPU core.
    longest: tokens of a row; longer ones are left out.
    scoring, choosing, test: rows that score ranks, that choose among cuts, and that measure.
    settings: of the recipe, for these files.
    """

    steps: int
    longest: int
    scoring: int
    choosing: int
    test: int
    settings: Mapping[str, Any] = field(default_factory=dict)


TASKS = {
    "e2e": Task(60, 80, scoring=32, choosing=32, test=40, settings={"data.columns": {}}),
    "sst2": Task(80, 30, scoring=64, choosing=384, test=256),
    "alpaca": Task(32, 80, scoring=32, choosing=24, test=32),
    "gsm8k": Task(24, 104, scoring=16, choosing=16, test=20),
    "boolq": Task(32, 112, scoring=48, choosing=96, test=160),
}


@dataclass(frozen=True)
class Run:
    """An adapter: the task it learned, how it began, its ranks per module, the learning rate and how it falls, and the
    seed."""

    task: str
    origin: str  # lora.init: kaiming, as PEFT has it, or quantization
    r: int
    learning_rate: float
    seed: int
    schedule: str = "constant"  # or linear, to 0

    @property
    def name(self) -> str:
        return f"{self.task}/{self.origin}-r{self.r}-lr{self.learning_rate:g}-{self.schedule}-seed{self.seed}"


@dataclass(frozen=True)
class Cut:
    """The ranks that are kept of an adapter.

    Attributes:
        order: of qalora's, or random.
        share: of the whole adapter's ranks.
        per: what orders the ranks: the score, or the score per parameter, with as many parameters as the score keeps.
    """

    basis: Basis
    order: str
    share: float
    per: Per = "rank"


DEEP = (0.5, 0.25)


def curves(shares: Sequence[float]) -> tuple[Cut, ...]:
    """Those that the program tries."""
    own = [[*(Cut("svd", order, share) for order in OF_BASIS), Cut("trained", "sum", share)] for share in shares]
    return tuple(cut for cuts in own for cut in cuts)


CORE = curves(DEEP)
CURVES = curves(SHARES)
CORRECTED = tuple(Cut("svd", REFITTED, share) for share in DEEP)
EVERY = (
    *CURVES,
    *(Cut("svd-act", order, share) for share in SHARES for order in OF_BASIS),
    *(Cut("svd", "path", share, "parameter") for share in SHARES),
    *(Cut("svd", order, share) for order in ("sum", "random") for share in SHARES),
    *(Cut("trained", order, share) for order in ("path", "random") for share in SHARES),
)
BASES = tuple(cut for cut in EVERY if cut.share in DEEP)
CUTS = {"core": CORE, "curves": CURVES, "corrected": CORRECTED, "bases": BASES, "every": EVERY}
WHOLE = 8  # ranks per module of the adapters that are cut first
RATE = 2e-3
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
NARROW = (4, 2)  # ranks per module of the controls, at each of these rates


def plan() -> Iterator[tuple[Run, Sequence[Cut]]]:
    """Adapters and how they are cut, the most telling first: curves of three seeds; every basis and score of one; and
    halves and quarters of those that began, fell or were sized otherwise."""
    wide = [Run(task, "kaiming", WHOLE, RATE, seed) for seed in SEEDS for task in TASKS]
    yield from ((run, CURVES) for run in wide)
    for task in TASKS:
        for r in NARROW:
            for rate in RATES:
                yield Run(task, "kaiming", r, rate, SEEDS[0]), ()
    others = [Run(task, "quantization", WHOLE, RATE, SEEDS[0]) for task in TASKS]
    others += [Run(task, "kaiming", r, RATE, SEEDS[0]) for r in (16, 32) for task in TASKS]
    others += [Run(task, "kaiming", WHOLE, RATE, SEEDS[0], "linear") for task in TASKS]
    yield from ((run, CORE) for run in others)
    yield from ((run, cuts) for cuts in (EVERY, CORRECTED) for run in wide if run.seed == SEEDS[0])


def main() -> None:
    args = parser().parse_args()
    if args.report:
        text = report(
            read(args.lines), [vars(run) for run in dict.fromkeys(run for run, _ in plan())], RESULTS / "compress.png"
        )
        (RESULTS / "compress.md").write_text(text, encoding="utf-8")
        print(text)
        return
    for run, cuts in plan():
        if any(fnmatch(run.name, pattern) for pattern in args.only):
            if args.part in ("train", "both"):
                train(run, args.data, args.work)
            if args.part in ("cut", "both") and (folder_of(run, args.work) / "bench.json").is_file():
                measure(run, CUTS[args.cuts] if args.cuts and cuts else cuts, args)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with TASK/train.jsonl, validation.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, help="folder of the adapters and of the rows that were chosen")
    parser.add_argument("--part", choices=("train", "cut", "both"), default="both")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="TASK/ADAPTER", help="patterns of names")
    parser.add_argument("--cuts", choices=list(CUTS), help="of each adapter (default: all, the core ones first)")
    parser.add_argument("--lines", type=Path, default=FILE, help="where results are appended (default: %(default)s)")
    parser.add_argument("--report", action="store_true")
    return parser


# --------------------------------------------------------------------------------------------------------- the adapters


def train(run: Run, data: Path, work: Path) -> None:
    """One adapter, unless it is there."""
    folder = folder_of(run, work)
    if (folder / "bench.json").is_file():
        return
    print(f"{time.strftime('%H:%M:%S')} training {run.name}", file=sys.stderr, flush=True)
    task, files = TASKS[run.task], rows_of(run.task, data, work)
    start = time.process_time()
    qalora.finetune(
        run.task,
        {
            **reading(run.task),
            "model": MODEL,
            "output_dir": str(folder),
            "data.train": str(files["train"]),
            "data.validation": str(files["choosing"]),
            "quantization.bnb_4bit_compute_dtype": "float32",
            "lora.init": run.origin,
            "lora.r": run.r,
            "lora.alpha": 2 * run.r,
            "allocation.rounds": 0,
            "training.micro_batch_size": ROWS_PER_STEP,
            "training.gradient_accumulation_steps": 1,
            "training.gradient_checkpointing": False,
            "training.max_steps": task.steps,
            "training.learning_rate": run.learning_rate,
            "training.lr_scheduler_type": run.schedule,
            "training.seed": run.seed,
            "training.eval_strategy": "no",
            "training.save_strategy": "no",
            "training.early_stopping_patience": None,
            "evaluation.before": False,
            "evaluation.after": False,
            "logging.quiet": True,
        },
        overwrite=True,
    )
    taken = {"cpu_seconds": round(time.process_time() - start), **environment()}
    (folder / "bench.json").write_text(json.dumps(taken) + "\n", encoding="utf-8")


def folder_of(run: Run, work: Path) -> Path:
    return work / "adapters" / run.name


# ------------------------------------------------------------------------------------------------------------- the cuts


def measure(run: Run, cuts: Iterable[Cut], args: argparse.Namespace) -> None:
    """Losses of the base, of the whole adapter and of its cuts, those that the file lacks; each is a line."""
    there = {(line["basis"], line["order"], line["share"], line["per"]) for line in read(args.lines, run)}
    wanted = [cut for cut in cuts if (cut.basis, cut.order, cut.share, cut.per) not in there]
    whole = (None, "whole", 1.0, "rank")
    if not wanted and whole in there:
        return
    print(f"{time.strftime('%H:%M:%S')} measuring {run.name}, {len(wanted)} cuts", file=sys.stderr, flush=True)
    batches, folder = batches_of(run.task, args.data, args.work), folder_of(run, args.work)

    def append(facts: Mapping[str, Any], ranks: Kept, model: PeftModel, factors: Factors | None = None) -> Line:
        line = {"run": vars(run), **facts, **measured(model, ranks, factors, batches)}
        args.lines.parent.mkdir(parents=True, exist_ok=True)
        with args.lines.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        return line

    if whole not in there:
        model = load_adapter(base().model, folder / "adapter", trainable=True)
        bare = {"basis": None, "order": "base", "share": 1.0, "per": "rank"}
        append(bare, {}, model)
        taken = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
        taken.pop("command")  # names folders of a machine
        append(
            {**bare, "order": "whole", **taken}, {name: list(range(r)) for name, r in ranks_of(model).items()}, model
        )
    for basis in dict.fromkeys(each.basis for each in wanted):
        own = [each for each in wanted if each.basis == basis]
        model = load_adapter(base().model, folder / "adapter", trainable=True)
        total = sum(ranks_of(model).values())
        values = into_basis(model, basis, batches["scoring"])
        orders = scores_of(
            run, basis, model, values, batches["scoring"], {each.order for each in own} - {REFITTED}, args.work
        )
        costs = rank_parameters(model, values)
        for each in (each for each in own if each.order != REFITTED):
            ranks = kept(orders[each.order], Size(ranks=round(each.share * total)), costs)
            if each.per == "parameter":
                ranks = kept(orders[each.order], Size(parameters=parameters_of(ranks, costs)), costs, "parameter")
            append(vars(each), ranks, model)
        if any(each.order == REFITTED for each in own):
            train_on(run, model, orders, costs, append, args)


def train_on(
    run: Run,
    model: PeftModel,
    orders: Mapping[str, PerRank],
    costs: Mapping[str, int],
    append: Callable[..., Line],
    args: argparse.Namespace,
) -> None:
    """What `qalora compress` takes at each share, trained on; from the half of the ranks on down for as long as that
    costs nothing on the rows that choose, and up where the half costs something. And the whole trained on, with which
    it can be compared."""
    training = batches_of(run.task, args.data, args.work)["training"]
    whole = next(line for line in read(args.lines, run) if line["order"] == "whole")
    total = whole["ranks"]

    def at(cut: Cut, ranks: Kept, train: bool = False) -> Point:
        """The point of a line, which is measured where it is not there."""
        line = next((line for line in read(args.lines, run) if vars(cut).items() <= line.items()), None)
        if line is None:
            line = append(vars(cut), ranks, model, refitted(model, training, ranks) if train else None)
        return point_of(line, whole, ranks)

    def holds(share: float) -> bool:
        ranks = {order: kept(orders[order], Size(ranks=round(share * total)), costs) for order in OF_BASIS}
        _, plain = best_of({order: at(Cut("svd", order, share), ranks[order]) for order in OF_BASIS})
        again = at(Cut("svd", REFITTED, share), plain.kept, train=True)
        return plain.holds() or again.holds()

    held = {share: holds(share) for share in DEEP}
    if not held[DEEP[0]]:
        holds(max(SHARES))
    if held[DEEP[1]]:
        for share in (share for share in SHARES if share < DEEP[1]):
            if not holds(share):
                break
    if run.seed == SEEDS[0]:
        everything = {name: list(range(len(scores))) for name, scores in orders["values"].items()}
        at(Cut("svd", "whole, refitted", 1.0), everything, train=True)


def measured(
    model: PeftModel, ranks: Kept, factors: Factors | None, batches: Mapping[str, Sequence[MicroBatch]]
) -> dict[str, Any]:
    """Size and losses of some ranks alone: of every row, summed over its supervised tokens."""
    found: dict[str, Any] = {
        "ranks": sum(map(len, ranks.values())),
        "parameters": parameters_of(ranks, rank_parameters(model, ranks)),
    }
    for part in ("choosing", "test"):
        of_rows = losses(model, batches[part], ranks, factors)
        found |= {part: [round(loss, 5) for loss in of_rows.rows], f"{part}_tokens": of_rows.tokens}
    return found


def scores_of(
    run: Run,
    basis: Basis,
    model: PeftModel,
    values: PerRank,
    batch: Sequence[MicroBatch],
    which: set[str],
    work: Path,
) -> dict[str, PerRank]:
    """Order → scores of every rank, from the file of an earlier call where that has them."""
    file = work / "scores" / f"{run.name}-{basis}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    missing: set[Any] = which - set(found)
    if "random" in missing:
        draw = random.Random(run.name)
        found["random"] = {name: [draw.random() for _ in of] for name, of in values.items()}
    if "path" in missing or "shrunk" in missing:
        missing |= {"path", "shrunk"}  # one scoring gives both
    found |= rank_orders(model, values, batch, missing - {"random"})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found), encoding="utf-8")
    return found


@cache
def base() -> LoadedBase:
    return load_base(resolve(MODEL), tokenizer=tokenizer(), dtype="float32")


@cache
def batches_of(task: str, data: Path, work: Path) -> dict[str, Sequence[MicroBatch]]:
    """The rows that score, choose and test, as micro-batches; those that score in steps of training too."""
    recipe = load_recipe(task, {**reading(task), "model": MODEL, "data.train": "rows"})
    batches: dict[str, Sequence[MicroBatch]] = {}
    for part, file in rows_of(task, data, work).items():
        if part != "train":
            items = load_dataset(str(file), tokenizer(), split="train", **recipe.data.reading()).items
            batches[part] = _batches(items, BATCH[part])
            if part == "scoring":
                batches["training"] = _batches(items, ROWS_PER_STEP)
    return batches


def _batches(rows: Sequence[Row], size: int) -> Sequence[MicroBatch]:
    return on_device(micro_batches(rows, size, Collator(tokenizer().pad_token_id)), base().model.device)


def read(file: Path, run: Run | None = None) -> list[Line]:
    """Lines of the file, or those of one adapter."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    return [line for line in lines if run is None or line["run"] == vars(run)]


# ------------------------------------------------------------------------------------------------------------- the rows


def reading(task: str) -> dict[str, Any]:
    """Settings of how a task's rows are read."""
    return {"data.chat": False, "data.max_seq_len": TASKS[task].longest, **TASKS[task].settings}


def rows_of(name: str, data: Path, work: Path) -> dict[str, Path]:
    """Files of the rows that train, score, choose and test, drawn once from the short rows of the task's files."""
    task, parts = TASKS[name], ("train", "scoring", "choosing", "test")
    files = {part: work / "rows" / name / f"{part}.jsonl" for part in parts}
    if all(file.is_file() for file in files.values()):
        return files
    wanted = {"train": ROWS_PER_STEP * task.steps, "scoring": task.scoring, "choosing": task.choosing}
    train = short_rows(name, data / name / "train.jsonl")
    others = train[wanted["train"] :]  # GSM8K has no validation file, and BoolQ's is short
    if (data / name / "validation.jsonl").is_file():
        others = [*short_rows(name, data / name / "validation.jsonl"), *others]
    chosen = {
        "train": train[: wanted["train"]],
        "scoring": others[: task.scoring],
        "choosing": others[task.scoring : task.scoring + task.choosing],
        "test": short_rows(name, data / name / "test.jsonl")[: task.test],
    }
    for part, count in (wanted | {"test": task.test}).items():
        if len(chosen[part]) < count:
            raise AnswerNo(f"{name}: {len(chosen[part])} short rows for {part}, and {count} are wanted")
    for part, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(line + "\n" for line in chosen[part]), encoding="utf-8")
    return files


def short_rows(task: str, file: Path) -> list[str]:
    """Lines of the file whose tokens are no more than the task's, shuffled."""
    lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")  # texts hold other ends of lines
    random.Random(0).shuffle(lines)
    lines = lines[:4000]
    recipe = load_recipe(task, {**reading(task), "model": MODEL, "data.train": str(file), "data.max_seq_len": 4096})
    given: Any = [json.loads(line) for line in lines]
    items = load_dataset(given, tokenizer(), split="train", **recipe.data.reading()).items
    return [lines[item["row"]] for item in items if len(item["input_ids"]) <= TASKS[task].longest]


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve(MODEL))


if __name__ == "__main__":
    main()

"""AB-LoRA scores at a fraction of their cost: the naive loop, the exact engine, first order, and certified.

    python bench/scoring.py --recipe e2e --data data/e2e             # about 5 minutes after training
    python bench/scoring.py --recipe e2e --data data/e2e --full      # every rank ablated: an hour on a CPU
    python bench/scoring.py --recipe e2e --data data/e2e --engines   # certified, path and first order alone, in minutes
    python bench/scoring.py --shape llama-7b                                   # cost alone, random weights, for a GPU

DATA is a folder with train.jsonl and validation.jsonl in the recipe's columns. An adapter (r = 8, every linear map) is
trained on it for 100 steps of 8 rows, unless --adapter has one; all that follows runs in one process on the same rows.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from common import RESULTS, environment, random_llama, table, write_results

from qalora.adapter.ablation import Rank, ablate, scoring_mode, supervised_tokens
from qalora.adapter.allocation import least_important
from qalora.adapter.layer import gated
from qalora.adapter.model import attach, gated_layers, load_adapter
from qalora.adapter.scores import RankScores
from qalora.adapter.scoring import score_ranks
from qalora.base.device import memory_to_score
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import resolve, shape_of
from qalora.data.batching import Collator, micro_batches, on_device
from qalora.data.tokenization import load_dataset
from qalora.kernels.loss import row_losses
from qalora.recipe import Recipe, load_recipe

matplotlib.use("Agg")

NAIVE_RANKS = 12  # ranks on which the naive loop is timed; its cost is linear in them
KINDS = ("drop", "alone", "importance")


def main() -> None:
    args = parser().parse_args()
    name = f"scoring-{args.shape or args.recipe}"
    model, batch = random_job(args) if args.shape else real_job(args)
    if args.engines:
        print(engines(model, batch))
        return
    results = measure(model, batch, args)
    write_results(name, results, report(name, results))
    if not args.shape:
        draw(results, RESULTS / f"{name}.png")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="e2e")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument(
        "--adapter", type=Path, help="default: outputs/bench/RECIPE/adapter, trained where it is absent"
    )
    parser.add_argument("--shape", help="a registered model: random weights in its shape")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a row of --shape")
    parser.add_argument("--rows", type=int, default=16, help="rows of B_val")
    parser.add_argument("--max-seq-len", type=int, help="default: the recipe's")
    parser.add_argument("--batch-size", type=int, default=16, help="rows a forward")
    parser.add_argument("--dtype", default="auto", help="to compute in (default: by device)")
    parser.add_argument("--sample", type=int, default=48, help="ranks ablated exactly, without --full")
    parser.add_argument("--full", action="store_true", help="ablate every rank exactly")
    parser.add_argument(
        "--engines",
        action="store_true",
        help="time certified, path and first order alone, print them and write nothing",
    )
    return parser


def real_job(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    """SmolLM2-135M with an adapter trained on the task, and its first validation rows."""
    model, tokenizer, recipe = trained(args)
    rows = load_dataset(str(args.data / "validation.jsonl"), tokenizer, limit=args.rows, **recipe.data.reading())
    batch = micro_batches(rows.items, args.batch_size, Collator(tokenizer.pad_token_id))
    return model, on_device(batch, model.device)


def trained(args: argparse.Namespace) -> tuple[Any, Any, Recipe]:
    """(SmolLM2-135M with an adapter trained on the task, its tokenizer, the recipe)."""
    own_columns = [("data.columns", {})] if args.recipe == "e2e" else []
    length = [("data.max_seq_len", args.max_seq_len)] if args.max_seq_len else []
    recipe = load_recipe(args.recipe, [("model", "smollm2-135m"), *own_columns, *length])
    adapter = args.adapter or Path("outputs/bench") / args.recipe / "adapter"
    if not adapter.is_dir():
        train(args.recipe, args.data, adapter.parent, [f"{key}={value}" for key, value in own_columns + length])
    source = resolve("smollm2-135m")
    tokenizer = load_tokenizer(source)
    base = load_base(source, tokenizer=tokenizer, dtype=args.dtype)
    model = load_adapter(base.model, adapter, trainable=True)
    base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, tokenizer, recipe


def train(recipe: str, data: Path, output: Path, settings: list[str]) -> None:
    command = [sys.executable, "-m", "qalora.finetune", "--model", "smollm2-135m", "--recipe", recipe, "--overwrite"]
    command += ["--output-dir", str(output), f"data.train={data}/train.jsonl"]
    command += [f"data.validation={data}/validation.jsonl", "data.max_rows=3000", *settings]
    command += ["allocation.rounds=0", "evaluation.before=false", "evaluation.after=false", "evaluation.rows=16"]
    command += ["training.micro_batch_size=8", "training.gradient_accumulation_steps=1", "training.learning_rate=5e-4"]
    command += ["training.max_steps=100", "training.eval_steps=100", "training.save_steps=100"]
    subprocess.run(command, check=True)


def random_job(args: argparse.Namespace) -> tuple[Any, list[dict[str, Any]]]:
    shape = shape_of(resolve(args.shape))
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    base = random_llama(shape, device=device, compute_dtype=dtype)
    model = attach(base, r=8, alpha=16)
    for layer in gated_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.01)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = []
    for _ in range(0, args.rows, args.batch_size):
        ids = torch.randint(0, shape.vocab_size, (args.batch_size, args.tokens), device=device)
        labels = ids.clone()
        labels[:, : args.tokens // 2] = -100
        batch.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return model, batch


# ------------------------------------------------------------------------------------------------------------ measuring


def measure(model: Any, batch: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    ranks = [(name, k) for name, layer in gated_layers(model).items() for k in range(len(layer.A))]
    prune = len(gated_layers(model))
    draw = random.Random(1)
    chosen = ranks if args.full else sorted(draw.sample(ranks, min(args.sample, len(ranks))), key=ranks.index)
    naive_ranks = draw.sample(chosen, min(NAIVE_RANKS, len(chosen)))

    training_step(model, batch)  # warms up
    step = timed(lambda: training_step(model, batch))
    naive, naive_seconds = timed(lambda: naive_loop(model, batch, naive_ranks))
    first, first_seconds = timed(lambda: score_ranks(model, batch, "first-order"))
    path, path_seconds = timed(lambda: score_ranks(model, batch, "path", importance="path"))
    certified, certified_seconds = timed(
        lambda: score_ranks(model, batch, "certified", prune=prune, memory=memory_to_score())
    )
    print(f"first order {first_seconds:.0f} s, certified {certified_seconds:.0f} s; exact now", file=sys.stderr)
    with scoring_mode(model):
        exact, exact_seconds = timed(lambda: ablate(model, batch, chosen, memory=memory_to_score()))

    forward = naive_seconds / (2 + 2 * len(naive_ranks))
    naive_forwards = 1 + 2 * len(ranks)
    # Spread over all ranks: a random sample's blocks are not exactly the average ones.
    exact_forwards = exact.forward_equivalents if args.full else 2 + 2 * len(ranks) * mean_suffix(model, ranks)
    exact_all = exact_seconds * exact_forwards / exact.forward_equivalents
    values = {kind: {rank: by_kind(exact, kind, rank) for rank in chosen} for kind in KINDS}
    estimates = {kind: {rank: getattr(first, kind)[rank[0]][rank[1]] for rank in chosen} for kind in KINDS}
    truth = pruned_set({rank: values["importance"][rank] for rank in chosen}, first, prune) if args.full else None
    return {
        **environment(),
        "model": args.shape or "smollm2-135m",
        "dtype": str(model.get_base_model().dtype).removeprefix("torch."),
        "rows": sum(len(micro["labels"]) for micro in batch),
        "tokens": sum(micro["input_ids"].numel() for micro in batch),
        "supervised_tokens": supervised_tokens(batch),
        "ranks": len(ranks),
        "prune": prune,
        "ablated": len(chosen),
        "loss": first.loss,
        "base_loss": first.base_loss,
        "training_step_seconds": step[1],
        "exact_against_naive": max(
            abs(getattr(exact, kind)[rank] - naive[kind][rank]) for kind in ("drop", "alone") for rank in naive_ranks
        ),
        "spearman": {kind: spearman(values[kind], estimates[kind]) for kind in KINDS},
        "quadrature_error": abs(total(path) / (path.base_loss - path.loss) - 1)
        if path.base_loss != path.loss
        else None,
        "certified": certified.certified,
        "residual": certified.residual and vars(certified.residual),
        "same_pruned_set": None if truth is None else pruned_by(certified, prune) == truth,
        "first_order_overlap": None if truth is None else len(pruned_by(first, prune) & truth) / prune,
        "certified_overlap": None if truth is None else len(pruned_by(certified, prune) & truth) / prune,
        "methods": [
            row("naive loop", naive_forwards, forward * naive_forwards, len(ranks), forward, naive_forwards),
            row("exact", exact_forwards, exact_all, len(ranks), forward, naive_forwards),
            row(
                "certified",
                certified.forward_equivalents,
                certified_seconds,
                certified.exact_evaluations,
                forward,
                naive_forwards,
            ),
            row("path", path.forward_equivalents, path_seconds, 0, forward, naive_forwards),
            row("first order", first.forward_equivalents, first_seconds, 0, forward, naive_forwards),
        ],
        "points": {kind: [[estimates[kind][rank], values[kind][rank]] for rank in chosen] for kind in KINDS},
        "threshold": threshold(certified, prune),
    }


def engines(model: Any, batch: list[dict[str, Any]]) -> str:
    """The engines that never ablate every rank, as a table, and what the certificate rests on. A forward is timed for
    the scale."""
    every, prune = sum(len(layer.A) for layer in gated_layers(model).values()), len(gated_layers(model))
    forward = timed(lambda: naive_loop(model, batch, []))[1] / 2
    rows, naive = [], 1 + 2 * every
    for method in ("certified", "path", "first-order"):
        importance = "path" if method == "path" else "sum"
        scores, seconds = timed(
            lambda m=method, i=importance: score_ranks(
                model, batch, m, importance=i, prune=prune, memory=memory_to_score()
            )
        )
        rows.append(row(method, scores.forward_equivalents, seconds, scores.exact_evaluations, forward, naive))
        if scores.residual:
            settled = f"certified: {scores.certified}; {scores.residual}"
    return f"{table(rows)}\n{settled}"


def row(method: str, forwards: float, seconds: float, ablated: int, forward: float, naive: int) -> dict[str, Any]:
    return {
        "method": method,
        "forwards": round(forwards),
        "share of naive": f"{forwards / naive:.1%}",
        "seconds": round(seconds, 1),
        "times faster": round(forward * naive / seconds, 1),
        "ranks ablated": ablated,
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - start


def training_step(model: Any, batch: list[dict[str, Any]]) -> None:
    """Forward and backward of the same tokens as in training, without the optimizer."""
    model.train()
    for micro in batch:
        model(**micro).loss.backward()
    model.zero_grad()


def naive_loop(model: Any, batch: list[dict[str, Any]], ranks: list[Rank]) -> dict[str, dict[Rank, float]]:
    """The paper's: a whole forward of the batch for each rank closed, and for each rank alone."""
    layers = gated_layers(model)
    shut = {name: torch.zeros(len(layer.A), device=layer.A.device) for name, layer in layers.items()}

    def loss(gates: dict[str, torch.Tensor]) -> float:
        with gated(layers, gates), torch.no_grad():
            losses = sum(float(row_losses(model, micro).double().sum()) for micro in batch)
        return losses / supervised_tokens(batch)

    model.eval()
    full, base, drop, alone = loss({}), loss(shut), {}, {}
    for name, k in ranks:
        one = torch.zeros_like(shut[name]).index_fill_(0, torch.tensor(k, device=shut[name].device), 1.0)
        drop[name, k] = loss({name: 1 - one}) - full
        alone[name, k] = base - loss({**shut, name: one})
    return {"drop": drop, "alone": alone}


def by_kind(found: Any, kind: str, rank: Rank) -> float:
    return found.drop[rank] + found.alone[rank] if kind == "importance" else getattr(found, kind)[rank]


def mean_suffix(model: Any, ranks: list[Rank]) -> float:
    blocks = model.get_base_model().config.num_hidden_layers
    return sum((blocks - int(name.split(".layers.")[1].split(".")[0])) / blocks for name, _ in ranks) / len(ranks)


def pruned_set(importance: dict[Rank, float], like: RankScores, prune: int) -> set[Rank]:
    lists = {name: [importance[name, k] for k in range(len(scores))] for name, scores in like.drop.items()}
    return {(name, k) for name, ks in least_important(lists, prune).items() for k in ks}


def pruned_by(scores: RankScores, prune: int) -> set[Rank]:
    return {(name, k) for name, ks in least_important(scores.importance, prune).items() for k in ks}


def threshold(scores: RankScores, prune: int) -> float:
    ordered = sorted(value for values in scores.importance.values() for value in values)
    return (ordered[prune - 1] + ordered[prune]) / 2


def total(scores: RankScores) -> float:
    return sum(map(sum, scores.importance.values()))


def spearman(a: dict[Rank, float], b: dict[Rank, float]) -> float:
    def order(values: dict[Rank, float]) -> torch.Tensor:
        return torch.tensor([values[rank] for rank in a], dtype=torch.float64).argsort().argsort().double()

    return float(torch.corrcoef(torch.stack([order(a), order(b)]))[0, 1])


# ------------------------------------------------------------------------------------------------------------ reporting


def report(name: str, r: dict[str, Any]) -> str:
    lines = [
        f"# {name}\n",
        f"{r['model']}, NF4 base computed in {r['dtype']}, {r['ranks']} ranks; {r['rows']} rows, {r['tokens']} tokens, "
        f"{r['supervised_tokens']} supervised; loss {r['loss']:.4f}, of the base {r['base_loss']:.4f}.",
        f"{r['device']}; torch {r['torch']}, transformers {r['transformers']}, peft {r['peft']}, bitsandbytes "
        f"{r['bitsandbytes']}; {r['date']}, commit {r['commit']}.\n",
        f"    {r['command']}\n",
        table(r["methods"]),
        f"The naive loop was timed on {NAIVE_RANKS} ranks and its cost scaled to all"
        + ("." if r["ablated"] == r["ranks"] else f", as was exact's from {r['ablated']}."),
        f"A forward and backward of training on the same tokens took {r['training_step_seconds']:.2f} s; a first-order "
        f"scoring is {r['methods'][-1]['seconds'] / r['training_step_seconds']:.1f} of them.\n",
        f"- exact against the naive loop: largest difference {r['exact_against_naive']:.1e} nats",
        "- Spearman of first order with exact: "
        + ", ".join(f"{kind} {value:.4f}" for kind, value in r["spearman"].items())
        + f" ({r['ablated']} ranks)",
    ]
    if r["quadrature_error"] is not None:
        lines.append(f"- path: the shares add up to L(base) − L(M) within {r['quadrature_error']:.2%}")
    if r["residual"]:
        lines.append(
            f"- certified: {str(r['certified']).lower()}; first order errs by {r['residual']['std']:.1e} on the sample "
            f"(largest {r['residual']['largest']:.1e}, band {r['residual']['band']:.1e}); rounding noise "
            f"{r['residual']['noise']:.1e}; at most {r['residual']['missed']:.0%} of the ranks not ablated err by more "
            "than their band (95 % confidence)"
        )
    if r["same_pruned_set"] is not None:
        lines.append(
            f"- the {r['prune']} pruned: certified {'identical to' if r['same_pruned_set'] else 'NOT those of'} "
            f"exhaustive ablation ({r['certified_overlap']:.1%} the same), first order alone "
            f"{r['first_order_overlap']:.1%}"
        )
    return "\n".join(lines) + "\n"


def draw(r: dict[str, Any], path: Path) -> None:
    """Exact against first order, one point a rank."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axes, kind in zip(panels, KINDS, strict=True):
        points = torch.tensor(r["points"][kind])
        ends = [float(points.min()), float(points.max())]
        axes.plot(ends, ends, color="0.8", linewidth=1, zorder=0)
        axes.scatter(points[:, 0], points[:, 1], s=6, color="#2a6f97", alpha=0.6, linewidths=0)
        axes.set(title="drop + alone" if kind == "importance" else kind, xlabel="first order (nats)")
        axes.ticklabel_format(style="sci", scilimits=(-2, 2))
        axes.spines[["top", "right"]].set_visible(False)
        if kind == "importance":
            axes.axvline(r["threshold"], color="#c1121f", linewidth=1)
            axes.axhline(r["threshold"], color="#c1121f", linewidth=1)
            axes.annotate(
                f"the {r['prune']} least important", (r["threshold"], ends[1]), (4, -4), textcoords="offset points",
                va="top", color="#c1121f", fontsize=8,
            )  # fmt: skip
    panels[0].set_ylabel("exact ablation (nats)")
    figure.suptitle(f"{r['ablated']} of {r['ranks']} ranks, {r['model']}, {r['rows']} rows")
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()

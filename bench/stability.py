"""What a rank map means: how much of it another validation batch, or another sample of training rows, would have drawn
alike.

    python bench/stability.py --recipe e2e --data data/e2e      # half an hour on 2 CPU cores

Scores: AB-LoRA's (first order) of one trained adapter (that of bench/scoring.py) on disjoint validation batches of
growing size. Starts: the corrections of allocation.start=scores that are kept on disjoint samples of training rows.
DATA is a folder with train.jsonl and validation.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from common import environment, table, write_results
from quality_report import overlap
from scoring import spearman, trained
from torch import Tensor

from qalora.adapter.ablation import gate_gradients, scoring_mode
from qalora.adapter.allocation import least_important, plan
from qalora.adapter.allocation_round import keep_best_corrections
from qalora.adapter.model import attach, rank_parameters, ranks
from qalora.base.checkpoint import Checkpoint, open_checkpoint, original_weights
from qalora.base.registry import resolve
from qalora.data.batching import Collator, micro_batches, on_device
from qalora.data.tokenization import load_dataset

Scores = dict[str, list[float]]  # module → a score a rank


def main() -> None:
    args = parser().parse_args()
    model, tokenizer, recipe = trained(args)

    def rows_of(split: str, limit: int) -> list[dict[str, Any]]:
        rows = load_dataset(str(args.data / f"{split}.jsonl"), tokenizer, limit=limit, **recipe.data.reading())
        return rows.items

    def batched(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return on_device(micro_batches(rows, 16, Collator(tokenizer.pad_token_id)), model.device)

    validation = rows_of("validation", args.batches * max(args.sizes))
    print(f"scoring {len(validation)} rows", file=sys.stderr)
    scores = by_size(args.sizes, args.batches, RowScores.of(model, batched(validation)))
    base, checkpoint = model.unload(), open_checkpoint(resolve(recipe.model))[0]
    training = rows_of("train", args.samples * max(args.sizes))
    starts = {}
    for size in args.sizes:
        print(f"starts from {size} rows", file=sys.stderr)
        parts = [training[i * size : (i + 1) * size] for i in range(args.samples)]
        starts[size] = [started(base, checkpoint, batched(part), seed=i) for i, part in enumerate(parts)]
    again = started(base, checkpoint, batched(training[: args.sizes[0]]), seed=args.samples)
    results = {
        **environment(),
        "recipe": args.recipe,
        "scores": scores,
        "starts": [start_row(size, maps) for size, maps in starts.items()],
        "same_rows_other_tokens": overlap(starts[args.sizes[0]][0], again),
    }
    write_results(f"stability-{args.recipe}", results, report(results, args))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="e2e")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and validation.jsonl")
    parser.add_argument(
        "--adapter", type=Path, help="default: outputs/bench/RECIPE/adapter, trained where it is absent"
    )
    parser.add_argument("--max-seq-len", type=int, help="default: the recipe's")
    parser.add_argument("--dtype", default="auto", help="to compute in (default: by device)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="rows of a batch")
    parser.add_argument("--batches", type=int, default=6, help="disjoint validation batches of each size")
    parser.add_argument("--samples", type=int, default=3, help="disjoint samples of training rows of each size")
    return parser


# ------------------------------------------------------------------------------------------------------------ scores


class RowScores:
    """First-order scores of single rows, of which those of any batch are sums: one pass serves batches of every
    size."""

    def __init__(self, gradients: Mapping[str, Tensor], tokens: Tensor):
        self.gradients, self.tokens = gradients, tokens

    @classmethod
    def of(cls, model: Any, batch: Sequence[dict[str, Any]]) -> RowScores:
        with scoring_mode(model):
            _, at_one, tokens = gate_gradients(model, batch, 1.0)
            _, at_zero, _ = gate_gradients(model, batch, 0.0)
        # Rows come shortest first; batches are to be like each other.
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
        return cls({name: (at_one[name] + at_zero[name])[order] for name in at_one}, tokens[order])

    def importance(self, rows: slice) -> Scores:
        tokens = self.tokens[rows].sum()
        return {name: (-gradient[rows].sum(0) / tokens).tolist() for name, gradient in self.gradients.items()}


def by_size(sizes: Sequence[int], batches: int, rows: RowScores) -> list[dict[str, Any]]:
    modules = len(rows.gradients)
    found = []
    for size in sizes:
        scores = [rows.importance(slice(i * size, (i + 1) * size)) for i in range(batches)]
        pruned = [
            {(name, k) for name, indices in least_important(of, modules).items() for k in indices} for of in scores
        ]
        moved = [after_a_round(of) for of in scores]
        table_of = torch.tensor([[value for values in of.values() for value in values] for of in scores])
        found.append(
            {
                "rows": size,
                "Spearman": mean_of_pairs([flat(of) for of in scores], spearman),
                "pruned by both": mean_of_pairs(pruned, lambda a, b: len(a & b) / modules),
                "map overlap": mean_of_pairs(moved, overlap),
                "standard error / spread": float(table_of.std(0).mean() / table_of.mean(0).std()),
            }
        )
    return found


def flat(scores: Scores) -> dict[tuple[str, int], float]:
    return {(name, k): value for name, values in scores.items() for k, value in enumerate(values)}


def after_a_round(scores: Scores) -> dict[str, int]:
    """The ranks after one round that prunes one a module."""
    decision = plan(scores, prune=len(scores))
    return {
        name: len(values) - len(decision.pruned.get(name, ())) + decision.grown.get(name, 0)
        for name, values in scores.items()
    }


# ------------------------------------------------------------------------------------------------------------ starts


def started(base: Any, checkpoint: Checkpoint, batch: Sequence[dict[str, Any]], seed: int) -> dict[str, int]:
    """The ranks with which a run would begin had it drawn these rows."""
    model = attach(base, r=8, alpha=16, seed=0)
    even = ranks(model)
    cost = rank_parameters(model, even)
    record, _ = keep_best_corrections(
        model, None, batch, original_weights(checkpoint, "base"), even, budget=sum(even.values()),
        parameters=sum(cost[name] * rank for name, rank in even.items()), min_rank=0, max_rank=None, seed=seed,
    )  # fmt: skip
    model.unload()
    return record["ranks"]


def start_row(size: int, maps: Sequence[dict[str, int]]) -> dict[str, Any]:
    names = list(maps[0])
    counts = torch.tensor([[of[name] for name in names] for of in maps], dtype=torch.float32)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [{name: of[names[j]] for name, j in zip(names, order, strict=True)} for of in maps]
    return {
        "rows": size,
        "map overlap": mean_of_pairs(maps, overlap),
        "… of shuffled maps": statistics.fmean(overlap(a, b) for a, b in zip(maps, shuffled[1:] + shuffled[:1],
        strict=True)), "correlation of ranks": mean_of_pairs(list(counts), lambda a,
        b: float(torch.corrcoef(torch.stack([a, b]))[0, 1])),
        "least … most ranks": f"{int(counts.min())} … {int(counts.max())}",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- small parts


def mean_of_pairs(values: Sequence[Any], agreement: Callable[[Any, Any], float]) -> float:
    return statistics.fmean(agreement(a, b) for a, b in combinations(values, 2))


def report(results: Mapping[str, Any], args: argparse.Namespace) -> str:
    r = results
    return "\n".join(
        [
            f"# stability-{r['recipe']}\n",
            f"SmolLM2-135M, r = 8 on every map, 1,680 ranks. {r['device']}; torch {r['torch']}, peft {r['peft']}; "
            f"{r['date']}, "
            f"commit {r['commit']}.\n",
            f"    {r['command']}\n",
            f"AB-LoRA scores (first order, drop + alone) of one trained adapter on {args.batches} disjoint validation "
            "batches, in pairs: the share of the 210 pruned ranks that both prune (an eighth by chance), and the "
            "overlap of the two maps after "
            "one round. The standard error is that of a rank's score between batches, over the spread of scores "
            "between ranks.\n",
            table(r["scores"]),
            f"Ranks at the start (allocation.start=scores, 1 to 16 a module) from {args.samples} disjoint samples of "
            "training "
            "rows, in pairs, and against maps whose modules were shuffled.\n",
            table(r["starts"]),
            f"The same {args.sizes[0]} rows, other tokens of theirs: overlap {r['same_rows_other_tokens']:.3f}.\n",
        ]
    )


if __name__ == "__main__":
    main()

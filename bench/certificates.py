"""Whether `certified` means what it says: its certificates against exhaustive ablation, on models made to mislead first
order.

    python bench/certificates.py      # some minutes on 2 CPU cores

A tiny random LLaMA has ranks of one size, and among them a few that are 150 times as large, or sizes without a mean
(Cauchy). Nothing limits the forwards, so a scoring ends where it holds its pruned set for settled. Wrong is a
certificate whose pruned set is not that of every rank ablated in fp32; a tie is one where the two sets differ only by
ranks that rounding alone exchanges.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import environment, table, write_results
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from qalora.adapter.allocation import least_important
from qalora.adapter.certified import NOISES
from qalora.adapter.model import attach, gated_layers
from qalora.adapter.scores import PerRank, RankScores, decides
from qalora.adapter.scoring import score_ranks

R, MODULES, FACTOR, VOCABULARY = 8, 14, 150, 128
PLENTY = 10**9  # forwards, and bytes of stacked variants


@dataclass(frozen=True)
class World:
    """
    Attributes:
        std: of B's entries; A is as a run begins with it.
        planted: ranks that are FACTOR times as large.
        heavy: the size of each rank is the absolute value of a Cauchy variable, FACTOR at most.
    """

    dtype: str
    std: float
    planted: int = 0
    heavy: bool = False
    importance: str = "sum"
    min_rank: int = 0


WORLDS = (
    *(World(dtype, std, planted=2) for dtype in ("float32", "bfloat16") for std in (0.001, 0.003, 0.01)),
    *(World(dtype, 0.003) for dtype in ("float32", "bfloat16")),
    *(World(dtype, 0.003, planted=12) for dtype in ("float32", "bfloat16")),
    *(World(dtype, 0.003, heavy=True) for dtype in ("float32", "bfloat16")),
    *(
        World("float32", 0.003, planted=2, importance=importance, min_rank=min_rank)
        for importance in ("drop", "alone", "sum")
        for min_rank in (0, 1)
        if (importance, min_rank) != ("sum", 0)
    ),
)  # fmt: skip


def main() -> None:
    args = parser().parse_args()
    trials = [(world, seed) for world in WORLDS for seed in range(args.seeds)]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        outcomes = list(pool.map(trial, *zip(*trials, strict=True), chunksize=4))
    rows = [summary(world, outcomes[i * args.seeds : (i + 1) * args.seeds]) for i, world in enumerate(WORLDS)]
    total = {name: sum(row[name] for row in rows) for name in ("trials", "certified", "wrong", "ties")}
    ran = environment()
    head = (
        f"# Certificates against exhaustive ablation\n\n{total['trials']} trials, {total['certified']} certified, "
        f"{total['wrong']} of these wrong, {total['ties']} but for ties. {MODULES * R} ranks in {MODULES} modules, of "
        f"which {MODULES} go; ablated: share of the ranks, "
        f"mean.\n\n`{ran['command']}`, torch {ran['torch']}, {ran['device']}, {ran['date']}, commit "
        f"{ran['commit']}.\n\n"
    )
    write_results("certified-trials", {**ran, **total, "rows": rows}, head + table(rows))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    return parser


def summary(world: World, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    what = f"{world.planted} planted" if world.planted else "heavy tails" if world.heavy else "nothing planted"
    return {
        "ranks": what, "base": world.dtype, "std of B": world.std, "importance": world.importance,
        "min_rank": world.min_rank, "trials": len(outcomes),
        **{name: sum(of[name] for of in outcomes) for name in ("certified", "wrong", "ties")},
        "ablated": sum(of["ablated"] for of in outcomes) / len(outcomes),
    }  # fmt: skip


def trial(world: World, seed: int) -> dict[str, Any]:
    model, batch = model_of(world, seed), [batch_of(seed)]
    found = score_ranks(
        model, batch, "certified", importance=world.importance, prune=MODULES, min_rank=world.min_rank, memory=PLENTY,
        budget=PLENTY, seed=seed,
    )  # fmt: skip
    exact = score_ranks(model, batch, "exact", memory=PLENTY)
    truth = decides(world.importance, exact.drop, exact.alone)
    other = set(pruned(found.importance, world)) ^ set(pruned(truth, world))
    tie = found.certified and bool(other) and exchangeable(found, truth, other)
    return {
        "certified": found.certified,
        "wrong": found.certified and bool(other) and not tie,
        "ties": tie,
        "ablated": found.exact_evaluations / (R * MODULES),
    }


def model_of(world: World, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=MODULES // 7,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, use_cache=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(getattr(torch, world.dtype)).requires_grad_(False)
    model = attach(base, r=R, alpha=2 * R, seed=seed)
    layers = list(gated_layers(model).values())
    for layer in layers:
        layer.B.data.normal_(std=world.std)
        if world.heavy:
            layer.B.data *= torch.empty(R).cauchy_().abs().clamp(max=FACTOR)
    for place in torch.randperm(MODULES * R)[: world.planted].tolist():
        layers[place // R].B.data[:, place % R] *= FACTOR
    return model


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row in range(len(ids)):
        labels[row, : 2 + row % 5] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def pruned(importance: PerRank, world: World) -> Iterator[tuple[str, int]]:
    for name, ranks in least_important(importance, MODULES, world.min_rank).items():
        yield from ((name, rank) for rank in ranks)


def exchangeable(found: RankScores, truth: PerRank, ranks: set[tuple[str, int]]) -> bool:
    """Whether ranks that one of the two prunes alone are, by exhaustive ablation, as important as one another up to
    rounding."""
    values = [truth[name][rank] for name, rank in ranks]
    return found.residual is not None and max(values) - min(values) <= 2 * NOISES * found.residual.noise


if __name__ == "__main__":
    main()

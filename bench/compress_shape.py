"""Memory and time of `qalora compress` on a model's shape, weights and adapter random, against what `plan` counts.

    python bench/compress_shape.py --shape llama-7b --disk DIR              # 14 GB of disk
    python bench/compress_shape.py --shape llama-7b --disk DIR --layers 2   # some of its blocks, tensors counted too

Rows are random tokens: one orders the ranks, one judges. Memory is the peak resident set above what imports took, once
the base is loaded: while it loads, pages of its file count as well. So do pages of libraries that are first used in the
cut; with --layers the bytes of all tensors at their peak stand beside it, by torch's profiler, which takes memory
itself. `plan` counts the tensors of a training step of the same rows; scoring has neither moments nor gradients of
weights, and a cut holds a copy of the adapter as training left it.
"""

from __future__ import annotations

import argparse
import gc
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from common import environment, peak_rss, reset_peak, table, write_results
from merge import make_adapter, make_base
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from qalora.adapter.ablation import MicroBatch
from qalora.adapter.compression import Size
from qalora.adapter.model import load_adapter, ranks
from qalora.adapter.search import Asked
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import resolve, shape_of
from qalora.deploy.compressed import Rows, cut_model
from qalora.kernels.activations import set_checkpointing
from qalora.memory import GONE, plan_memory

TRAINING_ALONE = ("gradients", "optimizer moments", GONE, "earlier gradients beyond it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-7b", help="a registered model (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="blocks (default: all)")
    parser.add_argument("--disk", type=Path, required=True, help="a folder for the weights, which are made once")
    parser.add_argument("--tokens", type=int, default=64, help="of a row (default: %(default)s)")
    args = parser.parse_args()
    row = measured(args)
    results = {**environment(), **row}
    name = f"compress-{args.shape}" + (f"-{args.layers}-blocks" if args.layers else "")
    text = (
        f"# {name}\n\n{results['device']}; torch {results['torch']}, transformers "
        f"{results['transformers']}, peft {results['peft']}, bitsandbytes {results['bitsandbytes']}; "
        f"{results['date']}, commit {results['commit']}.\n\n    {results['command']}\n\n"
        "Weights and adapter are random, r = 8 on every linear layer, NF4 computed in fp32; "
        f"{args.tokens} tokens order the ranks and as many judge.\n\n"
    )
    write_results(name, results, text + table([row]))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    shape = shape_of(resolve(args.shape))
    shape = replace(shape, num_hidden_layers=args.layers or shape.num_hidden_layers)
    base, adapter = (args.disk / f"{name}-{shape.num_hidden_layers}" for name in ("base", "adapter"))
    if not (base / "model.safetensors.index.json").is_file():
        make_base(LlamaConfig(**{**vars(shape), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}), base)
        make_adapter(shape, adapter)
    tokenizer = load_tokenizer(resolve("smollm2-135m"))  # which nothing reads
    before, start = reset_peak(), time.perf_counter()
    loaded = load_base(resolve(str(base)), tokenizer=tokenizer, dtype="float32")
    set_checkpointing(loaded.model, True)
    model = load_adapter(loaded.model, adapter, trainable=True)
    loading, ready = peak_rss() - before, time.perf_counter()
    gc.collect()
    reset_peak()
    asked = Asked(Size(ranks=sum(ranks(model).values()) // 2))
    own = {each.data_ptr(): each.nbytes for each in (*model.parameters(), *model.buffers())}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) if args.layers else nullcontext() as watched:
        report = cut_model(model, asked, Rows(*rows(args.tokens)))
    seconds, peak = time.perf_counter() - ready, peak_rss() - before
    tensors = {"peak of tensors, MB": round((sum(own.values()) + most_alive(watched)) / 1e6)} if watched else {}
    step = plan_memory(shape, seq_len=args.tokens, compute_dtype="float32", device="cpu")
    scoring = sum(size for name, size in step.terms.items() if name not in TRAINING_ALONE) + step.terms["adapter"]
    return {
        "model": args.shape,
        "blocks": shape.num_hidden_layers,
        "ranks kept": f"{sum(report['ranks'].values()):,} of {report['whole']['ranks']:,}",
        "losses measured": sum(map(len, report["curves"].values())) + 2,
        "seconds to load": round(ready - start),
        "seconds to cut": round(seconds),
        "peak of loading, MB": round(loading / 1e6),
        "peak of cutting, MB": round(peak / 1e6),
        **tensors,
        "planned MB": round(scoring / 1e6),
        "a training step, MB": round(step.total / 1e6),
    }


def most_alive(watched: profile) -> int:
    """Bytes of the tensors that were made while it watched, at their peak."""
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def rows(tokens: int) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """A micro-batch of one row that orders, and one that judges; half of each is learned."""
    found = []
    for seed in (0, 1):
        ids = torch.randint(5, 30000, (1, tokens), generator=torch.Generator().manual_seed(seed))
        labels = ids.clone()
        labels[:, : tokens // 2] = -100
        found.append([{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}])
    return found[0], found[1]


if __name__ == "__main__":
    main()

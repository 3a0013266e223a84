"""Speed and memory of training steps on the plain path (transformers' own forward with our low-rank layers and loss),
against TRL's SFTTrainer with PEFT on the same model.

    python bench/plain_path.py --family gemma3_text
    python bench/plain_path.py --family olmo2 --steps 12

A model of random weights (about 40 million), in NF4, r = 8 on every linear layer, AdamW, rows of one length, so that no
order of rows matters. Each side in a process of its own; they take their steps in turns, so that a machine's slow
minutes fall on both. Both checkpoint each block, as TRL does by default.

qalora   training.gradient_checkpointing=true
trl      SFTTrainer with a LoraConfig, as QLoRA's users write it
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import environment, peak_rss, reset_peak, table, write_results
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from train_step import Clock, in_turns, warm_up
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from qalora.adapter.allocation import Schedule
from qalora.adapter.model import attach
from qalora.base.loading import load_base
from qalora.recipe import load_recipe
from qalora.training.trainer import build_trainer

SIDES = ("qalora", "trl")
SIZES = dict(
    hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
    head_dim=64, vocab_size=8192, max_position_embeddings=2048, pad_token_id=0, bos_token_id=None, eos_token_id=1,
)  # fmt: skip


def main() -> None:
    args = parser().parse_args()
    if args.worker:
        work(args)
        return
    found = in_turns(SIDES, args.steps, script=__file__)
    ours, theirs = (found[side] for side in SIDES)
    pairs = [a / b for a, b in zip(ours["step_seconds"], theirs["step_seconds"], strict=True)]
    ratio, memory = statistics.median(pairs), ours["peak_bytes"] / theirs["peak_bytes"]
    rows = [
        {
            "side": side,
            "s a step (median)": f"{statistics.median(it['step_seconds']):.2f}",
            "peak MB over the loaded model": round(it["peak_bytes"] / 1e6),
        }
        for side, it in found.items()
    ]
    name = f"plain_path-{args.family}"
    results = {**environment(), "sides": found, "time_ratio": ratio, "memory_ratio": memory}
    text = (
        f"# {name}\n\n{args.family}, random weights, NF4 computed in {args.dtype}, {args.steps} steps of "
        f"{args.micro_batch_size} × {args.tokens} tokens, in turns.\n{results['device']}; torch {results['torch']}, "
        f"transformers {results['transformers']}, peft {results['peft']}; {results['date']}, commit "
        f"{results['commit']}.\n\n    {results['command']}\n\n{table(rows)}\n"
        f"A step of ours takes {ratio:.2f} times one of TRL's (median of pairs), and {memory:.2f} times its memory.\n"
    )
    write_results(name, results, text)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="gemma3_text", help="model_type of transformers")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of each row")
    parser.add_argument("--steps", type=int, default=10, help="after a forward and backward that are not counted")
    parser.add_argument("--dtype", default="float32", help="to compute in")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    return parser


def work(args: argparse.Namespace) -> None:
    """The steps of one side, each when the other side of the pipe says so, and a report in the end."""
    with tempfile.TemporaryDirectory() as folder:
        model, output = save_model(Path(folder) / "model", args.family), Path(folder) / "output"
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, 250, (args.steps * args.micro_batch_size, args.tokens), generator=generator).tolist()
        set_seed(42)
        trainer = {"qalora": by_qalora, "trl": by_trl}[args.worker](args, model, ids, output)
        loaded = reset_peak()
        warm_up(trainer, args.micro_batch_size)
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
    print(json.dumps({"step_seconds": clock.seconds, "peak_bytes": peak_rss() - loaded}))


def save_model(path: Path, family: str) -> Path:
    torch.manual_seed(0)
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES)).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>").save_pretrained(path)
    return path


def by_qalora(args: argparse.Namespace, path: Path, ids: list[list[int]], output: Path) -> Trainer:
    recipe = load_recipe(
        "alpaca",
        [
            ("model", str(path)),
            ("data.train", "unread"),
            ("quantization.bnb_4bit_compute_dtype", args.dtype),
            ("allocation.rounds", 0),
            ("lora.r", 8),
            ("lora.alpha", 16),
            ("training.micro_batch_size", args.micro_batch_size),
            ("training.gradient_accumulation_steps", 1),
            ("training.max_steps", args.steps),
            ("training.gradient_checkpointing", True),
            ("training.eval_steps", 1000),
            ("training.save_steps", 1000),
            ("logging.quiet", True),
        ],
    )
    base = load_base(path, dtype=args.dtype)
    model = attach(base.model, r=8, alpha=16, seed=0)
    items = [{"input_ids": row, "labels": row, "row": i} for i, row in enumerate(ids)]
    trainer, _, _ = build_trainer(
        recipe, model, base.tokenizer, rows=items, train=items, validation=items[:1], scoring=items[:1],
        rounds=Schedule((), False), total_steps=args.steps, compute_dtype=base.compute_dtype,
        output_dir=output,
    )  # fmt: skip
    trainer.args.save_strategy = "no"
    return trainer


def by_trl(args: argparse.Namespace, path: Path, ids: list[list[int]], output: Path) -> Trainer:
    dtype: Any = getattr(torch, args.dtype)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=four_bit, dtype=dtype)
    settings = SFTConfig(
        output_dir=str(output), per_device_train_batch_size=args.micro_batch_size, max_steps=args.steps,
        max_length=args.tokens, gradient_checkpointing=True, save_strategy="no", report_to="none", disable_tqdm=True,
        bf16=args.dtype == "bfloat16", use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    return SFTTrainer(
        model, settings, train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=PreTrainedTokenizerFast.from_pretrained(path),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip


if __name__ == "__main__":
    main()

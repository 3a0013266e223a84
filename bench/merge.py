"""Merging an adapter of a 4-bit base: time, memory and error of PEFT's ways and of ours.

    python bench/merge.py --adapter outputs/bench/e2e/adapter            # SmolLM2-135M, each way in its own process
    python bench/merge.py --shape llama-7b --disk DIR --no-verify        # our memory and time alone; 30 GB of disk

Memory is the peak resident set above what the imports took. The error is that of the logits on eight short texts, in
fp32, against the 4-bit base with the adapter on top.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, peak_rss, reset_peak, table, write_results
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qalora.adapter.model import load_adapter
from qalora.adapter.saved import PREFIX
from qalora.base.checkpoint import Quantization
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import ModelSource, resolve, shape_of
from qalora.base.structure import structure_of
from qalora.deploy.merging import merge
from qalora.deploy.verification import TEXTS

NF4 = Quantization("nf4", True, torch.float32)
PT = {"format": "pt"}
WAYS = {
    "PEFT merge_and_unload, 4-bit": "4-bit",
    "PEFT, model.dequantize() first": "float32",
    "qalora, dequantized, bf16": "bfloat16",
    "qalora, dequantized, fp16": "float16",
    "qalora, dequantized, fp32": "float32",
    "qalora, original, bf16": "bfloat16",
}
MORE_TEXTS = (
    "Once upon a time, in a",
    "name[Alimentum], area[city centre], familyFriendly[no]",
    "1, 2, 3, 4,",
    "Dear Sir,",
)


def main() -> None:
    args = parser().parse_args()
    if args.worker:
        print(json.dumps(work(args)))
        return
    if args.shape:
        rows = [shape_row(args)]
        name = f"merge-{args.shape}"
    else:
        with tempfile.TemporaryDirectory() as scratch:
            run("reference", args.adapter, scratch)
            rows = [{"way": way, **run(way, args.adapter, scratch)} for way in WAYS]
        name = "merge-smollm2-135m"
    results = {**environment(), "rows": rows}
    text = f"# {name}\n\n{results['device']}; torch {results['torch']}, transformers {results['transformers']}, peft "
    text += (
        f"{results['peft']}, bitsandbytes {results['bitsandbytes']}; {results['date']}, commit {results['commit']}.\n\n"
    )
    write_results(name, results, f"{text}    {results['command']}\n\n{table(rows)}")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="of SmolLM2-135M; bench/scoring.py leaves one")
    parser.add_argument("--shape", help="a registered model: random weights in its shape, made shard by shard")
    parser.add_argument("--disk", type=Path, help="a folder with room for two copies of --shape")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="of --shape: do not compare afterwards"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser


def run(way: str, adapter: Path, scratch: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", way, "--adapter", str(adapter), "--scratch", str(scratch)]
    print(way, file=sys.stderr)
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def work(args: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process: what it took, and how far its logits are from the reference's."""
    source, reference = resolve("smollm2-135m"), args.scratch / "reference.pt"
    if args.worker == "reference":
        loaded = load_base(source, dtype="float32")
        model = load_adapter(loaded.model, args.adapter)
        torch.save(logits(model, loaded.tokenizer), reference)
        return {}
    tokenizer = load_tokenizer(source)
    before, start = reset_peak(), time.perf_counter()
    output = args.scratch / "merged"
    model = merged_by(args.worker, source, args.adapter, output)
    seconds, peak = time.perf_counter() - start, peak_rss() - before
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    shutil.rmtree(output)
    expected, found = torch.load(reference, weights_only=True), logits(model, tokenizer)
    difference = torch.cat([(a - b).flatten() for a, b in zip(found, expected, strict=True)])
    spread = torch.cat([(b - b.mean(-1, keepdim=True)).flatten() for b in expected]).square().mean().sqrt()
    return {
        "saved as": WAYS[args.worker],
        "seconds": round(seconds, 1),
        "peak MB": round(peak / 1e6),
        "max |Δlogit|": difference.abs().max().item(),
        "relative error": (difference.square().mean().sqrt() / spread).item(),
    }


def merged_by(way: str, source: ModelSource, adapter: Path, output: Path) -> Any:
    """Merges and saves; PEFT's ways return the model, which their folder may not give back."""
    if way.startswith("PEFT"):
        base = load_base(source, dtype="float32").model
        if "dequantize" in way:
            base = base.dequantize()
        model = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        model.save_pretrained(output)
        return model
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[way.rpartition(", ")[2]]
    quantization = None if "original" in way else NF4
    merge(source, adapter, output, quantization=quantization, dtype=dtype, verify=False)
    return None


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    model.eval()
    return [model(tokenizer(text, return_tensors="pt")["input_ids"]).logits.float() for text in TEXTS + MORE_TEXTS]


def shape_row(args: argparse.Namespace) -> dict[str, Any]:
    """Our merge of a model of that shape, weights and adapter random."""
    shape = shape_of(resolve(args.shape))
    config = LlamaConfig(**{**vars(shape), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"})
    base, adapter, output = (args.disk / name for name in ("base", "adapter", "merged"))
    largest = make_base(config, base)
    make_adapter(shape, adapter)
    tokenizer = load_tokenizer(resolve("smollm2-135m"))
    tokenizer.save_pretrained(base)
    source = resolve(str(base))
    before, start = reset_peak(), time.perf_counter()
    report = merge(source, adapter, output, quantization=Quantization("nf4", True, torch.bfloat16), verify=args.verify)
    seconds, peak = time.perf_counter() - start, peak_rss() - before
    return {
        "model": args.shape,
        "verified": args.verify,
        "GB written": round(report["bytes"] / 1e9, 2),
        "seconds": round(seconds),
        "peak MB": round(peak / 1e6),
        "largest tensor MB": round(largest / 1e6),
    }


def make_base(config: LlamaConfig, folder: Path) -> int:
    """One safetensors file a block; returns the bytes of the largest tensor."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in structure_of(config).shapes.items():
        group = name.split(".layers.")[1].split(".")[0] if ".layers." in name else name
        files.setdefault(f"{group}.safetensors", {})[name] = torch.Size(shape)
    for file, shapes in files.items():
        save_file({name: 0.02 * torch.randn(shape).bfloat16() for name, shape in shapes.items()}, folder / file, PT)
    weight_map = {name: file for file, shapes in files.items() for name in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return max(2 * shape.numel() for shapes in files.values() for shape in shapes.values())


def make_adapter(shape: Any, folder: Path) -> None:
    tensors = {}
    for name, (fan_in, fan_out) in shape.linear_maps().items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = 0.01 * torch.randn(8, fan_in)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = 0.01 * torch.randn(fan_out, 8)
    LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM").save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")


if __name__ == "__main__":
    main()

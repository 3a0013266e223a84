"""`qalora merge`: adapter + base → a 16-bit model folder that plain transformers loads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qalora merge",
        description="Adds an adapter to the weights it was trained on and saves a 16-bit model folder.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="registry name, Hub id, folder or .gguf file that the adapter was trained on",
    )
    parser.add_argument("--adapter", required=True, metavar="DIR", help="any plain PEFT LoRA")
    parser.add_argument("--output", required=True, metavar="DIR", help="new, empty, or a previous merge of the same")
    parser.add_argument("--overwrite", action="store_true", help="replace whatever the output folder holds")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the saved weights"
    )
    parser.add_argument(
        "--base",
        choices=("dequantized", "original"),
        default="dequantized",
        help="add to the 4-bit weights it was trained on (default) or to the 16-bit ones",
    )
    parser.add_argument("--no-quantize", action="store_true", help="the same as --base original")
    parser.add_argument(
        "--bnb-4bit-quant-type", choices=("nf4", "fp4"), default="nf4", help="as in training (default: nf4)"
    )
    parser.add_argument(
        "--no-double-quant", action="store_true", help="if the training was without double quantization"
    )
    return parser


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)

    import torch

    from qalora.adapter.model import read_config
    from qalora.base.loading import load_base
    from qalora.base.registry import resolve
    from qalora.deploy.merging import check_output, merge_into

    source = resolve(args.model)
    read_config(args.adapter)
    output_dir = Path(args.output)
    check_output(output_dir, model=source.name, adapter=Path(args.adapter), overwrite=args.overwrite)
    loaded = load_base(
        source,
        load_in_4bit=args.base == "dequantized" and not args.no_quantize,
        quant_type=args.bnb_4bit_quant_type,
        double_quant=not args.no_double_quant,
    )
    report = merge_into(loaded, args.adapter, output_dir, dtype=getattr(torch, args.dtype), overwrite=args.overwrite)
    size = f"{report['bytes'] / 1e9:.2f} GB in {report['dtype']}"
    print(f"{output_dir}: {size}, {report['modules']} modules merged")
    print(
        f"logits, merged against base + adapter: largest difference {report['max_logit_difference']:.3g}, "
        f"mean {report['mean_logit_difference']:.3g}; the adapter itself moves them by "
        f"{report['mean_adapter_effect']:.3g} on average"
    )
    print(f"try it: python -m qalora.generate --model {output_dir} --no-quantize --prompt '…'")
    return 0


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

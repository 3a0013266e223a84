"""`qalora merge`: adapter + base → what a server loads: a model folder, a GGUF file, or the adapter in another form."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora.cli import Parser, make_callable, say
from qalora.errors import InputError
from qalora.flags import DTYPES, add
from qalora.sizes import parse_size

if TYPE_CHECKING:
    from qalora.base.checkpoint import Quantization
    from qalora.base.registry import ModelSource

ADAPTER_FORMATS = ("peft", "peft-uniform", "gguf-lora")


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora merge",
        description="Adds an adapter to the weights it was trained on, and checks the result against base + adapter.",
    )
    add(parser, "--model", required=True, more="that the adapter was trained on")
    add(parser, "--adapter", required=True)
    parser.add_argument("--output", required=True, metavar="DIR", help="new, empty, or a previous merge of the same")
    add(parser, "--overwrite")
    parser.add_argument(
        "--format",
        choices=("hf", "gguf", *ADAPTER_FORMATS),
        default="hf",
        help="a whole model: hf (transformers, vLLM), gguf (llama.cpp, Ollama); the adapter alone: peft (ranks as "
        "trained), peft-uniform (one rank, for vLLM), gguf-lora (default: %(default)s)",
    )
    parser.add_argument(
        "--base",
        choices=("dequantized", "original"),
        help="add to the weights of a 4-bit base, as QLoRA trains on, or to the 16-bit ones as they are stored "
        "(default: what the adapter was trained on, where its qalora.json or recipe.yaml says so)",
    )
    add(parser, "--no-quantize", more="the same as --base original")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights of format hf (default: bfloat16)")
    parser.add_argument(
        "--gguf-type",
        choices=("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"),
        help="of the weights of format gguf (default: f16)",
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of format hf (default: 4GB)")
    parser.add_argument(
        "--no-verify", dest="verify", action="store_false", help="do not compare the result with base + adapter"
    )
    parser.add_argument("--verify", action="store_true", default=True, help="compare them (the default)")
    trained = parser.add_argument_group(
        "the 4-bit base of the training (default: what the adapter's qalora.json or the run's recipe.yaml says, else "
        "nf4 with double quantization in bfloat16)"
    )
    trained.add_argument("--bnb-4bit-quant-type", choices=("nf4", "fp4"))
    trained.add_argument("--no-double-quant", action="store_true")
    trained.add_argument("--bnb-4bit-compute-dtype", choices=DTYPES)
    return parser


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    args.adapter, args.output = (str(Path(path).expanduser()) for path in (args.adapter, args.output))

    from qalora.base.registry import resolve
    from qalora.deploy.output import check_output

    check_flags(args)
    shard = parse_size(args.max_shard_size, "--max-shard-size") if args.max_shard_size else None
    source = resolve(args.model)
    check_output(Path(args.output), model=source.name, adapter=Path(args.adapter), overwrite=args.overwrite)

    from qalora.adapter.its_base import refuse_other_base, said_of_base
    from qalora.adapter.saved import read_config

    read_config(args.adapter)
    alone = args.format in ADAPTER_FORMATS
    if line := (said_of_base if alone else refuse_other_base)(args.adapter, source):
        say(line)
    if alone:
        export(args, source)
    else:
        merge_whole(args, source, shard)
    return 0


def merge_whole(args: argparse.Namespace, source: ModelSource, shard: int | None) -> None:
    """Merges, and prints what came of it and how to try it."""
    import torch

    from qalora.deploy.merging import merge

    saved_as = {
        "dtype": args.dtype and getattr(torch, args.dtype),
        "gguf_type": args.gguf_type,
        "max_shard_size": shard,
    }
    asked = {
        "quant_type": args.bnb_4bit_quant_type,
        "double_quant": False if args.no_double_quant else None,
        "compute_dtype": args.bnb_4bit_compute_dtype,
    }
    report = merge(
        source,
        args.adapter,
        args.output,
        quantization=trained_quantization(args.adapter, source, "original" if args.no_quantize else args.base, asked),
        format=args.format,
        overwrite=args.overwrite,
        verify=args.verify,
        **{name: value for name, value in saved_as.items() if value is not None},
    )
    if report["caveat"]:
        print(f"{args.output}: {report['caveat']}", file=sys.stderr)
    print(f"{args.output}: {report['bytes'] / 1e9:.2f} GB in {report['dtype']}, {report['modules']} modules merged")
    if args.verify:
        print(
            f"against base + adapter: largest logit difference {report['max_logit_difference']:.3g}, mean "
            f"{report['mean_logit_difference']:.3g} (the adapter moves them by {report['mean_adapter_effect']:.3g}), "
            f"KL {report['kl']:.2g}, same likeliest token at {report['greedy_agreement']:.1%} of positions"
        )
    if args.format == "gguf":
        print(f"try it: llama-cli -m {args.output}/model.gguf, or ollama create NAME -f {args.output}/Modelfile")
    else:
        print(f"try it: python -m qalora.generate --model {args.output} --prompt '…'")


def check_flags(args: argparse.Namespace) -> None:
    """
    Raises:
        InputError: a flag that the format does not use.
    """
    whole = ("hf", "gguf")
    trained = ("bnb_4bit_quant_type", "no_double_quant", "bnb_4bit_compute_dtype")
    used_by: dict[str, tuple[str, ...]] = {"dtype": ("hf",), "max_shard_size": ("hf",), "gguf_type": ("gguf",)}
    used_by |= dict.fromkeys(("base", "no_quantize", "no_verify", *trained), whole)
    given = {name: value for name, value in vars(args).items() if value} | {"no_verify": not args.verify}
    for name, formats in used_by.items():
        flag = f"--{name.replace('_', '-')}"
        if given.get(name) and args.format not in formats:
            raise InputError(f"{flag}: goes with --format {' or '.join(formats)}, not {args.format}; leave it out.")
        if given.get(name) and name in trained and (args.no_quantize or args.base == "original"):
            raise InputError(
                f"{flag}: of the 4-bit weights, and the original ones were asked for; leave one of them out."
            )
    if args.no_quantize and args.base == "dequantized":
        raise InputError("--no-quantize: the same as --base original, and --base dequantized was given; leave one out.")


def export(args: argparse.Namespace, source: ModelSource) -> None:
    """Writes the adapter in another form, and prints what came of it and how to try it."""
    from qalora.deploy.export import VLLM_RANKS, export_adapter

    report = export_adapter(args.adapter, args.output, args.format, source=source, overwrite=args.overwrite)
    print(
        f"{args.output}: {report['modules']} modules, largest rank {report['rank']}; s · B A differs by at most "
        f"{report['relative_difference']:.1e} of its largest element"
    )
    if args.format == "peft-uniform" and report["max_lora_rank"] is None:
        print(
            f"vLLM: takes ranks up to {VLLM_RANKS[-1]}, and this adapter has {report['rank']}; serve the merged model "
            "(--format hf)"
        )
    elif args.format == "peft-uniform":
        print(f"vLLM: --enable-lora --max-lora-rank {report['max_lora_rank']} --lora-modules NAME={args.output}")
    elif args.format == "gguf-lora":
        print(f"llama.cpp: llama-cli -m BASE.gguf --lora {args.output}/adapter.gguf")


def trained_quantization(
    adapter: str, source: ModelSource, base: str | None, asked: Mapping[str, Any]
) -> Quantization | None:
    """How the training had the frozen weights: by what is asked for, by the adapter's qalora.json, by the recipe of the
    run that it lies in, or by the base where that is stored in 4 bits. Never by this machine.

    Args:
        base: dequantized or original; None: as trained.
        asked: quant_type, double_quant and compute_dtype; None: not given.

    Returns:
        None: the weights as they are stored.

    Raises:
        InputError: nothing says it, or what says it cannot be read.
    """
    import torch

    from qalora.base.checkpoint import Quantization
    from qalora.base.loading import stored_quantization

    known = known_quantization(Path(adapter))
    if base == "original":
        if known and (line := not_as_trained(adapter, known, source)):
            say(line)
        return None
    stored = stored_quantization(source)
    given = {name: value for name, value in asked.items() if value is not None}
    refuse_other_codes(source.name, stored, given)
    if not (known or stored or given or base):
        raise InputError(
            f"{adapter}: does not say what precision its base had when it was trained. Pass --base dequantized if that "
            "was 4 bits (QLoRA: load_in_4bit in the script that trained it, or a base named …-bnb-4bit in "
            "adapter_config.json), or --base original if it was 16 or 32."
        )
    quant_type = _quant_type(known, stored, given)
    if known is not None:
        for line in _other_than_trained(adapter, known, given, quant_type, base):
            say(line)
    dtype = given.get("compute_dtype") or (known or {}).get("compute_dtype") or stored.get("bnb_4bit_compute_dtype")
    if dtype in (None, "auto"):
        dtype = "bfloat16"
        if quant_type:
            say(
                f"{adapter}: does not say in which dtype its 4-bit base was computed with: taken as bfloat16, what "
                "nearly all are; --bnb-4bit-compute-dtype says another"
            )
    return Quantization(
        quant_type=quant_type,
        double_quant=bool(given.get("double_quant", (known or {}).get("double_quant", True))),
        compute_dtype=getattr(torch, str(dtype)),
    )


def _quant_type(known: Mapping[str, Any] | None, stored: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    """nf4 or fp4: as asked for, as trained, as stored; None: not quantized."""
    default = stored.get("bnb_4bit_quant_type") or "nf4"
    if known is None:
        return str(given.get("quant_type") or default)
    trained: str | None = given.get("quant_type", known["quant_type"])
    return default if trained is None and stored else trained


def _other_than_trained(
    adapter: str, known: Mapping[str, Any], given: Mapping[str, Any], quant_type: str | None, base: str | None
) -> Iterator[str]:
    """A line for each thing that is asked for and is not as the adapter was trained."""
    if quant_type is None and base == "dequantized":
        yield f"--base dequantized: {adapter} was trained on a base that was not quantized, and is merged into that"
    for name, value in given.items():
        was = known[name] if name != "double_quant" or known["quant_type"] else value
        if was not in ("auto", value):
            yield f"{adapter}: was trained with {name}={was}, and is merged with {name}={value}, as asked for"


def not_as_trained(adapter: str, known: Mapping[str, Any], source: ModelSource) -> str | None:
    """A line where the weights as they are stored are not those that the training computed with."""
    from qalora.base.fingerprint import stored_as

    dtype = known["compute_dtype"]
    if known["quant_type"] is not None:
        trained = f"{known['quant_type']} weights in {dtype}"
    elif dtype == "float32" or stored_as(source) == {"bfloat16": "BF16", "float16": "F16"}.get(dtype):
        return None
    else:
        trained = f"weights in {dtype}"
    return (
        f"--base original: {adapter} was trained on {trained}, and is merged into the weights as they are stored, "
        "as asked for"
    )


def refuse_other_codes(model: str, stored: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: the base is stored in 4 bits, of another form than the flags say.
    """
    for name, flag, key in (
        ("quant_type", "--bnb-4bit-quant-type", "bnb_4bit_quant_type"),
        ("double_quant", "--no-double-quant", "bnb_4bit_use_double_quant"),
    ):
        kept = stored.get(key)
        if name in flags and kept is not None and kept != flags[name]:
            given = f"{flag} {flags[name]}" if name == "quant_type" else flag
            what = kept if name == "quant_type" else "with double quantization"
            raise InputError(f"{given}: --model {model} is stored in 4 bits already, {what}; leave the flag out.")


def known_quantization(adapter: Path) -> dict[str, object] | None:
    """quant_type, double_quant and compute_dtype, by a file that lies with the adapter; None where there is none.

    Raises:
        InputError: the file cannot be read.
    """
    import yaml
    from pydantic import ValidationError

    from qalora.adapter.provenance import read_provenance
    from qalora.recipe import QuantizationConfig

    if found := read_provenance(adapter):
        return {name: getattr(found, name) for name in ("quant_type", "double_quant", "compute_dtype")}
    # Beside the adapter of a run, and in a checkpoint with it.
    run = next(
        (file for place in (adapter, adapter.resolve().parent) if (file := place / "recipe.yaml").is_file()), None
    )
    if run is None:
        return None
    try:
        settings = QuantizationConfig.model_validate(
            yaml.safe_load(run.read_text(encoding="utf-8")).get("quantization", {})
        )
    except (yaml.YAMLError, AttributeError, ValidationError) as error:
        raise InputError(f"{run}: not the recipe of a run ({' '.join(str(error).split())[:200]}).") from None
    return {
        "quant_type": settings.bnb_4bit_quant_type if settings.load_in_4bit else None,
        "double_quant": settings.bnb_4bit_use_double_quant,
        "compute_dtype": settings.bnb_4bit_compute_dtype,
    }


make_callable(__name__)
if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

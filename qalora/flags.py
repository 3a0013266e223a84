"""The flags that several commands have: what each is called, takes and means, once. Torch-free."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
FLAGS: dict[str, dict[str, Any]] = {
    "--model": {"help": "registry name, Hub id, folder or .gguf file"},
    "--adapter": {"metavar": "DIR", "help": "any plain PEFT LoRA"},
    "--recipe": {"help": "name of a shipped recipe, or path of a YAML file"},
    "--profile": {"help": "settings for a kind of machine, over the recipe's: 24gb, t4, cpu"},
    "--no-quantize": {"action": "store_true", "help": "keep the base in 16 or 32 bit"},
    "--dtype": {"choices": ("auto", *DTYPES), "help": "to compute in"},
    "--data": {"metavar": "FILE", "help": "file, pattern, folder or Hub id, or several with commas"},
    "--data-format": {"help": "alpaca, sharegpt, messages, prompt-completion or text"},
    "--split": {"help": "of a set that has splits, or a slice"},
    "--max-seq-len": {"type": int, "help": "tokens a row; longer rows are cut and counted"},
    "--batch-size": {"type": int, "help": "rows a forward pass"},
    "--gpu-memory": {"metavar": "SIZE", "help": "e.g. 24GiB"},
    "--overwrite": {"action": "store_true", "help": "replace what the output folder holds"},
    "--dry-run": {"action": "store_true"},
    "--json": {"action": "store_true"},
    "--quiet": {"action": "store_true", "help": "no progress bars"},
}


def add(
    parser: argparse.ArgumentParser, *flags: str, more: str = "", otherwise: str | None = None, **settings: object
) -> None:
    """Gives a command some of the shared flags.

    Args:
        more: said after the flag's meaning, of this command alone.
        otherwise: what holds without the flag, where `default` does not say it.
        settings: of argparse, such as required or default, over the flag's own.
    """
    if otherwise is None and settings.get("default") is not None:
        otherwise = "%(default)s"
    for flag in flags:
        known = {**FLAGS[flag], **settings}
        words = ", ".join(filter(None, (known.pop("help", ""), more)))
        parser.add_argument(flag, help=f"{words} (default: {otherwise})" if otherwise else words, **known)


SETTINGS = {  # flag's attribute → the setting of a recipe that it is
    "model": "model",
    "data_format": "data.format",
    "max_seq_len": "data.max_seq_len",
    "dtype": "quantization.bnb_4bit_compute_dtype",
}


def settings(args: argparse.Namespace, own: Mapping[str, Any] | None = None) -> list[tuple[str, Any]]:
    """The flags that were given, as settings of a recipe.

    Args:
        args: of a command that has --no-quantize and the flags of SETTINGS, or some of these.
        own: setting → value, of this command alone; None: not given.
    """
    given = {setting: getattr(args, name, None) for name, setting in SETTINGS.items()}
    given["quantization.load_in_4bit"] = False if args.no_quantize else None
    return [(key, value) for key, value in {**given, **(own or {})}.items() if value is not None]

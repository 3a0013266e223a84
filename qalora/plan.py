"""`qalora plan`: the memory of a run by term, and whether it fits a card. Torch-free."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from qalora.adapter.given import given_adapter
from qalora.adapter.targets import targeted
from qalora.cli import Parser, say
from qalora.fitting import HEADROOM, Plan, fit, largest, least
from qalora.flags import add
from qalora.sizes import MLP_TILE, parse_size

if TYPE_CHECKING:
    from qalora.base.registry import ModelShape
    from qalora.memory import MemoryPlan
    from qalora.recipe import Recipe


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora plan",
        description="Memory of a fine-tuning run by term, for the longest rows that the recipe allows.",
        epilog="Settings of the recipe can follow, e.g. training.micro_batch_size=1 data.max_seq_len=512.",
    )
    add(parser, "--model", required=True)
    add(parser, "--recipe", default="alpaca")
    add(parser, "--profile")
    add(parser, "--gpu-memory", more="exit code 1 when the run does not fit")
    add(parser, "--no-quantize", "--dtype", otherwise="the recipe's")
    add(parser, "--json", more="print the terms as JSON, in bytes")
    return parser


def main(argv: list[str]) -> int:
    from qalora.recipe import load_recipe, parse_overrides

    args, rest = parser().parse_known_args(argv)
    card = parse_size(args.gpu_memory) if args.gpu_memory else None
    flags = [("model", args.model)]
    if args.no_quantize:
        flags.append(("quantization.load_in_4bit", False))
    if args.dtype:
        flags.append(("quantization.bnb_4bit_compute_dtype", args.dtype))
    recipe = load_recipe(args.recipe, [*flags, *parse_overrides(rest)], args.profile)
    settle_adapter(recipe)
    for note in filter(None, (keep_to_positions(recipe), keep_to_stored(recipe))):
        say(note)
    if recipe.training.fit and card is not None:
        fit_recipe(recipe, card)
    planned = planner(recipe)
    plan = planned()
    fits = card is None or plan.total <= HEADROOM * card
    most = {} if card is None else limits(planned, card)
    if args.json:
        answer = {"terms": plan.terms, "total": plan.total, "gpu_memory": card, "fits": fits, **most}
        print(json.dumps({**answer, "training": fitted(recipe)}, indent=2))
        return 0 if fits else 1
    print_plan(plan)
    print(", ".join(f"training.{name}={value}" for name, value in fitted(recipe).items()))
    if card is not None:
        print(
            f"{'fits' if fits else 'does not fit'} {args.gpu_memory}: {plan.total / 2**30:.2f} of "
            f"{HEADROOM * card / 2**30:.2f} GiB ({1 - HEADROOM:.0%} are left to the allocator)"
        )
        print(
            f"at most: micro-batches of {most['largest_micro_batch_size']} rows of {recipe.data.max_seq_len} tokens; "
            f"one row of {most['longest_context']:,} tokens (gradient_checkpointing=offload, mlp_tile={MLP_TILE})"
        )
    return 0 if fits else 1


def keep_to_positions(recipe: Recipe) -> str | None:
    """Lowers data.max_seq_len to the positions that the model has, and returns the line that says so."""
    from qalora.base.registry import resolve, shape_of

    positions, asked = shape_of(resolve(recipe.model)).positions, recipe.data.max_seq_len
    if positions is None or asked <= positions:
        return None
    recipe.data.max_seq_len = positions
    return f"data.max_seq_len={asked}: {recipe.model} has {positions} positions; longer rows are cut there"


def keep_to_stored(recipe: Recipe) -> str | None:
    """Sets the form of the 4-bit weights to that of a base which is stored so, for nothing else can be made of it, and
    returns a line where the recipe says another."""
    from qalora.base.registry import MODELS, published_fields, resolve

    settings = recipe.quantization
    stored = {} if recipe.model in MODELS else published_fields(resolve(recipe.model)).get("quantization_config") or {}
    contradicted = []
    for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        kept, asked = stored.get(name), getattr(settings, name)
        if not stored.get("load_in_4bit") or kept is None or kept == asked:
            continue
        if name in settings.model_fields_set:
            contradicted.append(f"quantization.{name}={str(asked).lower()} (stored: {str(kept).lower()})")
        setattr(settings, name, kept)
    if not contradicted:
        return None
    return (
        f"{recipe.model} is stored in 4 bits and is taken as it is, whatever the recipe says: {', '.join(contradicted)}"
    )


def planner(
    recipe: Recipe, device: str = "cuda", *, shape: ModelShape | None = None, ranks: Mapping[str, int] | None = None
) -> Plan:
    """`plan_memory` with the recipe's settings, of which any can be set anew: its targets, and its longest rows.

    Args:
        shape: of another model than the recipe's.
        ranks: full module name → rank; None: as the recipe begins.
    """
    from qalora.base.registry import resolve, shape_of
    from qalora.memory import plan_memory

    shape = shape or shape_of(resolve(recipe.model))
    dtype = recipe.quantization.bnb_4bit_compute_dtype
    return partial(
        plan_memory,
        shape,
        ranks=first_ranks(recipe, shape) if ranks is None else ranks,
        micro_batch_size=recipe.training.micro_batch_size,
        gradient_accumulation_steps=recipe.training.gradient_accumulation_steps,
        seq_len=recipe.data.max_seq_len,
        load_in_4bit=recipe.quantization.load_in_4bit,
        double_quant=recipe.quantization.bnb_4bit_use_double_quant,
        compute_dtype="bfloat16" if dtype == "auto" else dtype,
        optim=recipe.training.optim,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        mlp_tile=recipe.training.mlp_tile,
        dropout=recipe.lora.dropout,
        directions=recipe.lora.r if recipe.chosen_init(sixteen_bit=True) == "gradient" else 0,
        device=device,
    )


def first_ranks(recipe: Recipe, shape: ModelShape) -> dict[str, int]:
    """Full module name → ranks that its adapter begins with.

    Raises:
        InputError: the recipe targets what the model has not.
    """
    lora = recipe.lora
    if lora.adapter:
        return given_adapter(lora.adapter).ranks
    return dict.fromkeys(targeted(shape.linear_maps(), lora.target_modules, lora.layers_to_transform), lora.r)


def settle_adapter(recipe: Recipe) -> None:
    """With `lora.adapter`, r, alpha and target_modules become that adapter's.

    Raises:
        InputError: no adapter there, or a setting beside it that contradicts it.
    """
    if recipe.lora.adapter:
        given = given_adapter(recipe.lora.adapter)
        given.check_settings({name: getattr(recipe.lora, name) for name in recipe.lora.model_fields_set})
        recipe.lora.r, recipe.lora.target_modules = given.r, given.target_modules
        if float(given.alpha).is_integer():
            recipe.lora.alpha = int(given.alpha)


def limits(planned: Plan, memory: int) -> dict[str, int]:
    """The largest micro-batch with the settings as they are, and the longest context with the most frugal ones."""
    frugal = partial(planned, micro_batch_size=1, gradient_checkpointing="offload", mlp_tile=MLP_TILE)
    return {
        "largest_micro_batch_size": largest(planned, memory, "micro_batch_size"),
        "longest_context": largest(frugal, memory, "seq_len"),
    }


def fit_recipe(recipe: Recipe, memory: int, *, seq_len: int | None = None, device: str = "cuda") -> bool:
    """Sets micro-batch, accumulation, checkpointing and tiling of the recipe to what fits the memory, in bytes; where
    nothing does, to what needs least, and returns False.

    Args:
        seq_len: tokens of the longest row (default: data.max_seq_len).
    """
    training, seq_len = recipe.training, seq_len or recipe.data.max_seq_len
    batch_size = training.micro_batch_size * training.gradient_accumulation_steps
    found = fit(planner(recipe, device), memory, batch_size=batch_size, seq_len=seq_len)
    for name, value in (found or least(batch_size)).settings().items():
        setattr(training, name, value)
    return found is not None


def fitted(recipe: Recipe) -> dict[str, object]:
    """The settings of a step that a fit decides."""
    names = "micro_batch_size gradient_accumulation_steps gradient_checkpointing mlp_tile"
    return {name: getattr(recipe.training, name) for name in names.split()}


def print_plan(plan: MemoryPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("term", caption="memory of one training step\non CUDA, planned")
    table.add_column("MiB", justify="right")
    for term, size in plan.terms.items():
        table.add_row(term, f"{size / 2**20:,.1f}")
    table.add_section()
    table.add_row("total", f"{plan.total / 2**20:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

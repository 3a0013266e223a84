"""`qalora plan`: the memory of a run by term, and whether it fits a card. Torch-free."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from qalora.cli import Parser, say
from qalora.errors import InputError
from qalora.fitting import HEADROOM
from qalora.flags import add, settings
from qalora.sizes import MLP_TILE, parse_size

if TYPE_CHECKING:
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
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="that share the rows of a step (default: 1)")
    add(parser, "--no-quantize", "--dtype", otherwise="the recipe's")
    add(parser, "--json", more="print the terms as JSON, in bytes")
    return parser


def main(argv: list[str]) -> int:
    from qalora.base.registry import resolve, shape_of
    from qalora.recipe import load_recipe, parse_overrides
    from qalora.training.planning import fitted, limits, on_card, planner
    from qalora.training.settling import settled, with_its_own

    args, rest = parser().parse_known_args(argv)
    card = parse_size(args.gpu_memory) if args.gpu_memory else None
    if args.gpus < 1:
        raise InputError(f"--gpus {args.gpus}: at least 1.")
    recipe = load_recipe(args.recipe, [*settings(args), *parse_overrides(rest)], args.profile)
    source = resolve(recipe.model)
    shape = shape_of(source)
    recipe, notes = settled(with_its_own(recipe), source)
    for note in notes:
        say(note)
    if recipe.training.fit and card is not None:
        recipe, _ = fitted(recipe, shape, card, processes=args.gpus)
    most = {} if card is None else limits(planner(recipe, shape, processes=args.gpus), card)
    if card is not None:
        recipe = on_card(recipe, shape, card, processes=args.gpus)
    plan = planner(recipe, shape, processes=args.gpus)()
    fits = card is None or plan.total <= HEADROOM * card
    if args.json:
        print(as_json(plan, recipe, card, fits, most, args.gpus))
    else:
        print_plan(plan, args.gpus)
        print_fit(plan, recipe, card, args.gpu_memory, most)
    return 0 if fits else 1


def as_json(plan: MemoryPlan, recipe: Recipe, card: int | None, fits: bool, most: dict[str, int], gpus: int = 1) -> str:
    """The terms in bytes, and what was fitted.

    Args:
        card: bytes of the GPU that was asked about.
        most: the limits on it.
        gpus: that share a step; the terms are of each.
    """
    from qalora.training.planning import decided_by_fit

    answer = {"terms": plan.terms, "total": plan.total, "host": plan.host, "gpus": gpus, "gpu_memory": card}
    answer |= {"fits": fits, **most}
    return json.dumps({**answer, "training": decided_by_fit(recipe)}, indent=2)


def print_fit(plan: MemoryPlan, recipe: Recipe, card: int | None, asked: str | None, most: dict[str, int]) -> None:
    """The settings that a fit decides; and for a GPU, whether the run fits and what would at most."""
    from qalora.training.planning import decided_by_fit

    print(", ".join(f"training.{name}={value}" for name, value in decided_by_fit(recipe).items()))
    if card is None:
        return
    room = HEADROOM * card
    print(
        f"{'fits' if plan.total <= room else 'does not fit'} {asked}: {plan.total / 2**30:.2f} of {room / 2**30:.2f} "
        f"GiB ({1 - HEADROOM:.0%} are left to the allocator)"
    )
    rows, longest = most["largest_micro_batch_size"], most["longest_context"]
    sparing = f"(gradient_checkpointing=offload, mlp_tile={MLP_TILE})"
    if not longest:
        print(f"no row fits, however short {sparing}")
        return
    fitting = f"micro-batches of {rows} rows" if rows else "no row"
    print(f"at most: {fitting} of {recipe.data.max_seq_len} tokens; one row of {longest:,} tokens {sparing}")


def print_plan(plan: MemoryPlan, gpus: int = 1) -> None:
    """
    Args:
        gpus: that share the step; the plan is of each.
    """
    from rich.console import Console
    from rich.table import Table

    each = f", each of {gpus} GPUs" if gpus > 1 else ""
    table = Table("term", caption=f"memory of one training step\non CUDA{each}, planned")
    table.add_column("MiB", justify="right")
    for term, size in plan.terms.items():
        table.add_row(term, f"{size / 2**20:,.1f}")
    table.add_section()
    table.add_row("total", f"{plan.total / 2**20:,.1f}")
    if plan.host:
        table.add_row("and of host memory", f"{plan.host / 2**20:,.1f}")
    Console().print(table)


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

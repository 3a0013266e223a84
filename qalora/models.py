"""`qalora models`: the registered models, and the memory that a run on each is planned to take. Torch-free."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qalora.base.registry import MODELS, ModelShape
from qalora.cli import Parser
from qalora.flags import add
from qalora.sizes import parse_size

if TYPE_CHECKING:
    from qalora.recipe import Recipe

# What the Hub gives to those alone who accepted a licence.
GATED = ("meta-llama/", "google/gemma-3", "mistralai/Ministral-8B")
CARDS = ("16GiB", "24GiB", "80GiB")


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora models",
        description="The models that have a name here, with the memory of a run on a GPU, planned. --model takes any "
        "other LLaMA-class model too: a Hub id, a folder or a .gguf file.",
        epilog="Settings of the recipe can follow, e.g. training.micro_batch_size=1 data.max_seq_len=512.",
    )
    add(parser, "--recipe", default="alpaca", more="that is planned")
    add(parser, "--profile")
    add(parser, "--gpu-memory", more=f"which runs fit it, in place of the cards {', '.join(CARDS)}")
    add(parser, "--json", more="print it as JSON, sizes in bytes")
    return parser


def main(argv: list[str]) -> int:
    from qalora.recipe import load_recipe, parse_overrides

    args, rest = parser().parse_known_args(argv)
    card = parse_size(args.gpu_memory) if args.gpu_memory else None
    cards = {} if card else {name: parse_size(name) for name in CARDS}
    recipe = load_recipe(args.recipe, [("model", next(iter(MODELS))), *parse_overrides(rest)], args.profile)
    found = [described(name, recipe, card, cards) for name in MODELS]
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print_models(found, recipe, args)
    return 0


def described(
    name: str, recipe: Recipe, card: int | None = None, cards: Mapping[str, int] | None = None
) -> dict[str, object]:
    """A registered model, and the memory of a step of the recipe on it, in bytes.

    Args:
        card: bytes of a GPU, for `fits`; with training.fit the step is fitted to it first.
        cards: name → bytes of GPUs, for what a step that is fitted to each of them takes; None where none fits.
    """
    from qalora.fitting import HEADROOM
    from qalora.training.planning import fitted, on_card, planner

    hub_id, shape = MODELS[name]
    seq_len = min(recipe.data.max_seq_len, shape.positions or recipe.data.max_seq_len)

    def fitted_to(card: int) -> int | None:
        chosen, fits = fitted(recipe, shape, card, seq_len=seq_len)
        return planner(chosen, shape)(seq_len=seq_len).total if fits else None

    at_best = fitted_to(card) if recipe.training.fit and card is not None else None
    chosen = recipe if card is None else on_card(recipe, shape, card, seq_len=seq_len)
    total = at_best or planner(chosen, shape)(seq_len=seq_len).total
    return {
        "name": name,
        "hub_id": hub_id,
        "parameters": parameters(shape),
        "positions": shape.positions,
        "gated": hub_id.startswith(GATED),
        "planned": total,
        "fits": None if card is None else total <= HEADROOM * card,
        "cards": {name: fitted_to(size) for name, size in (cards or {}).items()},
    }


def parameters(shape: ModelShape) -> int:
    """Weights, biases and embeddings of a model."""
    return (
        sum(fan_in * fan_out for fan_in, fan_out in shape.linear_maps().values())
        + shape.norms_and_biases()
        + shape.embeddings_and_head()
    )


def print_models(found: list[dict[str, Any]], recipe: Recipe, args: argparse.Namespace) -> None:
    verdicts = [f"in {args.gpu_memory}"] if args.gpu_memory else [f"in {card}" for card in found[0]["cards"]]
    rows = [("name", "on the Hub", "parameters", "positions", "planned", *verdicts)]
    for model in found:
        fits = "fits" if model["fits"] else "does not fit"
        rows.append(
            (
                model["name"],
                model["hub_id"] + (" *" if model["gated"] else ""),
                f"{model['parameters'] / 1e9:.2f} B",
                f"{model['positions']:,}",
                _gib(model["planned"]),
                *([fits] if args.gpu_memory else map(_gib, model["cards"].values())),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, hub_id, *figures in rows:
        cells = [name.ljust(widths[0]), hub_id.ljust(widths[1])]
        print("  ".join([*cells, *(text.rjust(width) for text, width in zip(figures, widths[2:], strict=True))]))
    training = recipe.training
    rows_a_forward = "as many" if training.fit and args.gpu_memory else str(training.micro_batch_size)
    print(
        f"\nplanned: one step of recipe {args.recipe} on a GPU, with {rows_a_forward} rows of up to "
        f"{recipe.data.max_seq_len} tokens a forward"
        f"{' as fit' if training.fit and args.gpu_memory else ''}; `qalora plan` has it by term."
    )
    if not args.gpu_memory:
        print("in a card: the same step, fitted to it as training.fit=auto does; –: it does not fit.")
    print("*: gated; accept its licence on the Hub and set HF_TOKEN.")


def _gib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**30:.1f} GiB"


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

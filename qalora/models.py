"""`qalora models`: the registered models, and the memory that a run on each is planned to take. Torch-free."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from qalora.base.registry import MODELS, ModelShape
from qalora.cli import Parser
from qalora.flags import add
from qalora.sizes import parse_size

if TYPE_CHECKING:
    from qalora.recipe import Recipe

GATED = "meta-llama/"  # owners whose licence has to be accepted on the Hub


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora models",
        description="The models that have a name here, with the memory of a run on a GPU, planned. --model takes any "
        "other LLaMA-class model too: a Hub id, a folder or a .gguf file.",
        epilog="Settings of the recipe can follow, e.g. training.micro_batch_size=1 data.max_seq_len=512.",
    )
    add(parser, "--recipe", default="alpaca", more="that is planned")
    add(parser, "--profile")
    add(parser, "--gpu-memory", more="also which runs fit it")
    add(parser, "--json", more="print it as JSON, sizes in bytes")
    return parser


def main(argv: list[str]) -> int:
    from qalora.recipe import load_recipe, parse_overrides

    args, rest = parser().parse_known_args(argv)
    card = parse_size(args.gpu_memory) if args.gpu_memory else None
    recipe = load_recipe(args.recipe, [("model", next(iter(MODELS))), *parse_overrides(rest)], args.profile)
    found = [described(name, recipe, card) for name in MODELS]
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print_models(found, recipe, args)
    return 0


def described(name: str, recipe: Recipe, card: int | None = None) -> dict[str, object]:
    """A registered model, and the memory of a step of the recipe on it, in bytes.

    Args:
        card: bytes of a GPU, for `fits`; with training.fit the step is fitted to it first.
    """
    from qalora.fitting import HEADROOM
    from qalora.training.planning import fitted, planner

    hub_id, shape = MODELS[name]
    seq_len = min(recipe.data.max_seq_len, shape.positions or recipe.data.max_seq_len)
    if recipe.training.fit and card is not None:
        chosen, fits = fitted(recipe, shape, card, seq_len=seq_len)
        recipe = chosen if fits else recipe
    total = planner(recipe, shape)(seq_len=seq_len).total
    return {
        "name": name,
        "hub_id": hub_id,
        "parameters": parameters(shape),
        "positions": shape.positions,
        "gated": hub_id.startswith(GATED),
        "planned": total,
        "fits": None if card is None else total <= HEADROOM * card,
    }


def parameters(shape: ModelShape) -> int:
    """Weights, biases and embeddings of a model."""
    q, kv = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    tables = 1 if shape.tie_word_embeddings else 2
    block = 2 * shape.hidden_size + (q + 2 * kv if shape.attention_bias else 0)
    return (
        sum(fan_in * fan_out for fan_in, fan_out in shape.linear_maps().values())
        + shape.num_hidden_layers * block
        + shape.hidden_size
        + tables * shape.vocab_size * shape.hidden_size
    )


def print_models(found: list[dict[str, Any]], recipe: Recipe, args: argparse.Namespace) -> None:
    rows = [("name", "on the Hub", "parameters", "positions", "planned", f"in {args.gpu_memory}")]
    for model in found:
        rows.append(
            (
                model["name"],
                model["hub_id"] + (" *" if model["gated"] else ""),
                f"{model['parameters'] / 1e9:.2f} B",
                f"{model['positions']:,}",
                f"{model['planned'] / 2**30:.1f} GiB",
                "fits" if model["fits"] else "does not fit",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, hub_id, *figures in rows:
        cells = [name.ljust(widths[0]), hub_id.ljust(widths[1])]
        cells += [text.rjust(width) for text, width in zip(figures, widths[2:], strict=True)]
        print("  ".join(cells[: None if args.gpu_memory else -1]))
    training = recipe.training
    rows_a_forward = "as many" if training.fit and args.gpu_memory else str(training.micro_batch_size)
    print(
        f"\nplanned: one step of recipe {args.recipe} on a GPU, with {rows_a_forward} rows of up to "
        f"{recipe.data.max_seq_len} tokens a forward{' as fit' if training.fit and args.gpu_memory else ''}; `qalora "
        "plan` has it by term."
        "\n*: gated; accept its licence on the Hub and set HF_TOKEN."
    )


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

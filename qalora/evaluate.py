"""`qalora evaluate`: loss, perplexity, exact match, choice accuracy and ROUGE-L of a model on a file, as
JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qalora.cli import Parser, make_callable
from qalora.errors import InputError
from qalora.flags import add, settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qalora.base.registry import ModelSource
    from qalora.data.tokenization import TokenizedDataset
    from qalora.recipe import Recipe


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora evaluate",
        description="Evaluates a base, with an adapter or without, or a merged model.",
        epilog="Any setting of a recipe's data and evaluation can follow, as key=value or --key value, e.g. "
        "data.columns={output: "
        "answer}.",
    )
    add(parser, "--model", required=True)
    add(parser, "--adapter", "--no-quantize")
    add(parser, "--dtype", otherwise="by device")
    add(parser, "--recipe", more="such as a run's recipe.yaml: its data and evaluation settings")
    add(parser, "--data", otherwise="the recipe's validation rows")
    add(parser, "--data-format", otherwise="found from the rows")
    add(parser, "--split", otherwise="the recipe's, validation")
    add(parser, "--max-seq-len", otherwise="the recipe's, else 2048")
    parser.add_argument("--rows", type=int, help="use the first N rows (default: all)")
    parser.add_argument("--metrics", help="any of loss,exact_match,accuracy,rougeL (default: loss)")
    parser.add_argument(
        "--choices",
        help="comma-separated completions that accuracy chooses from (default: those of the data)",
    )
    parser.add_argument("--answer-pattern", help="regular expression; its first group is what exact_match compares")
    add(parser, "--batch-size", otherwise="the recipe's, else 8")
    parser.add_argument("--max-new-tokens", type=int, help="length of the answers for exact_match and rougeL")
    parser.add_argument("--output", metavar="FILE", help="write the JSON there too")
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="write each row there, as a line of JSON: prompt, answer, reference and its own scores",
    )
    add(parser, "--quiet")
    return parser


def own_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Setting → what this command's own flags say of it; None: not given."""
    lists = {"evaluation.metrics": args.metrics, "evaluation.choices": args.choices}
    return {
        "data.train": args.data if args.recipe is None else None,
        "data.validation": args.data,
        "data.validation_split": args.split,
        "evaluation.rows": args.rows,
        "evaluation.batch_size": args.batch_size,
        "evaluation.max_new_tokens": args.max_new_tokens,
        "evaluation.answer_pattern": args.answer_pattern,
    } | {key: [part.strip() for part in value.split(",")] for key, value in lists.items() if value}


def main(argv: list[str]) -> int:
    args, rest = parser().parse_known_args(argv)

    from qalora.base.registry import resolve
    from qalora.cli import say
    from qalora.files import write_json, write_json_lines
    from qalora.progress import show
    from qalora.training.settling import settled

    recipe = recipe_of(args, rest)
    show(not args.quiet)
    source = resolve(recipe.model)
    recipe, notes = settled(recipe, source)
    for note in notes:
        say(note)
    result, predictions = evaluated(recipe, source, args.adapter, progress=not args.quiet)
    if args.output:
        write_json(args.output, result)
    if args.predictions:
        write_json_lines(args.predictions, predictions)
    print(json.dumps(result, indent=2))  # at the end, for its reader may have left
    return 0


def recipe_of(args: argparse.Namespace, rest: Sequence[str]) -> Recipe:
    """The recipe that the flags make, or the one that they change.

    Raises:
        InputError: no data, or a file that cannot be written or would replace one that is read.
    """
    from qalora.data.reading import paths_of
    from qalora.files import check_writable
    from qalora.recipe import asked_recipe, parse_overrides

    if args.recipe is None and args.data is None:
        raise InputError("--data is missing: pass a file or a Hub id, or a --recipe that has data.validation.")
    asked = [*settings(args, own_settings(args)), *parse_overrides(rest, ("data", "evaluation"))]
    recipe = asked_recipe(args.recipe, asked, "qalora evaluate")
    if recipe.data.validation is None:
        raise InputError(f"{args.recipe}: has no data.validation; pass --data FILE.")
    read = [*([args.recipe] if args.recipe else []), *paths_of(recipe.data.validation)]
    if args.output:
        check_writable(args.output, others=read)
    if args.predictions:
        check_writable(args.predictions, "--predictions", others=[*read, *([args.output] if args.output else [])])
    return recipe


def evaluated(
    recipe: Recipe, source: ModelSource, adapter: str | None, *, progress: bool
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(the figures, a record per row) of a base, with an adapter or without, as `data` and `evaluation` of the recipe
    say.

    Raises:
        InputError: an adapter that does not fit, rows that cannot be read, or a metric that they cannot answer.
    """
    from qalora.adapter.its_base import how_to_load
    from qalora.adapter.model import load_adapter
    from qalora.answers import prepare_tokenizer
    from qalora.base.loading import load_base, load_tokenizer
    from qalora.cli import say
    from qalora.kernels.install import install
    from qalora.metrics import predict

    evaluation, quantization = recipe.evaluation, recipe.quantization
    loading, notes = how_to_load(source, adapter, quantization.loading(), quantization.given())
    for note in notes:
        say(note)
    tokenizer = load_tokenizer(source)
    taught = prepare_tokenizer(tokenizer, adapter)
    dataset = rows_of(recipe, source, tokenizer)
    model = load_base(source, tokenizer=tokenizer, **loading).model
    install(model)
    return predict(
        load_adapter(model, adapter) if adapter else model,
        tokenizer,
        dataset,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        taught=taught,
        progress=progress,
        **evaluation.asking(),
    )


def rows_of(recipe: Recipe, source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> TokenizedDataset:
    """The validation rows, of which each leaves an answer room; says what they are and what was left out.

    Raises:
        InputError: they cannot be read, or cannot answer a metric.
    """
    from qalora.base.registry import shape_of
    from qalora.cli import say
    from qalora.data.tokenization import load_dataset
    from qalora.metrics import check, several_references, with_room

    data, evaluation = recipe.data, recipe.evaluation
    where = data.validation or data.train
    dataset = load_dataset(where, tokenizer, split=data.validation_split, limit=evaluation.rows, **data.reading())
    say(str(dataset.report))
    if said := several_references(dataset):
        say(said)
    dataset, line = with_room(
        dataset,
        tokenizer,
        shape_of(source).positions,
        metrics=evaluation.metrics,
        max_new_tokens=evaluation.max_new_tokens,
        options=check(dataset, **evaluation.asking()),
    )
    if line:
        say(line)
    return dataset


make_callable(__name__)
if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

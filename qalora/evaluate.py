"""`qalora evaluate`: loss, perplexity, exact match, choice accuracy and ROUGE-L of a model on a file, as
JSON."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from qalora.cli import Parser, make_callable
from qalora.flags import add


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


def settings(args: argparse.Namespace) -> list[tuple[str, Any]]:
    """The flags that were given, as settings of a recipe."""
    split_list = {"evaluation.metrics": args.metrics, "evaluation.choices": args.choices}
    given = {
        "model": args.model,
        "data.validation": args.data,
        "data.validation_split": args.split,
        "data.format": args.data_format,
        "data.max_seq_len": args.max_seq_len,
        "evaluation.rows": args.rows,
        "evaluation.batch_size": args.batch_size,
        "evaluation.max_new_tokens": args.max_new_tokens,
        "evaluation.answer_pattern": args.answer_pattern,
        "quantization.load_in_4bit": False if args.no_quantize else None,
        "quantization.bnb_4bit_compute_dtype": args.dtype,
    } | {key: [part.strip() for part in value.split(",")] for key, value in split_list.items() if value}
    if args.recipe is None:
        given["data.train"] = args.data
    return [(key, value) for key, value in given.items() if value is not None]


def main(argv: list[str]) -> int:
    args, rest = parser().parse_known_args(argv)

    from qalora.data.reading import paths_of
    from qalora.errors import InputError
    from qalora.files import check_writable, write_json, write_json_lines
    from qalora.plan import keep_to_positions, keep_to_stored
    from qalora.recipe import check_once, load_recipe, make_recipe, parse_overrides

    if args.recipe is None and args.data is None:
        raise InputError("--data is missing: pass a file or a Hub id, or a --recipe that has data.validation.")
    asked = [*settings(args), *parse_overrides(rest, ("data", "evaluation"))]
    check_once(asked)
    recipe = load_recipe(args.recipe, asked) if args.recipe else make_recipe(asked, origin="qalora evaluate")
    if recipe.data.validation is None:
        raise InputError(f"{args.recipe}: has no data.validation; pass --data FILE.")
    read = [*([args.recipe] if args.recipe else []), *paths_of(recipe.data.validation)]
    if args.output:
        check_writable(args.output, others=read)
    if args.predictions:
        check_writable(args.predictions, "--predictions", others=[*read, *([args.output] if args.output else [])])

    from qalora.adapter.its_base import loading_as_trained, said_of_base
    from qalora.adapter.model import load_adapter
    from qalora.adapter.saved import check_adapter
    from qalora.answers import prepare_tokenizer
    from qalora.base.loading import load_base, load_tokenizer
    from qalora.base.precision import loaded_in_4bit
    from qalora.base.registry import resolve, shape_of
    from qalora.cli import say
    from qalora.data.tokenization import load_dataset
    from qalora.kernels.install import install
    from qalora.metrics import check, predict, several_references, with_room
    from qalora.progress import show

    show(not args.quiet)
    source = resolve(recipe.model)
    notes = [keep_to_positions(recipe), keep_to_stored(recipe)]
    loading = recipe.quantization.loading()
    if args.adapter:
        check_adapter(args.adapter, source)
        notes.append(said_of_base(args.adapter, source))
        loading, note = loading_as_trained(args.adapter, source, loading, recipe.quantization.given())
        notes.append(note)
    for note in filter(None, notes):
        say(note)
    tokenizer = load_tokenizer(source)
    taught = prepare_tokenizer(tokenizer, args.adapter)
    evaluation = recipe.evaluation
    dataset = load_dataset(
        recipe.data.validation,
        tokenizer,
        split=recipe.data.validation_split,
        limit=evaluation.rows,
        **recipe.data.reading(),
    )
    print(dataset.report, file=sys.stderr)
    if said := several_references(dataset):
        print(said, file=sys.stderr)
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

    in_4bit, told = loaded_in_4bit(source, loading["load_in_4bit"], trained_on=args.adapter is not None)
    loading["load_in_4bit"] = in_4bit
    if told:
        say(told)
    model = load_base(source, tokenizer=tokenizer, **loading).model
    install(model)
    result, predictions = predict(
        load_adapter(model, args.adapter) if args.adapter else model,
        tokenizer,
        dataset,
        batch_size=evaluation.batch_size,
        max_new_tokens=evaluation.max_new_tokens,
        taught=taught,
        progress=not args.quiet,
        **evaluation.asking(),
    )
    if args.output:
        write_json(args.output, result)
    if args.predictions:
        write_json_lines(args.predictions, predictions)
    print(json.dumps(result, indent=2))  # at the end, for its reader may have left
    return 0


make_callable(__name__)
if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

"""`qalora compress`: any plain PEFT LoRA in, a smaller plain PEFT LoRA out that costs no more than is asked for."""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora.adapter.compression import MOST_ROWS, ROWS
from qalora.cli import Parser, say
from qalora.errors import InputError
from qalora.flags import add, settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from qalora.adapter.compression import Size
    from qalora.adapter.saved import SavedAdapter
    from qalora.adapter.search import Asked
    from qalora.base.registry import ModelSource
    from qalora.data.rows import Row
    from qalora.recipe import Recipe

SIZES = ("keep", "parameters", "max_rank")
ASKED = (*SIZES, "tolerance", "uniform", "no_data", "basis", "refit", "refit_steps", "rows", "split")
OF_ROWS = ("data", "refit", "refit_steps", "basis", "data_format", "split", "rows", "max_seq_len")


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora compress",
        description="Makes an adapter smaller: its ranks go into their principal basis, and those that matter stay. "
        "Without a size it takes the smallest whose loss is not above the whole adapter's.",
        epilog="Any setting of a recipe's data can follow, as key=value or --key value, e.g. data.columns={output: "
        "answer}.",
    )
    add(parser, "--model", required=True, more="that the adapter was trained on")
    add(parser, "--adapter", required=True)
    add(
        parser,
        "--data",
        more="rows that it was not trained on: some order the ranks, the others judge",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new, empty, or a previous cut of the same")
    add(parser, "--overwrite")
    size = parser.add_argument_group("size (default: the smallest that costs nothing)")
    size.add_argument("--keep", metavar="SHARE", help="of the adapter's ranks, such as 25%% or 0.25")
    size.add_argument("--parameters", type=int, metavar="N", help="parameters that it may have")
    size.add_argument("--max-rank", type=int, metavar="K", help="of every module")
    size.add_argument(
        "--tolerance", type=float, metavar="NATS", help="what the smallest may cost, per token (default: 0)"
    )
    size.add_argument("--uniform", action="store_true", help="one rank for all modules, for servers that know one")
    parser.add_argument(
        "--no-data", action="store_true", help="by singular values alone; needs a size, and nobody knows what it costs"
    )
    parser.add_argument(
        "--basis",
        choices=("svd", "svd-act"),
        help="principal for the weights, or for the outputs on the rows (default: svd); ranks as training left them "
        "are tried as well",
    )
    refit = parser.add_argument_group("what stays is trained on, where the rows that judge are the better for it")
    refit.add_argument("--refit", action="store_true", help="in two passes over the rows that order")
    refit.add_argument("--refit-steps", type=int, metavar="N", help="in N steps of 8 or more of those rows")
    add(parser, "--data-format", otherwise="found from the rows")
    add(parser, "--recipe", more="such as a run's recipe.yaml: its columns, templates and labels read the rows")
    add(parser, "--split", default="validation")
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help=f"rows of the data to read (default: {ROWS}, and up to {MOST_ROWS:,} where their answers are short)",
    )
    add(parser, "--max-seq-len", otherwise="the recipe's, else 2048")
    add(parser, "--batch-size", default=8)
    add(parser, "--no-quantize")
    add(parser, "--dtype", otherwise="by device")
    add(parser, "--quiet")
    return parser


def main(argv: list[str]) -> int:
    args, rest = parser().parse_known_args(argv)
    args.adapter, args.output = (str(Path(path).expanduser()) for path in (args.adapter, args.output))
    check_flags(args)

    from qalora.base.registry import resolve
    from qalora.deploy.output import one_at_a_time
    from qalora.progress import show
    from qalora.recipe import asked_recipe, parse_overrides

    of_rows = parse_overrides(rest, ("data",))
    if args.no_data and of_rows:
        raise InputError(f"{rest[0]}: says how rows are read, and --no-data reads none; leave it out.")
    given = [*settings(args, {"data.train": args.data or "none"}), *of_rows]
    recipe = asked_recipe(args.recipe, given, "qalora compress")
    show(not args.quiet)
    report = one_at_a_time(compressed)(recipe, resolve(recipe.model), args, output_dir=args.output)

    from qalora.results.compression import in_sentences

    for line in in_sentences(report):
        print(line)
    print(f"{args.output}: a plain PEFT LoRA, which PEFT reads as it was measured ({report['seconds']:.0f} s)")
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """
    Raises:
        InputError: flags that are out of range, or exclude each other.
    """
    given = [f"--{name.replace('_', '-')}" for name in SIZES if getattr(args, name) is not None]
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]}: both say a size; keep one.")
    if given and args.tolerance is not None:
        raise InputError(f"--tolerance: of the smallest size, and {given[0]} says one; leave one of them out.")
    for name in ("parameters", "max_rank", "rows", "batch_size", "refit_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: takes a number of at least 1.")
    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        raise InputError(f"--tolerance {args.tolerance}: takes a number of nats, 0 or more.")
    if args.keep is not None:
        share(args.keep)
    if args.no_data:
        if not given:
            raise InputError(
                "--no-data: no row says what costs nothing; give a size: --keep, --parameters or --max-rank."
            )
        defaults = parser()
        for name in (name for name in OF_ROWS if getattr(args, name) != defaults.get_default(name)):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: goes with rows, and --no-data reads none; leave one of them out.")
    elif args.data is None:
        raise InputError("--data is missing: pass rows like those that the adapter was trained for, or --no-data.")
    if args.rows is not None and args.rows < 2:
        raise InputError(f"--rows {args.rows}: some rows order the ranks and others judge, so at least 2 are needed.")


def share(text: str) -> float:
    """25%, 25 % or 0.25 as 0.25.

    Raises:
        InputError: no share above 0, up to 1.
    """
    bare = text.strip()
    try:
        value = float(bare.removesuffix("%")) / 100 if bare.endswith("%") else float(bare)
    except ValueError:
        value = math.nan
    if bare == "1":
        raise InputError("--keep 1: is that 1 per cent, or all? Write 1% or 100%.")
    if not 0 < value <= 1:
        hint = f"; {bare}% is {bare} per cent" if value > 1 and not bare.endswith("%") else ""
        raise InputError(f"--keep {text}: takes a share of the ranks above 0, up to 100%, such as 25% or 0.25{hint}.")
    return value


def check_place(args: argparse.Namespace, source: ModelSource) -> None:
    """
    Raises:
        InputError: an output folder whose content is not ours to replace, or that holds what is read.
    """
    from qalora.data.reading import paths_of
    from qalora.deploy.output import check_output
    from qalora.files import holds
    from qalora.results.compression import COMPRESSION

    output = Path(args.output)
    check_output(
        output,
        model=source.name,
        adapter=Path(args.adapter),
        overwrite=args.overwrite,
        report=COMPRESSION,
        what="compression",
    )
    for path in paths_of(args.data) if args.data else ():
        if holds(output, Path(path)):
            raise InputError(f"{output}: holds {path}, which is read; choose another output folder.")


def asked_of(args: argparse.Namespace, adapter: SavedAdapter) -> Asked:
    """What the flags ask for, of this adapter.

    Raises:
        InputError: an adapter that adds nothing, or a size without room for a rank.
    """
    from qalora.adapter.search import BASIS, Asked

    costs = {name: A.shape[1] + B.shape[0] for name, (A, B) in adapter.pairs.items() if A.any() and B.any()}
    if not costs:
        raise InputError(f"{adapter.path}: the adapter is untrained (every B A is zero), so there is nothing to keep.")
    size = asked_size(args, adapter.total_rank, costs)
    return Asked(
        size,
        args.tolerance or 0.0,
        args.uniform,
        args.basis or BASIS,
        refit=args.refit or args.refit_steps is not None,
        refit_steps=args.refit_steps,
    )


def asked_size(args: argparse.Namespace, total: int, costs: Mapping[str, int]) -> Size | None:
    """The size that the flags ask for; None: the smallest that costs nothing.

    Args:
        total: ranks of the adapter.
        costs: module → parameters of one of its ranks.

    Raises:
        InputError: there is no room for a rank in it.
    """
    from qalora.adapter.compression import Size, equal_ranks

    given = next((f"--{name.replace('_', '-')} {getattr(args, name)}" for name in SIZES if getattr(args, name)), None)
    if given is None:
        return None
    ranks = None if args.keep is None else math.floor(share(args.keep) * total + 1e-9)
    size, least = Size(ranks, args.parameters, args.max_rank), min(costs.values())
    if args.uniform:
        one, least = equal_ranks(size, costs), sum(costs.values())
        if one:
            return Size(max_rank=one)
        raise InputError(
            f"{given}: with --uniform the least is a rank in each of {len(costs)} modules, {least:,} parameters; ask "
            "for more, or leave --uniform out."
        )
    if size.ranks == 0 or (size.parameters or least) < least:
        raise InputError(
            f"{given}: leaves none of the adapter's {total:,} ranks, of which the smallest has {least:,} parameters; "
            "ask for more."
        )
    return size


def compressed(recipe: Recipe, source: ModelSource, args: argparse.Namespace, *, output_dir: str) -> dict[str, Any]:
    """Cuts, corrects, verifies and writes an adapter; returns what its compress.json says.

    Raises:
        InputError: an adapter that does not fit, rows that cannot be read, or no room for a rank.
        AnswerNo: a score or a loss is not finite.
        RuntimeError: vanilla PEFT reads another function than the one that was measured.
    """
    from qalora.adapter.its_base import how_to_load, refuse_other_base
    from qalora.adapter.model import load_adapter
    from qalora.adapter.saved import check_adapter
    from qalora.base.loading import load_base, load_tokenizer
    from qalora.data.batching import Collator, micro_batches, on_device
    from qalora.deploy.compressed import Rows, cut_model, dtype_of, store
    from qalora.kernels.activations import set_checkpointing
    from qalora.training.settling import settled

    started = time.perf_counter()
    check_place(args, source)
    recipe, notes = settled(recipe, source)
    adapter = check_adapter(args.adapter, source)
    asked = asked_of(args, adapter)
    refuse_other_base(args.adapter, source)
    loading, more = how_to_load(source, args.adapter, recipe.quantization.loading(), recipe.quantization.given())
    for note in (*notes, *more):
        say(note)
    tokenizer = load_tokenizer(source)
    parts = () if args.no_data else rows_of(recipe, args, tokenizer)
    base = load_base(source, tokenizer=tokenizer, **loading)
    set_checkpointing(base.model, True)
    model = load_adapter(base.model, adapter.path, trainable=True)
    collate = Collator(tokenizer.pad_token_id)
    batches = [on_device(micro_batches(rows, args.batch_size, collate), base.model.device) for rows in parts]
    rows = Rows(batches[0], batches[1]) if batches else None
    report = cut_model(model, asked, rows, dtype=dtype_of(adapter))
    report = {
        "model": source.name,
        "adapter": str(adapter.path.resolve()),
        "data": args.data,
        "asked": {name: getattr(args, name) for name in ASKED if getattr(args, name)},
        "base": {"in_4bit": base.quantized, "computed_in": str(base.compute_dtype).removeprefix("torch.")},
        **report,
    }
    return store(model, report, Path(output_dir), adapter, tokenizer, base.compute_dtype, started)


def rows_of(
    recipe: Recipe, args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row], list[Row]]:
    """(rows that order the ranks, other rows that judge); says what was read.

    Raises:
        InputError: they cannot be read, or are fewer than two.
    """
    from qalora.adapter.compression import enough_rows, scoring_rows
    from qalora.data.rows import supervised_tokens
    from qalora.data.tokenization import load_dataset

    data = load_dataset(args.data, tokenizer, split=args.split, limit=args.rows or MOST_ROWS, **recipe.data.reading())
    if len(data) < 2:
        raise InputError(f"{args.data}: {len(data)} row is left; some order the ranks and others judge: pass more.")
    tokens = [supervised_tokens([item["labels"]]) for item in data.items]
    scoring, judging = scoring_rows(tokens if args.rows else tokens[: enough_rows(tokens)])
    say(f"{data.report}; {len(scoring)} of them order the ranks, {len(judging)} judge")
    return [data.items[i] for i in scoring], [data.items[i] for i in judging]


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

"""`qalora preview`: the rows as they are trained on, with what is learned marked. Needs the tokenizer alone."""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qalora.cli import Parser, say
from qalora.data.rows import Row, Tokenized
from qalora.errors import InputError
from qalora.flags import add

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qalora.data.tokenization import TokenizedDataset
    from qalora.recipe import Recipe

MARKS = "⟦", "⟧"
ASCII_MARKS = "[[", "]]"
LEARNED = "\x1b[1;32m", "\x1b[0m"  # bold green


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora preview",
        description="Prints rows as a run trains on them. What is learned is green on a terminal, and in ⟦ ⟧ "
        "elsewhere.",
        epilog="Any setting of a recipe's data can follow, as key=value or --key value, e.g. "
        "data.train_on_inputs=true.",
    )
    add(parser, "--model", otherwise="the recipe's")
    add(parser, "--recipe", more="such as a run's recipe.yaml: its data settings")
    add(parser, "--data", otherwise="the recipe's")
    add(parser, "--data-format", otherwise="found from the rows")
    add(parser, "--split", otherwise="the recipe's, train")
    add(parser, "--max-seq-len", otherwise="the recipe's, else 2048")
    parser.add_argument("--rows", type=int, default=3, help="rows that are printed (default: %(default)s)")
    add(parser, "--json", more="print all of it as JSON")
    return parser


def main(argv: list[str]) -> int:
    from qalora.base.loading import load_tokenizer
    from qalora.base.registry import resolve
    from qalora.data.tokenization import load_dataset
    from qalora.training.settling import within_positions

    args, rest = parser().parse_known_args(argv)
    if args.rows < 0:
        raise InputError(f"--rows {args.rows}: must be 0 or more.")
    recipe = recipe_of(args, rest)
    source = resolve(recipe.model)
    recipe, notes = within_positions(recipe, source)
    for note in notes:
        say(note)
    tokenizer, data = load_tokenizer(source), recipe.data
    dataset = load_dataset(data.train, tokenizer, split=data.split, limit=data.max_rows, **data.reading())
    shown = [preview_of(item, tokenizer) for item in dataset.items[: args.rows]]
    if args.json:
        # Escaped, so that any encoding of standard output holds it.
        print(json.dumps({"rows": shown, "data": summary(dataset)}, indent=2))
    else:
        print_rows(shown, data.max_seq_len)
        write("── " + described(summary(dataset), data.max_seq_len))
    return 0


def recipe_of(args: argparse.Namespace, rest: Sequence[str]) -> Recipe:
    """The recipe that the flags make, or the one that they change."""
    from qalora.recipe import check_once, load_recipe, make_recipe, parse_overrides

    flags = {
        "model": args.model,
        "data.train": args.data,
        "data.split": args.split,
        "data.format": args.data_format,
        "data.max_seq_len": args.max_seq_len,
    }
    asked = [(key, value) for key, value in flags.items() if value is not None]
    asked += parse_overrides(rest, ("data",))
    check_once(asked)
    return load_recipe(args.recipe, asked) if args.recipe else make_recipe(asked, origin="qalora preview")


def print_rows(shown: Sequence[Mapping[str, Any]], max_seq_len: int) -> None:
    """Each row's text under a line that says how much of it there is."""
    from rich.console import Console

    console = Console()
    color = console.is_terminal and not console.no_color
    for row in shown:
        cut = f", cut at data.max_seq_len={max_seq_len}" if row["cut"] else ""
        write(f"── row {row['row']}: {row['tokens']} tokens, {row['share_learned']:.0%} learned{cut}\n")
        write(marked(row, LEARNED if color else marks(sys.stdout.encoding)) + "\n")


def preview_of(item: Tokenized, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """What there is to say of a tokenized row: row, tokens, share_learned, cut, and its text in segments."""
    segments = [{"text": text, "learned": learned} for text, learned in decoded(item, tokenizer)]
    return {
        "row": item["row"],
        "tokens": len(item["input_ids"]),
        "share_learned": learned_tokens(item) / len(item["input_ids"]),
        "cut": item["truncated"],
        "segments": segments,
    }


def learned_tokens(item: Row) -> int:
    """Tokens that carry loss."""
    return sum(label >= 0 for label in item["labels"])


def decoded(item: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """(text, learned) of the stretches of tokens, as the tokens say it, the special ones too.

    A stretch's text is what it adds to the text before it: by itself a tokenizer may drop the blank that it begins
    with.
    """
    ids, end, before = list(item["input_ids"]), 0, ""
    for learned, labels in groupby(item["labels"], lambda label: label >= 0):
        end += len(list(labels))
        text = str(tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        yield text[len(before) :], learned
        before = text


def summary(dataset: TokenizedDataset) -> dict[str, object]:
    """The report of the data set, with the share that is learned."""
    report = asdict(dataset.report)
    return {**report, "share_learned": dataset.report.supervised_tokens / dataset.report.tokens}


def described(data: Mapping[str, Any], max_seq_len: int) -> str:
    """The summary in lines."""
    from qalora.data.tokenization import CHAT_BY_DEFAULT

    lines = [
        f"{data['rows']} rows, {data['tokens']} tokens, {data['share_learned']:.0%} learned; longest row "
        f"{data['longest']} tokens",
        f"cut: {data['truncated']} rows, at data.max_seq_len={max_seq_len}",
        f"dropped: {data['dropped']} rows",
    ]
    if cut := data["dropped"] - data["masked"]:
        lines[-1] += f"; nothing to learn was left of {cut} after the cut"
    if data["masked"]:
        lines[-1] += f"; no turn of {data['masked']} is learned"
    if data["chat_by_default"]:
        lines.append(CHAT_BY_DEFAULT)
    return "\n".join([*lines, f"not used: {', '.join(data['unused']) or 'nothing'}"]) + "\n"


def marked(row: Mapping[str, Any], marks: tuple[str, str]) -> str:
    """The text of a row with marks around what is learned."""
    texts = [(printable(segment["text"]), segment["learned"]) for segment in row["segments"]]
    return "".join(f"{marks[0]}{text}{marks[1]}" if learned else text for text, learned in texts)


def printable(text: str) -> str:
    """The text with control characters, by which a row could command a terminal, spelled out."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def marks(encoding: str | None) -> tuple[str, str]:
    """⟦ ⟧ where standard output can hold them."""
    try:
        "".join(MARKS).encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return ASCII_MARKS
    return MARKS


def write(text: str) -> None:
    """To standard output, with what its encoding lacks spelled out."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

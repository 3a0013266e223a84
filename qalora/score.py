"""`qalora score`: the AB-LoRA importance of every rank of an adapter, as JSON. Works on any plain PEFT LoRA."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qalora.cli import Parser
from qalora.errors import InputError
from qalora.flags import add, settings

if TYPE_CHECKING:
    from qalora.adapter.principal import Basis
    from qalora.adapter.scores import Importance, RankScores
    from qalora.base.registry import ModelSource
    from qalora.recipe import Recipe


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="qalora score",
        description="Scores every rank of an adapter by ablation (AB-LoRA, arXiv 2403.16187, eq. 6) and says which it "
        "would prune.",
        epilog="Any setting of a recipe's data can follow, as key=value or --key value, e.g. data.columns={output: "
        "answer}.",
    )
    add(parser, "--model", "--adapter", "--data", required=True)
    add(parser, "--data-format", otherwise="found from the rows")
    add(parser, "--recipe", more="such as a run's recipe.yaml: its columns, templates and labels read the rows")
    parser.add_argument(
        "--method",
        choices=("exact", "first-order", "certified", "path"),
        default="certified",
        help="exact: every rank ablated; first-order: all ranks from two backward passes; certified: exact where first "
        "order leaves a doubt about --prune, given how far it errs on ranks drawn at random; path: shares of what the "
        "adapter achieved (default: %(default)s)",
    )
    parser.add_argument(
        "--importance",
        choices=("sum", "drop", "alone"),
        help="what decides, for any method but path (default: sum, eq. 6)",
    )
    parser.add_argument(
        "--basis",
        choices=("trained", "svd", "svd-act"),
        default="trained",
        help="which ranks: trained: those that training left; svd: of the principal basis, in which ranks can leave at "
        "little cost; svd-act: the same, principal for the outputs on the rows that score (default: %(default)s)",
    )
    parser.add_argument(
        "--prune", type=int, metavar="N", help="ranks to name as least important (default: one a module)"
    )
    add(parser, "--split", default="validation")
    parser.add_argument("--rows", type=int, default=32, help="rows of the data that score (default: %(default)s)")
    add(parser, "--max-seq-len", otherwise="the recipe's, else 2048")
    add(parser, "--batch-size", default=8)
    add(parser, "--no-quantize")
    add(parser, "--dtype", otherwise="by device")
    parser.add_argument("--output", required=True, metavar="FILE", help="where the JSON goes")
    return parser


def main(argv: list[str]) -> int:
    args, rest = parser().parse_known_args(argv)

    from qalora.base.registry import resolve
    from qalora.cli import say
    from qalora.files import check_writable, write_json
    from qalora.recipe import asked_recipe, parse_overrides
    from qalora.training.settling import settled

    asked = [*settings(args, {"data.train": args.data}), *parse_overrides(rest, ("data",))]
    recipe = asked_recipe(args.recipe, asked, "qalora score")
    source = resolve(recipe.model)
    if args.rows < 1 or args.batch_size < 1 or (args.prune is not None and args.prune < 1):
        raise InputError("--rows, --batch-size and --prune must be at least 1.")
    if args.method == "path" and args.importance:
        raise InputError(f"--importance {args.importance}: --method path has a measure of its own; leave it out.")
    check_writable(args.output)
    recipe, notes = settled(recipe, source)
    for note in notes:
        say(note)
    result = scored(recipe, source, args)
    write_json(args.output, result, indent=1)
    ranks = f"{len(result['scores'])} ranks" + ("" if args.basis == "trained" else f" of the basis {args.basis}")
    print(f"{args.output}: {ranks} on {result['rows']} rows, {result['seconds']:.1f} s; {_summary(result)}")
    return 0


def scored(recipe: Recipe, source: ModelSource, args: argparse.Namespace) -> dict[str, Any]:
    """What the JSON holds: the scores of an adapter's ranks on some rows, and which are least important.

    Raises:
        InputError: an adapter that does not fit, rows that cannot be read, or --prune of every rank.
    """
    from qalora.adapter.its_base import how_to_load
    from qalora.adapter.model import load_adapter, ranks
    from qalora.adapter.principal import into_basis
    from qalora.adapter.saved import check_adapter
    from qalora.adapter.scoring import score_ranks
    from qalora.base.device import memory_to_score
    from qalora.base.loading import load_base, load_tokenizer
    from qalora.cli import say
    from qalora.data.batching import Collator, micro_batches, on_device
    from qalora.data.tokenization import load_dataset
    from qalora.kernels.activations import set_checkpointing

    check_prune(args.prune, check_adapter(args.adapter, source).total_rank)
    quantization = recipe.quantization
    loading, notes = how_to_load(source, args.adapter, quantization.loading(), quantization.given())
    for note in notes:
        say(note)
    tokenizer = load_tokenizer(source)
    data = load_dataset(args.data, tokenizer, split=args.split, limit=args.rows, **recipe.data.reading())
    base = load_base(source, tokenizer=tokenizer, **loading)
    model = load_adapter(base.model, args.adapter, trainable=True)
    set_checkpointing(base.model, True)
    batch = on_device(micro_batches(data.items, args.batch_size, Collator(tokenizer.pad_token_id)), base.model.device)
    importance: Importance = "path" if args.method == "path" else args.importance or "sum"
    start = time.perf_counter()
    if args.basis != "trained":
        into_basis(model, args.basis, batch)
        check_prune(args.prune, sum(ranks(model).values()), f" in the basis {args.basis}")
    prune = args.prune or len(ranks(model))
    scores = score_ranks(model, batch, args.method, importance=importance, prune=prune, memory=memory_to_score())
    return as_json(scores, args.basis, prune, time.perf_counter() - start)


def check_prune(prune: int | None, of_ranks: int, where: str = "") -> None:
    """
    Raises:
        InputError: every rank is to go.
    """
    if prune and prune >= of_ranks:
        raise InputError(f"--prune {prune}: the adapter has {of_ranks} ranks{where}; name fewer.")


def as_json(scores: RankScores, basis: Basis, prune: int, seconds: float) -> dict[str, Any]:
    """
    Args:
        basis: that the ranks are of.
        prune: ranks to name as least important.
        seconds: that the scoring took.
    """
    from qalora.adapter.allocation import least_important

    stderr = scores.stderr
    pruned = least_important(scores.importance, prune)
    result: dict[str, Any] = {
        "method": scores.method,
        "basis": basis,
        "rows": scores.rows,
        "supervised_tokens": scores.supervised_tokens,
        "loss": scores.loss,
        "base_loss": scores.base_loss,
        "seconds": seconds,
        "forward_equivalents": scores.forward_equivalents,
        "certified": scores.certified,
        "exact_evaluations": scores.exact_evaluations,
        "residual": None if scores.residual is None else asdict(scores.residual),
        "prune": prune,
        "pruned": [[name, rank] for name, indices in pruned.items() for rank in indices],
        "scores": [
            {
                "module": name,
                "rank": rank,
                "drop": scores.drop[name][rank],
                "alone": scores.alone[name][rank],
                "importance": scores.importance[name][rank],
                "stderr": None if stderr is None else stderr[name][rank],
                "exact": scores.exact[name][rank],
            }
            for name in scores.importance
            for rank in range(len(scores.importance[name]))
        ],
    }
    if scores.method == "path":
        achieved, total = scores.base_loss - scores.loss, sum(score["importance"] for score in result["scores"])
        result["quadrature_error"] = abs(total / achieved - 1) if achieved else None
    return result


def _summary(result: dict[str, Any]) -> str:
    text = (
        f"loss {result['loss']:.4f}, of the base {result['base_loss']:.4f}; {result['forward_equivalents']:.0f} "
        "forwards"
    )
    residual = result["residual"]
    if residual is not None:
        text += (
            f", {result['exact_evaluations']} ranks ablated in {residual['dtype']}; first order errs by "
            f"{residual['std']:.1e} on {residual['drawn']} drawn at random (largest {residual['largest']:.1e}), "
            f"rounding by {residual['noise']:.1e}; the {result['prune']} to prune are {_certainty(result)}"
        )
    if result.get("quadrature_error") is not None:
        text += f"; the shares add up to what the adapter achieved within {result['quadrature_error']:.2%}"
    return text


def _certainty(result: dict[str, Any]) -> str:
    residual = result["residual"]
    if not result["certified"]:
        return "not settled: the budget was spent"
    if residual["missed"] == 0:
        return "settled: every rank was ablated"
    ties = f", but for {residual['tied']} that rounding alone could exchange" if residual["tied"] else ""
    return (
        f"settled{ties}, given the residuals seen (with 95 % confidence, at most {residual['missed']:.0%} of the ranks "
        "that were not ablated err by more than the band that is left to them)"
    )


if __name__ == "__main__":
    from qalora.cli import run

    sys.exit(run(main))

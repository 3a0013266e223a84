"""`qalora finetune`: the main job. Rows and a frozen 4-bit base in, a plain PEFT LoRA with ranks where they pay out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qalora import cli
from qalora.environment import check_one_process, leave_to_the_recipe
from qalora.errors import AnswerNo, InputError
from qalora.files import check_folder, disk_is_full, unwritable, write_json, write_json_lines, write_whole
from qalora.locking import locked
from qalora.training.checkpoints import find_checkpoint
from qalora.training.identity import Identity, Rows, row_digests, rows_of
from qalora.training.resume import Continued, changes, check_base, check_rows, check_settings, kept_apart, rounds_left
from qalora.training.run_folder import begin_folder, check_output_dir, is_finished, is_run, lock_of, run_name

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from qalora.adapter.allocation import Schedule
    from qalora.adapter.provenance import Provenance
    from qalora.base.checkpoint import Weights
    from qalora.base.loading import LoadedBase
    from qalora.base.registry import ModelSource
    from qalora.data.tokenization import TokenizedDataset
    from qalora.recipe import Recipe


def parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="qalora finetune",
        description="Trains ALoRA adapters on a frozen 4-bit base.",
        epilog="Any setting of the recipe can follow, as key=value or --key value, e.g. training.max_steps=200; "
        "`qalora recipes show NAME` prints a recipe.",
    )
    parser.add_argument("--model", help="registry name (llama-7b, smollm2-135m …), Hub id, folder or .gguf file")
    parser.add_argument("--recipe", required=True, help="name of a shipped recipe, or path of a YAML file")
    parser.add_argument("--profile", help="settings for a kind of machine, over the recipe's: 24gb, t4, cpu")
    parser.add_argument("--output-dir", metavar="DIR", help="default: outputs/RECIPE-MODEL")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the output folder holds")
    parser.add_argument(
        "--resume-from-checkpoint", metavar="PATH|auto", help="continue exactly; auto: the newest checkpoint"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and the memory plan, and exit"
    )
    parser.add_argument(
        "--push-to-hub",
        "--push_to_hub",
        metavar="REPO",
        help="push the adapter to this repository (OWNER/NAME) at the end",
    )
    parser.add_argument("--no-quantize", action="store_true", help="16- or 32-bit base")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="compute dtype")
    return parser


def main(argv: list[str]) -> int:
    from qalora.plan import settle_adapter
    from qalora.recipe import load_recipe, parse_overrides, recipe_path

    args, rest = parser().parse_known_args(argv)
    flags = {
        "model": args.model,
        "output_dir": args.output_dir,
        "hub_model_id": args.push_to_hub,
        "push_to_hub": True if args.push_to_hub else None,
        "quantization.load_in_4bit": False if args.no_quantize else None,
        "quantization.bnb_4bit_compute_dtype": args.dtype,
    }
    overrides = [(key, value) for key, value in flags.items() if value is not None]
    recipe = load_recipe(args.recipe, [*overrides, *parse_overrides(rest)], args.profile)
    if recipe.output_dir is None:
        recipe.output_dir = f"outputs/{run_name(args.recipe, recipe.model)}"
    if args.dry_run:
        settle(recipe)
        settle_adapter(recipe)
        dry_run(recipe)
        return cli.DONE
    return run_recipe(
        recipe,
        [recipe_path(args.recipe)],
        overwrite=args.overwrite,
        resume_from_checkpoint=args.resume_from_checkpoint,
        command=argv,
    )


def run_recipe(
    recipe: Recipe,
    reads: Sequence[Path] = (),
    *,
    overwrite: bool = False,
    resume_from_checkpoint: str | None = None,
    command: Sequence[str] | None = None,
) -> int:
    """Runs a recipe that says where its files go, and returns the exit code: done, or interrupted.

    Args:
        reads: files that the run must not replace, besides those that the recipe names.
        overwrite, resume_from_checkpoint: see `parser`.
        command: the words that were typed.
    """
    from qalora.base.loading import load_tokenizer
    from qalora.data.reading import paths_of
    from qalora.plan import settle_adapter
    from qalora.results.hub import check_access

    source = settle(recipe)
    if repo := recipe.repository():
        check_access(repo)
    output_dir = Path(str(recipe.output_dir)).expanduser()
    check_folder(output_dir, f"output_dir={output_dir}", replaced=False)
    with locked(lock_of(output_dir), f"output_dir={output_dir}", say=cli.say):
        checkpoint = find_checkpoint(output_dir, resume_from_checkpoint, anew=overwrite, say=cli.say)
        # `auto` is for loops that start a command again: an attempt that was killed before its first checkpoint is no result.
        restarts = resume_from_checkpoint == "auto" and is_run(output_dir) and not is_finished(output_dir)
        folders = [Path(name).expanduser() for name in (recipe.model, recipe.lora.adapter) if name]
        data_files = [*paths_of(recipe.data.train), *paths_of(recipe.data.validation)]
        check_output_dir(
            output_dir, [*reads, *folders, *data_files], checkpoint=checkpoint, overwrite=overwrite or restarts
        )
        continued = None if checkpoint is None else Continued.at(checkpoint)
        if continued is not None:
            as_it_began(recipe, continued)
        else:
            settle_adapter(recipe)

        tokenizer = load_tokenizer(source)
        data = load_data(
            recipe, tokenizer, None if continued is None or continued.identity is None else continued.identity.rows
        )
        with full_disk_named(output_dir):
            return train(recipe, data, tokenizer, output_dir, continued, command=command)


def settle(recipe: Recipe) -> ModelSource:
    """Finds the model, and holds the recipe to what it can take.

    Raises:
        InputError: several processes, no such model, or targets that it has not.
    """
    from qalora.base.registry import resolve
    from qalora.plan import keep_to_positions, keep_to_stored
    from qalora.progress import show

    check_one_process()
    show(not recipe.logging.quiet)
    source = resolve(recipe.model)
    for note in filter(None, (keep_to_positions(recipe), keep_to_stored(recipe))):
        say(recipe, note)
    check_targets(recipe, source)
    return source


@contextmanager
def full_disk_named(output_dir: Path) -> Iterator[None]:
    """
    Raises:
        InputError: whatever was written in the block found no room; what had been written whole is still there.
    """
    try:
        yield
    except Exception as error:
        cause = error if disk_is_full(error) else error.__cause__
        if cause is None or not disk_is_full(cause):
            raise
        what = (
            error.as_typed
            if isinstance(error, InputError)
            else f"{output_dir}: cannot be written ({unwritable(cause)})."
        )
        raise InputError(
            f"{what} Earlier checkpoints are untouched: make room, and go on with the same command and --resume-from-checkpoint auto."
        ) from error


@dataclass
class RunData:
    """Tokenized rows of a run: B_val, which scores the ranks, is apart from the rows that measure the result where there are rows
    enough for both."""

    train: TokenizedDataset
    validation: TokenizedDataset
    scoring: TokenizedDataset
    rows: Rows


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, known: Rows | None = None) -> RunData:
    """Reads, renders and tokenizes every row, and says what was cut; all of it before any weights load.

    Args:
        known: the rows of the run that is continued.

    Raises:
        InputError: whatever is wrong with the files, the settings that go with them, or the metrics asked of them.
    """
    from qalora.base.registry import resolve, shape_of
    from qalora.data.reading import described
    from qalora.data.tokenization import load_dataset, same_rows, split_validation
    from qalora.metrics import check, several_references, with_room

    settings, evaluation, seed = recipe.data, recipe.evaluation, recipe.training.seed

    def load(source: str | list[str], split: str, limit: int | None) -> TokenizedDataset:
        dataset = load_dataset(source, tokenizer, split=split, limit=limit, **settings.reading())
        say(recipe, f"{described(source)} ({split}): {dataset.report}")
        return dataset

    train = load(settings.train, settings.split, settings.max_rows)
    if settings.validation is None:
        train, validation = hold_back(train, settings.val_set_size, seed, known)
    else:
        validation = load(settings.validation, settings.validation_split, None)
    if shared := same_rows(train, validation):
        say(
            recipe,
            f"{shared} of {len(validation)} validation rows are training rows too, token for token: what is measured on them says "
            "nothing of new rows",
        )
    held_back = validation
    # B_val chooses ranks, so it does not also measure them, wherever there are rows enough for both.
    wanted = recipe.allocation.val_batch_size
    if len(validation) >= 2 * wanted:
        validation, scoring = split_validation(validation, wanted, seed)
    else:
        scoring = validation.subset(range(min(wanted, len(validation))))
    if evaluation.rows is not None:
        validation = validation.subset(range(min(evaluation.rows, len(validation))))
    if evaluation.before or evaluation.after:
        validation, line = with_room(
            validation,
            tokenizer,
            shape_of(resolve(recipe.model)).positions,
            metrics=evaluation.metrics,
            max_new_tokens=evaluation.max_new_tokens,
            options=check(validation, **evaluation.asking()),
        )
        if line:
            say(recipe, line)
        if said := several_references(validation):
            say(recipe, said)
    return RunData(train, validation, scoring, rows_of(train.items, held_back.items, validation.items))


def hold_back(
    dataset: TokenizedDataset, size: int | float, seed: int, known: Rows | None
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """(train, validation) of one data set. A run that is continued keeps the rows that it held back, so that no row which it trained
    on ever measures it.

    Raises:
        InputError: no row is left for one of the two.
    """
    from qalora.data.tokenization import split_validation

    as_ever = split_validation(dataset, size, seed)
    if known is None or tuple(row_digests(part.items) for part in as_ever) == (known.train, known.held_back):
        return as_ever
    rows = row_digests(dataset.items)
    kept = set(kept_apart(rows, known, size, seed))
    if len(kept) == len(rows):
        raise InputError(
            "--resume-from-checkpoint: data.train holds nothing but rows that the run held back for validation; give it rows to train on."
        )
    return dataset.subset([i for i in range(len(rows)) if i not in kept]), dataset.subset(sorted(kept))


def train(
    recipe: Recipe,
    data: RunData,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    continued: Continued | None = None,
    *,
    command: Sequence[str] | None = None,
) -> int:
    """Loads the base, trains, evaluates before and after, saves. Returns the command's exit code.

    Args:
        output_dir: cleared of an earlier run once the base is there, unless a checkpoint is continued.
        command: the words of the command line, for the run's recipe.yaml and its model card.

    Raises:
        AnswerNo: the loss was not finite, or a run that was to allocate never did.
    """
    from transformers import set_seed

    from qalora.adapter.its_base import said_of_base
    from qalora.adapter.model import ranks, save_adapter
    from qalora.adapter.saved import check_adapter
    from qalora.base.device import plan_device
    from qalora.base.fingerprint import fingerprint
    from qalora.base.loading import load_base
    from qalora.base.precision import loaded_in_4bit
    from qalora.base.registry import resolve
    from qalora.metrics import predict
    from qalora.results.facts import with_command
    from qalora.results.finish import finish, push_run
    from qalora.training.trainer import begin_ranks, build_trainer, check_rates, steps_of, training_items

    for line in leave_to_the_recipe(on_gpu=plan_device() != "cpu"):
        say(recipe, line)
    checkpoint = None if continued is None else continued.checkpoint
    begun = None if continued is None else continued.identity
    if continued is not None:
        say_what_changed(recipe, data, continued)
        if recipe.allocation.rounds is None and begun is not None:
            recipe.allocation.rounds = begun.rounds
    elif recipe.training.fit:
        longest = max(len(item["input_ids"]) for item in data.train.items)
        fit_to_device(recipe, recipe.data.max_seq_len if recipe.data.packing else longest)
    check_reporting(recipe.training.report_to)
    items = training_items(recipe, data.train.items)
    total_steps, per_epoch = steps_of(recipe, len(items))
    check_rates(recipe, total_steps)
    if continued is not None and continued.step >= total_steps:
        cli.say(
            f"{continued.checkpoint} has {continued.step} steps behind it, and the run is to make {total_steps}: nothing is left to "
            "train; training.max_steps or training.num_epochs make it longer"
        )
    rounds = rounds_of(recipe, total_steps, per_epoch, continued)
    say(
        recipe,
        f"{total_steps} optimizer steps, {per_epoch} an epoch; rounds of allocation after steps {list(rounds.steps)}",
    )
    if rounds.scaled:
        say(recipe, "the run is shorter than allocation.warmup + rounds · interval: the schedule is scaled to it")

    quantization, lora = recipe.quantization, recipe.lora
    source = resolve(recipe.model)
    if rounds.steps and recipe.allocation.prune_per_round:
        check_pruning(recipe, source)
    if recipe.merge:
        check_room_to_merge(source, output_dir)
    original = choose_start(recipe, source) if checkpoint is None else None
    if checkpoint is None and lora.adapter:
        given_adapter = Path(lora.adapter).expanduser()
        check_adapter(given_adapter, source)
        if note := said_of_base(given_adapter, source):
            say(recipe, note)
    weights = fingerprint(source)
    if checkpoint is not None:
        check_base(weights, recipe.model, begun, checkpoint)
    if note := loaded_in_4bit(source, quantization.load_in_4bit, trained_on=True)[1]:
        say(recipe, note)
    base = load_base(source, tokenizer=tokenizer, **quantization.loading())
    quantization.bnb_4bit_compute_dtype = str(base.compute_dtype).removeprefix("torch.")  # type: ignore[assignment]
    if weights is None:  # downloaded by now
        weights = fingerprint(source)
        if checkpoint is not None:
            check_base(weights, recipe.model, begun, checkpoint)

    given = bool(recipe.data.chat_template or recipe.data.chat_template_kwargs)
    provenance = provenance_of(
        base, data.train, weights, given_template=given, prompt_template=recipe.data.prompt_template
    )
    say(recipe, _end_line(provenance))

    set_seed(recipe.training.seed)
    model, start = first_model(recipe, base, continued, moving=bool(rounds.steps))
    finished = {} if continued is None or continued.step < total_steps else figures_of(output_dir)
    begin_folder(output_dir, checkpoint, cli.say)
    known = {} if begun is None else {"run": begun.run}
    rounds_at_most = recipe.allocation.rounds_in(total_steps)
    Identity(recipe.model, weights, total_steps, rounds_at_most, start, data.rows, **known).write(output_dir)
    write_whole(output_dir / "recipe.yaml", with_command(recipe.to_yaml(), command))

    other_rows = begun is not None and begun.rows.train != data.rows.train
    other_validation = begun is not None and begun.rows.validation != data.rows.validation
    metrics: dict[str, Any] = {}
    settings = recipe.evaluation
    asked: dict[str, Any] = dict(
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        progress=not recipe.logging.quiet,
        taught=provenance.stop_tokens,
        **settings.asking(),
    )

    def measure(when: str) -> None:
        """Figures for metrics.json; the answers behind them for people to read, as far as there are any."""
        metrics[when], predictions = predict(model, tokenizer, data.validation, **asked)
        say(recipe, f"{when + ':':7} {_line(metrics[when])}")
        write_json(output_dir / "metrics.json", metrics)
        if any("answer" in line for line in predictions):
            write_json_lines(output_dir / f"predictions-{when}.jsonl", predictions)

    if checkpoint is not None and (output_dir / "metrics.json").is_file():
        metrics = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
        if other_validation:
            metrics.pop("before", None)
    elif settings.before:
        measure("before")

    trainer, allocator, interrupt = build_trainer(
        recipe,
        model,
        tokenizer,
        rows=data.train.items,
        train=items,
        validation=data.validation.items,
        scoring=data.scoring.items,
        rounds=rounds,
        total_steps=total_steps,
        compute_dtype=base.compute_dtype,
        output_dir=output_dir,
        other_rows=other_rows,
        other_validation=other_validation,
        provenance=provenance,
    )
    if checkpoint is None:
        begin_ranks(recipe, trainer, allocator, data.train.items, original)
    first_step = 0 if continued is None else continued.step  # now: the checkpoint may be rotated away before the end
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if interrupt.signal is not None:
        say(
            recipe,
            f"interrupted after step {trainer.state.global_step}; continue with the same command and --resume-from-checkpoint auto",
        )
        return cli.INTERRUPTED
    if rounds.steps and not allocator.done():
        raise AnswerNo(
            f"the run ended after step {trainer.state.global_step}, before its first round of allocation (step {rounds.steps[0]}); "
            "lower allocation.warmup or raise training.early_stopping_patience."
        )

    model = trainer.model
    seconds = sum(
        record["seconds"] for record in allocator.history if checkpoint is None or record["step"] > first_step
    )
    summary = trainer.throughput.summary(trainer.state.global_step)
    metrics["train"] = finished.get("train", summary)
    metrics["allocation"] = finished.get("allocation") or {
        "rounds": allocator.done(),
        "seconds": seconds,
        "share": seconds / summary["seconds"],
        "budget": sum(start.values()),
        "total_rank": sum(ranks(model).values()),
    }
    metrics["plan"] = planned(recipe, data.train.items, start)
    save_adapter(model, output_dir / "adapter", provenance)
    if settings.after:
        measure("after")
    write_json(output_dir / "metrics.json", metrics)
    draw(output_dir, trainer.state.log_history, start, ranks(model), allocator.history)
    finish(output_dir, trainer.state.log_history, cli.say)
    if recipe.merge:
        merge_run(recipe, base, output_dir)
    say(
        recipe,
        f"{output_dir}/adapter: a plain PEFT LoRA, total rank {metrics['allocation']['total_rank']} of {sum(start.values())}",
    )
    if repo := recipe.repository():
        push_run(output_dir, repo, recipe.hub_private_repo, lambda text: say(recipe, text))
    return cli.DONE


def first_model(
    recipe: Recipe, base: LoadedBase, continued: Continued | None, *, moving: bool
) -> tuple[PeftModel, dict[str, int]]:
    """(the base with the adapter that training goes on with, full module name → its ranks at the start of the run).

    Args:
        moving: rounds of allocation will change ranks.
    """
    from qalora.adapter.model import attach, load_adapter, ranks, settle_scalings

    lora = recipe.lora
    if continued is not None and continued.identity is not None:
        return load_adapter(base.model, continued.checkpoint, trainable=True), continued.identity.ranks
    if continued is None and lora.adapter:
        model = load_adapter(base.model, Path(lora.adapter).expanduser(), trainable=True, dropout=lora.dropout)
        if moving:
            settle_scalings(model)
        return model, ranks(model)
    model = attach(
        base.model,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        layers_to_transform=lora.layers_to_transform,
        seed=recipe.training.seed,
    )
    start = ranks(model)
    if continued is not None:
        model = load_adapter(model.unload(), continued.checkpoint, trainable=True)
    return model, start


def rounds_of(recipe: Recipe, total_steps: int, per_epoch: int, continued: Continued | None) -> Schedule:
    """The rounds of a run; one that is continued makes no more than N_A with those behind it.

    Raises:
        InputError: the run is too short for any.
    """
    from qalora.adapter.allocation import Schedule
    from qalora.training.trainer import schedule_of

    planned = schedule_of(recipe, total_steps, per_epoch)
    if continued is None:
        return planned
    most = recipe.allocation.rounds_in(total_steps)
    return Schedule(rounds_left(planned.steps, continued.rounds_done(), continued.step, most), planned.scaled)


def figures_of(output_dir: Path) -> dict[str, Any]:
    """What metrics.json says of a run that has been trained to its end; nothing where it was not."""
    try:
        figures = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return figures if isinstance(figures, dict) and is_finished(output_dir) else {}


def provenance_of(
    base: LoadedBase,
    train: TokenizedDataset,
    weights: str | None = None,
    *,
    given_template: bool = False,
    prompt_template: str | None = None,
) -> Provenance:
    """What the run's adapters say of themselves: the base as it was loaded, and what these rows teach.

    Args:
        weights: fingerprint of the base.
        given_template: whether the tokenizer's chat template is the recipe's, and not the base's own.
        prompt_template: the recipe's own, with {column} fields.
    """
    from qalora.adapter.provenance import Provenance
    from qalora.base.fingerprint import stored_as
    from qalora.data.chat_template import chat_template
    from qalora.data.ending import taught_ends
    from qalora.data.prompts import served_prompt

    stored = getattr(base.model.config, "quantization_config", None) if base.quantized else None
    built_in = chat_template(base.tokenizer).default if any(example.chat for example in train.examples) else None
    return Provenance(
        model=base.source.hub_id or base.source.name,
        quant_type=None if stored is None else stored.bnb_4bit_quant_type,
        double_quant=stored is not None and stored.bnb_4bit_use_double_quant,
        compute_dtype=str(base.compute_dtype).removeprefix("torch."),
        stop_tokens=taught_ends(train, base.tokenizer),
        chat_template=base.tokenizer.get_chat_template() if given_template else built_in,
        prompt=served_prompt(train.examples, prompt_template),
        base=weights,
        stored_as=stored_as(base.source),
    )


def check_targets(recipe: Recipe, source: ModelSource) -> None:
    """
    Raises:
        InputError: lora.target_modules or lora.layers_to_transform name what the model has not.
    """
    from qalora.base.registry import shape_of
    from qalora.plan import first_ranks

    if recipe.lora.adapter:
        return  # the adapter's own
    if recipe.lora.target_modules != "all-linear" or recipe.lora.layers_to_transform is not None:
        first_ranks(recipe, shape_of(source))


def check_pruning(recipe: Recipe, source: ModelSource) -> None:
    """Says where a round will prune fewer ranks than it was asked to.

    Raises:
        InputError: allocation.prune_per_round is every rank there is.
    """
    from qalora.adapter.allocation import most_pruned
    from qalora.base.registry import shape_of
    from qalora.plan import first_ranks

    ranks = first_ranks(recipe, shape_of(source)).values()
    asked, budget = recipe.allocation.prune_per_round or 0, sum(ranks)
    if asked >= budget:
        raise InputError(
            f"allocation.prune_per_round={asked}: the adapter has {budget} ranks, and a round that prunes all leaves nothing to "
            "train; lower it (default: one per module)."
        )
    if (most := most_pruned(ranks, asked)) < asked:
        say(
            recipe,
            f"allocation.prune_per_round={asked}: a round prunes {most} at most, one per module that has ranks and half of all",
        )


def choose_start(recipe: Recipe, source: ModelSource) -> Weights | None:
    """Settles `lora.init`, and opens the base's 16-bit weights where the first ranks begin by them.

    Raises:
        InputError: lora.init=quantization of a base that is stored in 4 bits.
    """
    from qalora.base.checkpoint import open_checkpoint, original_weights

    init = recipe.chosen_init(sixteen_bit=True)
    weights = open_checkpoint(source)[0] if init == "quantization" else None  # no other start reads them
    sixteen_bit = weights is not None and not weights.packed
    recipe.lora.init = recipe.chosen_init(sixteen_bit=sixteen_bit)
    return original_weights(weights, source.name) if weights is not None and recipe.lora.init == init else None


def check_room_to_merge(source: ModelSource, output_dir: Path) -> None:
    """
    Raises:
        InputError: too little disk or memory for `merge=true`, with the figures.
    """
    from qalora.base.checkpoint import open_config
    from qalora.base.tensor_files import expected_shapes
    from qalora.deploy.merging import check_room

    config = open_config(source)
    check_room(output_dir / "merged", expected_shapes(config), "bfloat16", config)


def merge_run(recipe: Recipe, base: LoadedBase, output_dir: Path) -> None:
    """`merge=true`: the run's adapter in the weights that it was trained on, as `qalora merge` writes them."""
    from qalora.base.checkpoint import Quantization
    from qalora.deploy.merging import merge

    asked = recipe.quantization
    quant_type = asked.bnb_4bit_quant_type if base.quantized else None
    merge(
        base.source,
        output_dir / "adapter",
        output_dir / "merged",
        quantization=Quantization(quant_type, asked.bnb_4bit_use_double_quant, base.compute_dtype),
        overwrite=True,
    )


def dry_run(recipe: Recipe) -> None:
    """Prints the resolved recipe, fitted to this machine where that was asked for, and the memory that a step will need.

    Raises:
        InputError: the base is on this machine, and its tokenizer is not one for it.
    """
    from qalora.base.registry import resolve
    from qalora.plan import planner, print_plan

    if (source := resolve(recipe.model)).kind != "hub":  # a plan downloads nothing
        from qalora.base.loading import load_tokenizer

        load_tokenizer(source)

    if recipe.training.fit:
        fit_to_device(recipe, recipe.data.max_seq_len)
    print(recipe.to_yaml())
    print_plan(planner(recipe)())


def planned(recipe: Recipe, items: Sequence[dict[str, Any]], ranks: dict[str, int]) -> dict[str, Any]:
    """The memory that the run was planned to need on this device, as `qalora plan --json` has it, in bytes.

    Args:
        items: tokenized training rows.
        ranks: full module name → its ranks at the start.
    """
    from qalora.base.device import plan_device
    from qalora.plan import planner

    longest = recipe.data.max_seq_len if recipe.data.packing else max(len(item["input_ids"]) for item in items)
    device = plan_device()
    plan = planner(recipe, device, ranks=ranks)(seq_len=longest)
    return {"device": device, "seq_len": longest, "terms": plan.terms, "total": plan.total}


def draw(
    output_dir: Path,
    log_history: list[dict[str, Any]],
    start: dict[str, int],
    final: dict[str, int],
    rounds: list[dict[str, Any]],
) -> None:
    from qalora.pictures import draw_loss, draw_ranks

    with TemporaryDirectory(dir=output_dir, prefix=".drawing-") as drawn:
        draw_ranks({name: final.get(name, 0) for name in start}, start, Path(drawn) / "ranks.png")
        draw_loss(
            log_history,
            [record["step"] for record in rounds],
            Path(drawn) / "loss.png",
            total_rank={record["step"]: record["total_rank"] for record in rounds} or None,
            budget=sum(start.values()),
        )
        for picture in Path(drawn).iterdir():
            picture.replace(output_dir / picture.name)


def fit_to_device(recipe: Recipe, longest: int) -> None:
    """Chooses micro-batch, accumulation, checkpointing and tiling for the memory of this machine, and says so.

    Args:
        longest: tokens of the longest row.

    Raises:
        InputError: nothing fits.
    """
    from qalora.base.device import available_memory, best_device, plan_device
    from qalora.base.loading import choose_compute_dtype
    from qalora.plan import fit_recipe, fitted, planner

    device = plan_device()
    dtype = choose_compute_dtype(recipe.quantization.bnb_4bit_compute_dtype, str(best_device()))
    memory = available_memory()
    name = str(dtype).removeprefix("torch.")
    recipe.quantization.bnb_4bit_compute_dtype = name  # type: ignore[assignment]
    if not fit_recipe(recipe, memory, seq_len=longest, device=device):
        least = planner(recipe, device)(seq_len=longest).total
        raise InputError(
            f"training.fit=auto: one row of {longest} tokens of {recipe.model} needs {least / 2**30:.2f} GiB, of "
            f"{memory / 2**30:.2f} GiB; lower data.max_seq_len or lora.r, or take a smaller model."
        )
    chosen = ", ".join(f"training.{key}={value}" for key, value in fitted(recipe).items())
    say(recipe, f"for {memory / 2**30:.1f} GiB and rows of up to {longest} tokens: {chosen}")


def check_reporting(names: Sequence[str]) -> None:
    """
    Raises:
        InputError: training.report_to names what transformers cannot report to, or what is not installed.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        for callback in get_reporting_integration_callbacks(list(names)):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"training.report_to={','.join(names)}: {' '.join(str(error).split())}") from None


def as_it_began(recipe: Recipe, continued: Continued) -> None:
    """A resumed run keeps what its beginning chose by itself: the dtype, the start, N_A, the settings that were fitted, and those that
    came from `lora.adapter`.

    Raises:
        InputError: a setting that would make it another run.
    """
    from qalora.errors import InputError
    from qalora.plan import fitted
    from qalora.recipe import FOLLOWERS

    begun, lora = continued.settings, recipe.lora
    now, then = recipe.training.lr_scheduler_type, begun["training"]["lr_scheduler_type"]
    if (now in FOLLOWERS) != (then in FOLLOWERS):
        raise InputError(
            f"--resume-from-checkpoint: training.lr_scheduler_type is {now}, and {continued.checkpoint} was made with {then}: one follows "
            "the steps and the other the validation loss; keep it, or start anew."
        )
    first = begun["lora"].get("adapter")
    if lora.adapter is None or (
        first and Path(lora.adapter).expanduser().resolve() == Path(first).expanduser().resolve()
    ):
        lora.adapter = first
    if lora.adapter is not None and lora.adapter == first:
        for name in {"r", "alpha", "target_modules"} - lora.model_fields_set:
            setattr(lora, name, begun["lora"][name])
    if recipe.training.fit:
        for name in fitted(recipe):
            setattr(recipe.training, name, begun["training"][name])
    check_settings(recipe.model_dump(mode="json"), begun, continued.checkpoint)
    if recipe.quantization.bnb_4bit_compute_dtype == "auto":
        recipe.quantization.bnb_4bit_compute_dtype = begun["quantization"]["bnb_4bit_compute_dtype"]
    recipe.lora.init, recipe.allocation.start = begun["lora"]["init"], begun["allocation"]["start"]


def say_what_changed(recipe: Recipe, data: RunData, continued: Continued) -> None:
    """
    Raises:
        InputError: rows are read in another way than they were.
    """
    now, then, identity = recipe.model_dump(mode="json"), continued.settings, continued.identity
    changed = changes(now, then)
    if changed:
        cli.say(f"{continued.checkpoint} is continued with {changed}")
    if identity is None:
        cli.say(f"{continued.checkpoint} does not say which base and rows it was made with: they are taken to be these")
        return
    if data.rows == identity.rows:
        return
    check_rows(now, then, [f"data.{name}" for name in recipe.data.reading()], continued.checkpoint)
    before, after = identity.rows, data.rows
    if before.train != after.train:
        cli.say(
            f"other training rows than before ({len(after.train)}, before {len(before.train)}; {len(set(after.train) - set(before.train))} "
            "of them are new): the epoch begins anew with them"
        )
    if before.validation != after.validation:
        cli.say(
            "other validation rows than before: the best loss so far, of other rows, and the evaluation before training count no more"
        )


def say(recipe: Recipe, text: str) -> None:
    if not recipe.logging.quiet:
        cli.say(text)


def _end_line(provenance: Provenance) -> str:
    ends = ", ".join(map(repr, provenance.stop_tokens))
    return (
        f"what ends an answer, as these rows teach it: {ends}"
        if ends
        else ("these rows teach nothing that ends an answer: a model trained on them stops at max_new_tokens alone")
    )


def _line(result: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in result.items())


cli.make_callable(__name__)
if __name__ == "__main__":
    sys.exit(cli.run(main))

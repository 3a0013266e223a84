"""`qalora finetune`: the main job. Rows and a frozen 4-bit base in, a plain PEFT LoRA with ranks where they pay out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, cast

from qalora import cli, processes
from qalora.environment import leave_to_the_recipe
from qalora.errors import InputError
from qalora.files import check_folder
from qalora.flags import add, settings
from qalora.locking import locked
from qalora.training.agreement import check_device, check_recipes
from qalora.training.checkpoints import find_checkpoint
from qalora.training.resume import Continued
from qalora.training.run_folder import (
    check_output_dir,
    full_disk_named,
    is_finished,
    is_run,
    lock_of,
    run_name,
)

if TYPE_CHECKING:
    from qalora.base.registry import ModelSource
    from qalora.recipe import Recipe


def parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="qalora finetune",
        description="Trains ALoRA adapters on a frozen 4-bit base.",
        epilog="Any setting of the recipe can follow, as key=value or --key value, e.g. training.max_steps=200; "
        "`qalora recipes show NAME` prints a recipe.",
    )
    add(parser, "--model", otherwise="the recipe's")
    add(parser, "--recipe", required=True)
    add(parser, "--profile")
    parser.add_argument("--output-dir", metavar="DIR", help="default: outputs/RECIPE-MODEL")
    add(parser, "--overwrite")
    parser.add_argument(
        "--resume-from-checkpoint", metavar="PATH|auto", help="continue exactly; auto: the newest checkpoint"
    )
    add(parser, "--dry-run", more="print the resolved recipe and the memory plan, and exit")
    parser.add_argument(
        "--push-to-hub",
        "--push_to_hub",
        metavar="REPO",
        help="push the adapter to this repository (OWNER/NAME) at the end",
    )
    add(parser, "--no-quantize", "--dtype", otherwise="the recipe's")
    return parser


def main(argv: list[str]) -> int:
    from qalora.recipe import recipe_path

    with processes.joined():
        with processes.agreeing():
            args, rest = parsed(argv)
            recipe = asked_recipe(args, rest)
            if args.dry_run:
                dry_run(recipe)
                return cli.DONE
        return run_recipe(
            recipe,
            [recipe_path(args.recipe)],
            overwrite=args.overwrite,
            resume_from_checkpoint=args.resume_from_checkpoint,
            command=argv,
        )


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """argparse's flags, and the other words. Of several processes the first prints what argparse has to say.

    Raises:
        SystemExit: it has printed help, or what is wrong.
        InputError: the same, in a process that prints nothing.
    """
    if processes.is_first():
        return parser().parse_known_args(argv)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:
        try:
            return parser().parse_known_args(argv)
        except SystemExit:
            raise InputError(f"command line: {said.getvalue().rpartition('error: ')[2].strip()}.") from None


def asked_recipe(args: argparse.Namespace, rest: Sequence[str]) -> Recipe:
    """The recipe with the settings of the command line, and the folder that its files go to.

    Raises:
        InputError: no such recipe, or a setting that it cannot have.
    """
    from qalora.recipe import load_recipe, parse_overrides

    own = {
        "output_dir": args.output_dir,
        "hub_model_id": args.push_to_hub,
        "push_to_hub": True if args.push_to_hub else None,
    }
    recipe = load_recipe(args.recipe, [*settings(args, own), *parse_overrides(rest)], args.profile)
    if recipe.output_dir is None:
        recipe = recipe.with_settings({"output_dir": f"outputs/{run_name(args.recipe, recipe.model)}"})
    return recipe


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

    Raises:
        InputError: whatever cannot be done, before any weights load.
        AnswerNo: the loss was not finite, or a run that was to allocate never did.
    """
    from qalora.base.registry import resolve
    from qalora.progress import show
    from qalora.results.hub import check_access
    from qalora.training.settling import as_it_began, check_targets, settled, with_its_own

    with processes.joined(), processes.agreeing():
        check_device()
        check_recipes(recipe)
        show(processes.is_first() and not recipe.logging.quiet)
        say = teller(recipe)
        source = resolve(recipe.model)
        recipe, notes = settled(recipe, source)
        for note in notes:
            say(note)
        check_targets(recipe, source)
        if processes.is_first() and (repo := recipe.repository()):
            check_access(repo)
        with folder_of(recipe, reads, overwrite, resume_from_checkpoint) as (output_dir, continued):
            recipe = with_its_own(recipe) if continued is None else as_it_began(recipe, continued)
            return carry_out(recipe, source, output_dir, continued, command)


def carry_out(
    recipe: Recipe, source: ModelSource, output_dir: Path, continued: Continued | None, command: Sequence[str] | None
) -> int:
    """Resolve, begin, train, finish."""
    from qalora.base.device import device_kind
    from qalora.base.loading import load_tokenizer
    from qalora.base.registry import shape_of
    from qalora.training.begin import begin
    from qalora.training.finish import finish, train
    from qalora.training.rows import load_data
    from qalora.training.run import resolve_run

    say = teller(recipe)
    tokenizer = load_tokenizer(source)
    known = None if continued is None or continued.identity is None else continued.identity.rows
    data = load_data(recipe, tokenizer, positions=shape_of(source).positions, known=known, say=say)
    processes.check_same(data.digests(), "the rows", "give every node the same files.")
    with full_disk_named(output_dir):
        for line in leave_to_the_recipe(on_gpu=device_kind() == "cuda"):
            say(line)
        run = resolve_run(recipe, source, tokenizer, data, output_dir, continued, command=command)
        for line in run.warnings:
            warn(line)
        for line in run.notes:
            say(line)
        session = begin(run, say, warn)
        if not train(run, session, say):
            return cli.INTERRUPTED
        finish(run, session, say, warn)
    return cli.DONE


@contextmanager
def folder_of(
    recipe: Recipe, reads: Sequence[Path], overwrite: bool, resume_from_checkpoint: str | None
) -> Iterator[tuple[Path, Continued | None]]:
    """(the run's folder, the checkpoint in it that is continued), nobody else's while the block runs. Of several
    processes the first looks after it, and the others are told.

    Raises:
        InputError: another run writes there, or it holds what is not to be replaced.
    """
    first = processes.is_first()
    with own_folder(recipe, reads, overwrite, resume_from_checkpoint) if first else nullcontext() as own:
        output_dir, continued = processes.from_first(lambda: cast(tuple[Path, Continued | None], own))
        if continued is not None and not continued.checkpoint.is_dir():
            raise InputError(
                f"--resume-from-checkpoint: {continued.checkpoint} is not there for this process; put output_dir on a "
                "file system that all nodes share."
            )
        yield output_dir, continued


@contextmanager
def own_folder(
    recipe: Recipe, reads: Sequence[Path], overwrite: bool, resume_from_checkpoint: str | None
) -> Iterator[tuple[Path, Continued | None]]:
    """`folder_of`, in the process that writes.

    Raises:
        InputError: another run writes there, or it holds what is not to be replaced.
    """
    from qalora.data.reading import paths_of

    output_dir = Path(str(recipe.output_dir)).expanduser()
    named = f"output_dir={output_dir}"
    check_folder(output_dir, named, replaced=False)
    with locked(lock_of(output_dir), named, say=cli.say):
        checkpoint = find_checkpoint(output_dir, resume_from_checkpoint, anew=overwrite, say=cli.say)
        # `auto` is for loops that start a command again: an attempt that was killed before its first checkpoint is no
        # result.
        restarts = resume_from_checkpoint == "auto" and is_run(output_dir) and not is_finished(output_dir)
        folders = [Path(name).expanduser() for name in (recipe.model, recipe.lora.adapter) if name]
        data_files = [*paths_of(recipe.data.train), *paths_of(recipe.data.validation)]
        check_output_dir(
            output_dir, [*reads, *folders, *data_files], checkpoint=checkpoint, overwrite=overwrite or restarts
        )
        yield output_dir, None if checkpoint is None else Continued.at(checkpoint)


def dry_run(recipe: Recipe) -> None:
    """Prints the resolved recipe, fitted to this machine where that was asked for, and the memory that a step will
    need.

    Raises:
        InputError: what the model or the adapter cannot take; or the base is on this machine, and its tokenizer is not
            one for it.
    """
    from qalora.base.registry import resolve, shape_of
    from qalora.plan import print_plan
    from qalora.training.planning import planner
    from qalora.training.settling import check_targets, fitted_to_device, settled, with_its_own

    check_recipes(recipe)
    say = teller(recipe)
    source = resolve(recipe.model)
    shape = shape_of(source)
    recipe, notes = settled(recipe, source)
    check_targets(recipe, source)
    recipe = with_its_own(recipe)
    if source.kind != "hub":  # a plan downloads nothing
        from qalora.base.loading import load_tokenizer

        load_tokenizer(source)
    if recipe.training.fit:
        recipe, fit = fitted_to_device(recipe, shape, recipe.data.max_seq_len)
        notes += fit
    for note in notes:
        say(note)
    if processes.is_first():
        print(recipe.to_yaml())
        print_plan(planner(recipe, shape, processes=processes.size())(), processes.size())


def teller(recipe: Recipe) -> Callable[[str], None]:
    """What tells the user a line, unless the run is a quiet one."""
    return (lambda text: None) if recipe.logging.quiet else warn


def warn(text: str) -> None:
    """Tells the user a line, once, whatever the number of processes."""
    if processes.is_first():
        cli.say(text)


cli.make_callable(__name__)
if __name__ == "__main__":
    sys.exit(cli.run(main))

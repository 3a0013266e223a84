"""A run, resolved once: every decision about it is made here, from recipe, rows and checkpoint, before any weights
load.

What follows only carries it out: begin.py loads the base and begins the adapter, the trainer trains, finish.py measures
and saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from qalora import processes
from qalora.adapter.allocation import Schedule, most_pruned
from qalora.adapter.its_base import said_of_base
from qalora.adapter.saved import check_adapter
from qalora.base.checkpoint import Weights, open_checkpoint, open_config, original_weights
from qalora.base.fingerprint import fingerprint
from qalora.base.precision import loaded_in_4bit
from qalora.base.registry import ModelSource, shape_of
from qalora.base.structure import structure_of
from qalora.data.rows import Item
from qalora.deploy.merging import check_room
from qalora.errors import InputError
from qalora.recipe import Recipe
from qalora.training.agreement import idle
from qalora.training.planning import first_ranks
from qalora.training.resume import Continued, changes, check_base, check_rows, rounds_left
from qalora.training.rows import RunData
from qalora.training.settling import fitted_to_device, with_dtype
from qalora.training.trackers import check_reporting
from qalora.training.trainer import check_rates, schedule_of, steps_of, training_items


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        recipe: every setting as it will be used; nothing in it is left open.
        source: where the base is.
        weights: fingerprint of the base; None: not downloaded yet.
        items: training rows as they are batched: each for itself, or packed.
        output_dir: of the run's files.
        continued: the checkpoint that it goes on from.
        total_steps: optimizer steps.
        rounds: when ranks move.
        original: the base's 16-bit weights, where the first ranks begin by them.
        command: the words that were typed, for recipe.yaml and the model card.
        warnings: lines that even a quiet run says.
        notes: lines for the user.
    """

    recipe: Recipe
    source: ModelSource
    weights: str | None
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    items: Sequence[Item]
    output_dir: Path
    continued: Continued | None
    total_steps: int
    steps_per_epoch: int
    rounds: Schedule
    original: Weights | None
    command: Sequence[str] | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def checkpoint(self) -> Path | None:
        return None if self.continued is None else self.continued.checkpoint

    @property
    def other_rows(self) -> bool:
        """Trained on other rows than before the checkpoint."""
        begun = None if self.continued is None else self.continued.identity
        return begun is not None and begun.rows.train != self.data.rows.train

    @property
    def other_validation(self) -> bool:
        """Measured on other rows than before the checkpoint."""
        begun = None if self.continued is None else self.continued.identity
        return begun is not None and begun.rows.validation != self.data.rows.validation


def resolve_run(
    recipe: Recipe,
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    output_dir: Path,
    continued: Continued | None = None,
    *,
    command: Sequence[str] | None = None,
) -> Run:
    """Decides what recipe, rows and checkpoint leave open: dtype, fit, steps, rounds and start.

    Args:
        recipe: as the model and the checkpoint leave it (settling.py).

    Raises:
        InputError: whatever of it cannot be done, before any weights load.
    """
    warnings, notes = [], list[str]()
    if continued is not None:
        warnings += what_changed(recipe, data, continued)
        if recipe.allocation.rounds is None and continued.identity is not None:
            recipe = recipe.with_settings({"allocation.rounds": continued.identity.rounds})
    else:
        longest = recipe.data.max_seq_len if recipe.data.packing else data.longest
        recipe, notes = fitted_to_device(recipe, shape_of(source), longest)
    recipe = with_dtype(recipe)
    items = training_items(recipe, data.train.items)
    total_steps, per_epoch = steps_of(recipe, len(items))
    if continued is not None and continued.step >= total_steps:
        warnings.append(
            f"{continued.checkpoint} has {continued.step} steps behind it, and the run is to make {total_steps}: "
            "nothing is left to train; training.max_steps or training.num_epochs make it longer"
        )
    if recipe.lora.compress and len(data.validation) + len(data.apart) < 2:
        raise InputError(
            "lora.compress=true: some validation rows order the ranks and others judge the cut, and there is one row; "
            "raise data.val_set_size, or give data.validation more rows."
        )
    rounds = rounds_of(recipe, total_steps, per_epoch, continued)
    if not recipe.data.packing:  # a packed row has several samples, which are shared out
        warnings += idle(recipe.training.micro_batch_size, recipe.training.gradient_accumulation_steps)
    notes.append(
        f"{total_steps} optimizer steps, {per_epoch} an epoch; rounds of allocation after steps {list(rounds.steps)}"
    )
    if rounds.scaled:
        notes.append("the run is shorter than allocation.warmup + rounds · interval: the schedule is scaled to it")
    notes += check_run(recipe, source, total_steps, rounds, output_dir, continued)
    weights = fingerprint(source)
    original = None
    if continued is None:
        recipe, original = with_start(recipe, source)
    else:
        check_base(weights, recipe.model, continued.identity, continued.checkpoint)
    return Run(
        recipe, source, weights, tokenizer, data, items, output_dir, continued, total_steps, per_epoch, rounds,
        original, command, tuple(warnings), tuple(notes),
    )  # fmt: skip


def check_run(
    recipe: Recipe,
    source: ModelSource,
    total_steps: int,
    rounds: Schedule,
    output_dir: Path,
    continued: Continued | None,
) -> list[str]:
    """Refuses what cannot be done, and returns a line per thing that a user should know.

    Raises:
        InputError: the reporting, the schedule of the rate, the pruning, the room to merge or the adapter to start
            from.
    """
    if processes.is_first():
        check_reporting(recipe.training.report_to)
    check_rates(recipe, total_steps)
    notes = list[str | None]()
    if recipe.lora.compress and recipe.training.save_strategy == "no":
        notes.append("lora.compress: with training.save_strategy=no nothing keeps the whole adapter beside the cut one")
    if rounds.steps and recipe.allocation.prune_per_round:
        notes.append(check_pruning(recipe, source))
    if recipe.merge:
        config = open_config(source)
        check_room(output_dir / "merged", structure_of(config), "bfloat16", config)
    if continued is None and recipe.lora.adapter:
        given = Path(recipe.lora.adapter).expanduser()
        check_adapter(given, source)
        notes.append(said_of_base(given, source))
    notes.append(loaded_in_4bit(source, recipe.quantization.load_in_4bit, trained_on=True)[1])
    return [note for note in notes if note]


def what_changed(recipe: Recipe, data: RunData, continued: Continued) -> list[str]:
    """What is another setting or another row than the checkpoint was made with, in lines.

    Raises:
        InputError: rows are read in another way than they were.
    """
    now, then, identity = recipe.model_dump(mode="json"), continued.settings, continued.identity
    changed = changes(now, then)
    lines = [f"{continued.checkpoint} is continued with {changed}"] if changed else []
    if identity is None:
        unsaid = "does not say which base and rows it was made with: they are taken to be these"
        return [*lines, f"{continued.checkpoint} {unsaid}"]
    before, after = identity.rows, data.rows
    if before == after:
        return lines
    check_rows(now, then, [f"data.{name}" for name in recipe.data.reading()], continued.checkpoint)
    if before.train != after.train:
        new = len(set(after.train) - set(before.train))
        lines.append(
            f"other training rows than before ({len(after.train)}, before {len(before.train)}; {new} of them are new): "
            "the epoch begins anew with them"
        )
    if before.validation != after.validation:
        lines.append(
            "other validation rows than before: the best loss so far, of other rows, and the evaluation before "
            "training count no more"
        )
    return lines


def rounds_of(recipe: Recipe, total_steps: int, per_epoch: int, continued: Continued | None) -> Schedule:
    """The rounds of a run; one that is continued makes no more than N_A with those behind it.

    Raises:
        InputError: the run is too short for any.
    """
    planned = schedule_of(recipe, total_steps, per_epoch)
    if continued is None:
        return planned
    most = recipe.allocation.rounds_in(total_steps)
    return Schedule(rounds_left(planned.steps, continued.rounds_done(), continued.step, most), planned.scaled)


def with_start(recipe: Recipe, source: ModelSource) -> tuple[Recipe, Weights | None]:
    """(the recipe with `lora.init` settled, the base's 16-bit weights where the first ranks begin by them).

    Raises:
        InputError: lora.init=quantization of a base that is stored in 4 bits.
    """
    init = recipe.chosen_init(sixteen_bit=True)
    weights = open_checkpoint(source)[0] if init == "quantization" else None  # no other start reads them
    chosen = recipe.chosen_init(sixteen_bit=weights is not None and not weights.packed)
    original = original_weights(weights, source.name) if weights is not None and chosen == init else None
    return recipe.with_settings({"lora.init": chosen}), original


def check_pruning(recipe: Recipe, source: ModelSource) -> str | None:
    """The line for a round that will prune fewer ranks than it was asked to.

    Raises:
        InputError: allocation.prune_per_round is every rank there is.
    """
    ranks = first_ranks(recipe, shape_of(source)).values()
    asked, budget = recipe.allocation.prune_per_round or 0, sum(ranks)
    if asked >= budget:
        raise InputError(
            f"allocation.prune_per_round={asked}: the adapter has {budget} ranks, and a round that prunes all leaves "
            "nothing to train; lower it (default: one per module)."
        )
    most = most_pruned(ranks, asked)
    if most == asked:
        return None
    return (
        f"allocation.prune_per_round={asked}: a round prunes {most} at most, one per module that has ranks and "
        "half of all"
    )

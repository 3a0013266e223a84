"""The rows of a run: read, rendered, tokenized and shared out, all of it before any weights load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from qalora.data.reading import described
from qalora.data.tokenization import TokenizedDataset, load_dataset, same_rows, split_validation
from qalora.errors import InputError
from qalora.metrics import check, several_references, with_room
from qalora.recipe import Recipe
from qalora.training.identity import Rows, row_digests, rows_of
from qalora.training.resume import kept_apart


@dataclass(frozen=True)
class RunData:
    """Tokenized rows of a run: B_val, which scores the ranks, is apart from the rows that measure the result where
    there are rows enough for both."""

    train: TokenizedDataset
    validation: TokenizedDataset
    scoring: TokenizedDataset
    rows: Rows
    apart: TokenizedDataset  # of the rows held back, those that are not among `validation`

    @property
    def longest(self) -> int:
        """Tokens of the longest training row."""
        return max(len(item["input_ids"]) for item in self.train.items)

    def digests(self) -> dict[str, str]:
        """Of the rows that are trained on, validate and score: name → digest."""
        parts = {"data.train": self.train, "data.validation": self.validation, "B_val": self.scoring}
        return {name: rows_of((), (), part.items).validation for name, part in parts.items()}


def load_data(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    positions: int | None = None,
    known: Rows | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> RunData:
    """Reads, renders and tokenizes every row.

    Args:
        positions: that the model has; None: no limit is known.
        known: the rows of the run that is continued.
        say: told what was read and what was cut.

    Raises:
        InputError: whatever is wrong with the files, the settings that go with them, or the metrics asked of them.
    """
    settings, seed = recipe.data, recipe.training.seed

    def load(source: str | list[str], split: str, limit: int | None) -> TokenizedDataset:
        dataset = load_dataset(source, tokenizer, split=split, limit=limit, **settings.reading())
        say(f"{described(source)} ({split}): {dataset.report}")
        return dataset

    train = load(settings.train, settings.split, settings.max_rows)
    if settings.validation is None:
        train, held_back = hold_back(train, settings.val_set_size, seed, known)
    else:
        held_back = load(settings.validation, settings.validation_split, None)
    if shared := same_rows(train, held_back):
        say(
            f"{shared} of {len(held_back)} validation rows are training rows too, token for token: what is measured "
            "on them says nothing of new rows"
        )
    validation, scoring = scoring_apart(held_back, recipe.allocation.val_batch_size, seed)
    validation = _measured(recipe, validation, tokenizer, positions, say)
    measured = {id(item) for item in validation.items}
    apart = held_back.subset([i for i, item in enumerate(held_back.items) if id(item) not in measured])
    return RunData(train, validation, scoring, rows_of(train.items, held_back.items, validation.items), apart)


def scoring_apart(rows: TokenizedDataset, wanted: int, seed: int) -> tuple[TokenizedDataset, TokenizedDataset]:
    """(validation, B_val): what chooses ranks does not also measure them, wherever there are rows enough for both."""
    if len(rows) >= 2 * wanted:
        return split_validation(rows, wanted, seed)
    return rows, rows.subset(range(min(wanted, len(rows))))


def hold_back(
    dataset: TokenizedDataset, size: int | float, seed: int, known: Rows | None
) -> tuple[TokenizedDataset, TokenizedDataset]:
    """(train, validation) of one data set. A run that is continued keeps the rows that it held back, so that no row
    which it trained on ever measures it.

    Raises:
        InputError: no row is left for one of the two.
    """
    as_ever = split_validation(dataset, size, seed)
    if known is None or tuple(row_digests(part.items) for part in as_ever) == (known.train, known.held_back):
        return as_ever
    rows = row_digests(dataset.items)
    kept = set(kept_apart(rows, known, size, seed))
    if len(kept) == len(rows):
        raise InputError(
            "--resume-from-checkpoint: data.train holds nothing but rows that the run held back for validation; give "
            "it rows to train on."
        )
    return dataset.subset([i for i in range(len(rows)) if i not in kept]), dataset.subset(sorted(kept))


def _measured(
    recipe: Recipe,
    validation: TokenizedDataset,
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
    say: Callable[[str], None],
) -> TokenizedDataset:
    """The validation rows that `evaluation` measures, with room for an answer where one is generated."""
    evaluation = recipe.evaluation
    if evaluation.rows is not None:
        validation = validation.subset(range(min(evaluation.rows, len(validation))))
    if not (evaluation.before or evaluation.after):
        return validation
    validation, line = with_room(
        validation,
        tokenizer,
        positions,
        metrics=evaluation.metrics,
        max_new_tokens=evaluation.max_new_tokens,
        options=check(validation, **evaluation.asking()),
    )
    for told in filter(None, (line, several_references(validation))):
        say(told)
    return validation

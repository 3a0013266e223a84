"""How the rows of a run are shared out."""

from __future__ import annotations

import pytest

from qalora.base.loading import load_tokenizer
from qalora.base.registry import resolve
from qalora.errors import InputError
from qalora.training.identity import row_digests
from qalora.training.rows import hold_back, load_data, scoring_apart


@pytest.fixture
def loaded(recipe_over):
    """make(say, **settings) → the rows of a recipe."""

    def make(say=lambda _: None, **settings):
        recipe = recipe_over(**settings)
        return load_data(recipe, load_tokenizer(resolve(recipe.model)), say=say)

    return make


def rows_in(part) -> set[int]:
    return {item["row"] for item in part.items}


def test_every_row_has_one_use_where_there_are_enough(loaded):
    data = loaded(**{"allocation.val_batch_size": 3})
    parts = [rows_in(part) for part in (data.train, data.validation, data.scoring)]
    assert list(map(len, parts)) == [16, 5, 3] and set.union(*parts) == set(range(24))
    assert data.longest == max(len(item["input_ids"]) for item in data.train.items)


def test_few_rows_both_score_and_measure(loaded):
    whole = loaded(**{"allocation.val_batch_size": 5})
    assert len(whole.validation) == 8 and len(whole.scoring) == 5 and rows_in(whole.scoring) < rows_in(whole.validation)
    validation, scoring = scoring_apart(whole.train, 8, seed=0)
    assert not rows_in(validation) & rows_in(scoring) and len(scoring) == 8


def test_what_was_read_is_said(loaded):
    said: list[str] = []
    loaded(say=said.append)
    assert len(said) == 1 and "(train): 24 rows" in said[0]


def test_a_row_that_trained_never_measures_when_the_share_changes(loaded):
    data = loaded()
    everything, known = whole(data), data.rows
    train, held_back = hold_back(everything, 0.5, 42, known)
    assert set(row_digests(train.items)) == set(known.train)
    assert set(row_digests(held_back.items)) == set(known.held_back)
    kept = [i for i, row in enumerate(row_digests(everything.items)) if row in known.held_back]
    with pytest.raises(InputError, match="nothing but rows that the run held back"):
        hold_back(everything.subset(kept), 1, 42, known)


def whole(data):
    """All rows of the file as one data set."""
    items, examples = data.train.items + data.validation.items, data.train.examples + data.validation.examples
    return type(data.train)(items, examples, data.train.report)

"""What decides among the scores of ranks, and when there is nothing to decide by."""

from __future__ import annotations

import math

import pytest

from qalora.adapter.scores import RankScores, check_finite, decides
from qalora.errors import AnswerNo

DROP, ALONE = {"a": [1.0, 2.0], "b": [0.5]}, {"a": [0.25, -1.0], "b": [4.0]}


def test_the_sum_is_eq_6_and_the_parts_are_themselves():
    assert decides("sum", DROP, ALONE) == {"a": [1.25, 1.0], "b": [4.5]}
    assert decides("drop", DROP, ALONE) is DROP and decides("alone", DROP, ALONE) is ALONE


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_what_is_not_finite_is_named(odd):
    check_finite(DROP, 1.0)
    with pytest.raises(AnswerNo, match="the score of rank 1 of a is not finite"):
        check_finite({"a": [0.0, odd]}, 1.0)
    with pytest.raises(AnswerNo, match="the loss on the rows that score is not finite"):
        check_finite(DROP, 1.0, odd)


def test_exact_evaluations_are_counted():
    exact = {"a": [True, False], "b": [True]}
    scores = RankScores("certified", 1, 1, 1.0, 2.0, DROP, ALONE, DROP, None, exact, 3.0, False)
    assert scores.exact_evaluations == 2 and scores.checked() is scores

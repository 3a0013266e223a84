"""Decisions of a cut, against sorting and sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora.adapter.compression import Point, Size, enough_rows, kept, paired, parameters_of, scoring_rows, shrunk

SCORES = {"a": [5.0, 1.0], "b": [4.0, -2.0, 3.0], "c": [0.5]}
COSTS = {"a": 100, "b": 10, "c": 1}


def point(parameters, difference, stderr, loss=1.0):
    return Point(parameters / 100, parameters, parameters, loss, difference, stderr, {})


@pytest.mark.parametrize(
    ("size", "per", "expected"),
    [
        (Size(ranks=3), "rank", {"a": [0], "b": [0, 2]}),
        (Size(ranks=3), "parameter", {"b": [0, 2], "c": [0]}),
        (Size(parameters=121), "rank", {"a": [0], "b": [0, 2], "c": [0]}),
        (Size(parameters=25), "rank", {"b": [0, 2], "c": [0]}),  # a is passed over, for what fits after it
        (Size(max_rank=1), "rank", {"a": [0], "b": [0], "c": [0]}),
        (Size(ranks=2, max_rank=1), "rank", {"a": [0], "b": [0]}),
        (Size(), "rank", {"a": [0, 1], "b": [0, 1, 2], "c": [0]}),
        (Size(parameters=0), "rank", {}),
    ],
)
def test_the_best_ranks_that_fit_stay(size, per, expected):
    assert kept(SCORES, size, COSTS, per) == expected


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=5), min_size=1, max_size=5), st.integers(1, 30))
def test_no_rank_that_leaves_is_better_than_one_that_stays(values, count):
    scores = {str(i): of for i, of in enumerate(values)}
    found = kept(scores, Size(ranks=count), dict.fromkeys(scores, 7))
    stay = [scores[name][rank] for name, ranks in found.items() for rank in ranks]
    leave = [value for name, of in scores.items() for rank, value in enumerate(of) if rank not in found.get(name, [])]
    assert len(stay) == min(count, len(stay) + len(leave))
    assert not leave or min(stay) >= max(leave)
    assert parameters_of(found, dict.fromkeys(scores, 7)) == 7 * len(stay)


def test_a_cut_holds_that_is_not_above_the_whole_or_the_tolerance():
    assert point(50, -0.002, 0.003).holds() and point(100, 0.0, 0.0).holds()
    assert not point(25, 0.001, 0.003).holds()
    assert point(25, 0.001, 0.003).holds(tolerance=0.001)


def test_paired_difference_is_that_of_a_bootstrap():
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 20, 400)
    others = generator.normal(2, 1, 400) * tokens
    losses = others + generator.normal(0.1, 0.2, 400) * tokens
    mean, stderr = paired(losses, others, tokens)
    assert mean == pytest.approx((losses.sum() - others.sum()) / tokens.sum())
    draws = generator.integers(0, 400, (4000, 400))
    spread = ((losses - others)[draws].sum(1) / tokens[draws].sum(1)).std()
    assert stderr == pytest.approx(spread, rel=0.06)
    assert paired([1.0], [2.0], [1]) == (-1.0, math.inf)


def test_shares_known_for_certain_stay_and_unknown_ones_follow_the_singular_values():
    values = {"a": [3.0, 2.0, 1.0, 0.5]}
    shares = {"a": [0.5, 0.9, 0.2, 0.1]}
    assert shrunk(shares, {"a": [1e-9] * 4}, values)["a"] == pytest.approx(shares["a"], rel=1e-3)
    blind = shrunk(shares, {"a": [10.0] * 4}, values)["a"]
    assert np.argsort(blind).tolist() == [3, 2, 1, 0]
    assert shrunk({"a": [-1.0, 0.1, 0, 0]}, {"a": [0.1] * 4}, values) == {"a": [-1.0, 0.1, 0, 0]}


def test_shrinking_comes_closer_to_the_truth_than_shares_or_values_alone():
    """Shares that scatter about c v², with errors as large as they are."""
    generator = np.random.default_rng(1)
    values = np.exp(generator.normal(0, 1, 2000))
    truth = 0.01 * values**2 * np.clip(1 + 0.5 * generator.normal(size=2000), 0, None)
    error = np.full(2000, 0.03)
    shares = truth + error * generator.normal(size=2000)
    found = np.array(shrunk({"a": shares.tolist()}, {"a": error.tolist()}, {"a": values.tolist()})["a"])

    def missed(order):
        return truth[np.argsort(-order)[500:]].sum()

    assert missed(found) < min(missed(shares), missed(values))
    assert np.square(found - truth).mean() < np.square(shares - truth).mean()


def test_rows_of_short_answers_are_more():
    assert [enough_rows([tokens] * 5000) for tokens in (1000, 20, 10, 2)] == [200, 205, 410, 1000]
    assert enough_rows([1] * 30) == 30


def test_rows_score_until_they_have_tokens_enough_and_never_more_than_half():
    scoring, judging = scoring_rows([1] * 100)
    assert len(scoring) == 50
    assert sorted([*scoring, *judging]) == list(range(100))
    scoring, judging = scoring_rows([100] * 100, least=450)
    assert len(scoring) == 5
    assert scoring_rows([100] * 100, least=450)[0] == scoring != scoring_rows([100] * 100, least=450, seed=1)[0]
    assert len(scoring_rows([5, 5])[0]) == 1


def test_of_two_cuts_the_surer_one_is_better_where_they_differ_by_less_than_chance():
    sure, lucky, far = point(50, 0.001, 0.003, 1.001), point(50, -0.003, 0.02, 0.997), point(50, -0.03, 0.02, 0.97)
    assert min((sure, lucky), key=lambda each: each.bound) is sure
    assert min((sure, far), key=lambda each: each.bound) is far


def test_a_single_row_holds_no_cut():
    """Its standard error is not known, so nothing smaller than the whole is chosen by it."""
    assert not point(50, *paired([1.0], [0.5], [3])).holds(tolerance=1.0)

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qalora.adapter.allocation import (
    affordable,
    in_steps,
    keep_best,
    least_important,
    most_pruned,
    parse_duration,
    plan,
    schedule,
    share_out,
    undecided,
)
from qalora.errors import AnswerNo

# Few distinct values, so that ties are common.
scores = st.one_of(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.floats(-1e3, 1e3))
adapters = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3), st.lists(scores, max_size=9), min_size=1, max_size=8
).filter(lambda adapter: any(adapter.values()))


@st.composite
def rounds(draw):
    importance = draw(adapters)
    return dict(
        importance=importance,
        prune=draw(st.integers(0, 20)),
        min_rank=draw(st.integers(0, 3)),
        max_rank=draw(st.none() | st.integers(1, 12)),
    )


def after(importance, decision):
    return {
        module: len(ranks) - len(decision.pruned.get(module, ())) + decision.grown.get(module, 0)
        for module, ranks in importance.items()
    }


# ----------------------------------------------------------------------------------------------------- invariant 7


@given(rounds())
def test_total_rank_never_rises_and_stays_when_there_is_room(round_):
    importance, decision = round_["importance"], plan(**round_)
    before = sum(map(len, importance.values()))
    total = sum(after(importance, decision).values())
    receivers = [module for module, ranks in importance.items() if module not in decision.pruned]
    assert total <= before
    if round_["max_rank"] is None and receivers:
        assert total == before


@given(rounds(), st.integers(0, 30))
def test_what_was_lost_comes_back_up_to_the_budget(round_, lost):
    importance = round_["importance"]
    budget = sum(map(len, importance.values())) + lost
    decision = plan(**round_, budget=budget)
    total = sum(after(importance, decision).values())
    receivers = [module for module, ranks in importance.items() if module not in decision.pruned]
    assert decision.pruned == plan(**round_).pruned
    assert total <= budget
    if round_["max_rank"] is None and receivers:
        assert total == budget


@given(rounds())
def test_total_falls_short_only_when_every_receiver_is_full(round_):
    importance, decision = round_["importance"], plan(**round_)
    ranks = after(importance, decision)
    if sum(ranks.values()) < sum(map(len, importance.values())):
        receivers = [module for module, old in importance.items() if module not in decision.pruned]
        assert all(round_["max_rank"] is not None and ranks[module] >= round_["max_rank"] for module in receivers)


@given(rounds())
def test_min_and_max_rank_hold(round_):
    importance, decision = round_["importance"], plan(**round_)
    for module, rank in after(importance, decision).items():
        old = len(importance[module])
        assert rank >= min(old, round_["min_rank"])
        if round_["max_rank"] is not None:
            assert rank <= max(old, round_["max_rank"])


@given(rounds())
def test_pruned_ranks_are_the_least_important_that_may_go(round_):
    importance, decision = round_["importance"], plan(**round_)
    gone = {(module, rank) for module, ranks in decision.pruned.items() for rank in ranks}
    removable = sum(max(len(ranks) - round_["min_rank"], 0) for ranks in importance.values())
    half, living = sum(map(len, importance.values())) // 2, sum(map(bool, importance.values()))
    assert len(gone) == min(round_["prune"], removable, half, living)
    if not gone:
        return
    worst_gone = max(importance[module][rank] for module, rank in gone)
    for module, ranks in importance.items():
        if len(ranks) - len(decision.pruned.get(module, ())) > round_["min_rank"]:
            assert all(score >= worst_gone for rank, score in enumerate(ranks) if (module, rank) not in gone)
        if module in decision.pruned:
            inside = [ranks[rank] for rank in decision.pruned[module]]
            assert sorted(ranks)[: len(inside)] == sorted(inside)


@given(rounds())
def test_no_module_loses_and_gains(round_):
    decision = plan(**round_)
    assert not decision.pruned.keys() & decision.grown.keys()
    assert all(ranks == tuple(sorted(set(ranks))) and ranks for ranks in decision.pruned.values())
    assert all(n > 0 for n in decision.grown.values())


@given(rounds())
def test_even_shares_and_the_remainder_to_the_highest_average(round_):
    importance, decision = round_["importance"], plan(**{**round_, "max_rank": None})
    receivers = [module for module, ranks in importance.items() if module not in decision.pruned]
    freed = sum(map(len, decision.pruned.values()))
    if not receivers:
        assert decision.grown == {}
        return
    share, remainder = divmod(freed, len(receivers))
    overall = sum(map(sum, importance.values())) / sum(map(len, importance.values()))
    best = sorted(
        receivers,
        key=lambda module: -(sum(importance[module]) / len(importance[module]) if importance[module] else overall),
    )[:remainder]
    expected = {module: share + (module in best) for module in receivers}
    assert decision.grown == {module: n for module, n in expected.items() if n}


# ------------------------------------------------------------------------------------------------------- examples


def test_footnote_3_by_hand():
    decision = plan({"q": [0.1, 0.2], "k": [9.0, 5.0], "v": [4.0, 4.0], "o": [6.0, 7.5]}, prune=2)
    assert decision.pruned == {"q": (0, 1)}
    assert decision.grown == {"k": 1, "o": 1}  # averages 7.0 and 6.75 before 4.0


def test_total_ends_below_the_budget_when_every_module_lost_a_rank():
    decision = plan({"q": [0.1, 2.0], "k": [0.2, 3.0]}, prune=2)
    assert (decision.pruned, decision.grown) == ({"q": (0,), "k": (0,)}, {})


def test_ties_go_by_module_then_rank():
    assert least_important({"b": [1.0, 1.0], "a": [1.0, 1.0]}, 3) == {"b": (0, 1), "a": (0,)}


def test_ties_of_the_average_go_by_module():
    assert share_out(1, {"b": math.inf, "a": math.inf}, {"b": 1.0, "a": 1.0}) == {"b": 1}


def test_what_a_full_module_cannot_take_goes_to_the_others():
    decision = plan({"q": [0.0] * 5, "k": [9.0, 9.0], "v": [8.0], "o": [7.0]}, prune=4, max_rank=3, budget=10)
    assert decision.pruned == {"q": (0, 1, 2, 3)}
    assert decision.grown == {"k": 1, "v": 2, "o": 2}


@given(rounds(), st.integers(0, 60), st.randoms())
def test_parameters_never_rise_above_what_is_allowed(round_, slack, random):
    importance = round_["importance"]
    cost = {module: random.randint(1, 9) for module in importance}
    before = sum(cost[module] * len(ranks) for module, ranks in importance.items())
    plain = plan(**round_)
    decision = plan(**round_, cost=cost, parameters=before + slack)
    assert decision.pruned == plain.pruned
    spent = sum(cost[module] * rank for module, rank in after(importance, decision).items())
    assert spent <= before + slack
    if sum(after(importance, decision).values()) < sum(
        after(importance, plain).values()
    ):  # what is left pays for no rank
        most = math.inf if round_["max_rank"] is None else round_["max_rank"]
        takers = [
            module
            for module, rank in after(importance, decision).items()
            if module not in decision.pruned and rank < most
        ]
        assert all(spent + cost[module] > before + slack for module in takers)


def test_the_least_important_gains_are_given_up_by_hand():
    grown, cost = {"a": 2, "b": 3, "c": 1}, {"a": 10, "b": 1, "c": 5}
    average = {"a": 0.5, "b": 0.1, "c": 0.9}
    assert affordable(grown, cost, 28, average) == grown
    assert affordable(grown, cost, 26, average) == {"a": 2, "b": 1, "c": 1}
    assert affordable(grown, cost, 24, average) == {"a": 1, "c": 1}
    assert affordable(grown, cost, 0, average) == {}


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.lists(scores, max_size=6), min_size=1),
    st.integers(0, 30),
    st.none() | st.integers(0, 60),
    st.integers(0, 3),
    st.randoms(),
)
def test_no_better_rank_goes_than_one_that_stays(importance, ranks, parameters, least, random):
    cost = {module: random.randint(1, 9) for module in importance}
    decision = keep_best(importance, cost, ranks=ranks, parameters=parameters, least=least)
    gone = {(module, rank) for module, indices in decision.pruned.items() for rank in indices}
    stay = {(module, rank) for module, of in importance.items() for rank in range(len(of))} - gone
    spent = sum(cost[module] for module, _ in stay)
    shares = {module: sum(of == module for of, _ in stay) for module in importance}
    assert not decision.grown
    assert len(stay) <= ranks
    assert parameters is None or spent <= parameters
    if len(stay) < ranks:  # whatever went is too dear
        assert all(parameters is not None and spent + cost[module] > parameters for module, _ in gone)
    for module, rank in stay:  # within a module, always the best
        assert all(importance[module][rank] >= importance[of][other] for of, other in gone if of == module)
    poor = [module for module, of in importance.items() if shares[module] < min(least, len(of))]
    if parameters is None and poor:
        assert all(n <= least for n in shares.values())
    elif parameters is None:  # among those that no module was owed, the worst that stayed beats the best that went
        free = [min(importance[of][rank] for of, rank in stay if of == m) for m, n in shares.items() if n > least]
        assert not free or not gone or min(free) >= max(importance[module][rank] for module, rank in gone)


def test_keep_best_by_hand():
    importance = {"wide": [1.0, 8.0, 6.0], "narrow": [5.0, 1.5, 2.0], "idle": [0.0, 0.1]}
    cost = {"wide": 4, "narrow": 1, "idle": 1}

    def pruned(**limits):
        return keep_best(importance, cost, **limits).pruned

    assert pruned(ranks=4) == {"wide": (0,), "narrow": (1,), "idle": (0, 1)}
    assert pruned(ranks=4, least=1) == {"wide": (0,), "narrow": (1, 2), "idle": (0,)}
    # By the parameter: narrow 5, 2, 1.5; wide 2, 1.5, 0.25; ties go by module order.
    assert pruned(ranks=9, parameters=9) == {"wide": (0, 2)}
    assert pruned(ranks=9, parameters=11) == {"wide": (0,), "idle": (0, 1)}
    assert pruned(ranks=3, parameters=100) == {"wide": (0, 2), "narrow": (1,), "idle": (0, 1)}
    assert pruned(ranks=8) == {}


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="importance of a rank of q is not finite"):
        plan({"q": [1.0, math.nan], "k": [1.0]}, prune=1)


# ------------------------------------------------------------------------------------------------------- invariant 17


@settings(max_examples=60, deadline=None)
@given(
    modules=st.integers(1, 10),
    r=st.integers(1, 8),
    count=st.integers(1, 16),
    limits=st.fixed_dictionaries({"min_rank": st.integers(0, 2), "max_rank": st.none() | st.integers(1, 12)}),
    by_parameters=st.booleans(),
    prune=st.none() | st.integers(1, 90),
    seed=st.integers(0, 10**6),
)
def test_rounds_never_eat_the_adapter(modules, r, count, limits, by_parameters, prune, seed):
    """Scores have a part of their module's, which keeps the same modules at the bottom: so they die."""
    random, names = Random(seed), [f"m{i}" for i in range(modules)]
    cost = {name: random.choice([2, 3, 3, 8]) for name in names}
    effect = {name: random.gauss(0, 2) for name in names}
    ranks, budget, parameters = dict.fromkeys(names, r), r * modules, r * sum(cost.values())
    most = math.inf if limits["max_rank"] is None else limits["max_rank"]
    for _ in range(count):
        importance = {name: [effect[name] + random.gauss(0, 1) for _ in range(ranks[name])] for name in names}
        counted = {"cost": cost, "parameters": parameters} if by_parameters else {}
        decision = plan(importance, prune=prune or modules, budget=budget, **limits, **counted)
        ranks = after(importance, decision)
        total, spent = sum(ranks.values()), sum(cost[name] * rank for name, rank in ranks.items())
        takers = [name for name in names if name not in decision.pruned and ranks[name] < most]
        assert 0 < total <= budget and (spent <= parameters or not by_parameters)
        if takers and total < budget:
            assert by_parameters and parameters - spent < min(cost[name] for name in takers)


def test_a_module_without_ranks_counts_as_average():
    """Of two new ranks one goes to the better module, the other to the dead one, which stands for the mean of all,
    3.25."""
    decision = plan({"dead": [], "q": [0.0, 1.0], "k": [9.0], "v": [3.0]}, prune=2, budget=5)
    assert (decision.pruned, decision.grown) == ({"q": (0, 1)}, {"dead": 1, "k": 1, "v": 1})
    decision = plan({"dead": [], "q": [0.0, 1.0], "k": [9.0], "v": [3.0]}, prune=2)
    assert (decision.pruned, decision.grown) == ({"q": (0, 1)}, {"dead": 1, "k": 1})


@pytest.mark.parametrize(
    ("ranks", "asked", "pruned"), [((1,) * 8, 8, 4), ((8, 8), 9, 2), ((3, 0, 0), 2, 1), ((1,), 1, 0)]
)
def test_a_round_prunes_one_per_living_module_and_half_of_all_at_most(ranks, asked, pruned):
    assert most_pruned(ranks, asked) == pruned


def test_a_plan_that_leaves_nothing_is_refused():
    with pytest.raises(AnswerNo, match="no rank of the adapter is left"):
        plan({"q": [], "k": []}, prune=2)


# ------------------------------------------------------------------------------------------------------- schedule


def test_paper_schedule_in_a_run_that_is_long_enough():
    found = schedule(total_steps=400, steps_per_epoch=68, rounds=8, warmup="1 epoch", interval="0.25 epochs")
    assert (found.steps, found.scaled) == ((68, 85, 102, 119, 136, 153, 170, 187), False)


def test_paper_schedule_scaled_to_a_short_run():
    found = schedule(total_steps=60, steps_per_epoch=68, rounds=8, warmup="1 epoch", interval="0.25 epochs")
    assert (found.steps, found.scaled) == ((20, 25, 30, 35, 40, 45, 50, 55), True)


def test_a_run_of_exactly_the_wanted_length_is_not_scaled():
    assert schedule(total_steps=50, steps_per_epoch=9, rounds=3, warmup=20, interval=10).scaled is False


def test_no_rounds():
    assert schedule(total_steps=60, steps_per_epoch=68, rounds=0, warmup=1, interval=1).steps == ()


@given(
    st.integers(1, 500),
    st.floats(0.1, 300),
    st.integers(1, 12),
    st.integers(1, 300) | st.floats(0.01, 0.99) | st.just("1 epoch"),
    st.integers(1, 300) | st.floats(0.01, 0.99) | st.just("0.25 epochs"),
)
def test_rounds_fall_inside_the_run_and_leave_time_to_recover(total, per_epoch, rounds_, warmup, interval):
    found = schedule(total_steps=total, steps_per_epoch=per_epoch, rounds=rounds_, warmup=warmup, interval=interval)
    assert len(found.steps) <= rounds_
    assert list(found.steps) == sorted(set(found.steps))
    assert all(1 <= step < total for step in found.steps)
    k1, k2 = in_steps(warmup, total, per_epoch), in_steps(interval, total, per_epoch)
    assert found.scaled == (k1 + rounds_ * k2 > total)


@pytest.mark.parametrize(
    ("duration", "steps"), [(20, 20), (0.25, 15), ("1 epoch", 68), ("0.25 epochs", 17), ("2 epochs", 136)]
)
def test_durations_in_steps(duration, steps):
    assert in_steps(parse_duration(duration), 60, 68) == steps


@pytest.mark.parametrize(
    "duration", [0, -3, 1.0, 1.5, 0.0, math.nan, True, "20", "epoch", "0 epochs", "-1 epoch", "1epoch"]
)
def test_what_is_no_duration(duration):
    with pytest.raises(ValueError, match="optimizer steps"):
        parse_duration(duration)


def test_torch_is_not_imported(run_python):
    code = (
        "import sys, qalora.adapter.allocation, qalora.recipe; print('torch' in sys.modules, 'transformers' in "
        "sys.modules)"
    )
    assert run_python(code).split() == ["False", "False"]


# ------------------------------------------------------------------------------------------------------------ undecided


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    count=st.integers(0, 12),
    min_rank=st.integers(0, 2),
    width=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
    random=st.randoms(use_true_random=False),
)
def test_whatever_can_change_sides_is_undecided(sizes, count, min_rank, width, random):
    """Every set of values within the bounds differs from the point estimates' answer in undecided ranks only."""
    scores = {f"m{i}": [random.random() for _ in range(size)] for i, size in enumerate(sizes)}
    width_of = {name: [random.choice([0.0, width]) for _ in ranks] for name, ranks in scores.items()}
    low, high = (
        {name: [s + sign * w for s, w in zip(scores[name], width_of[name], strict=True)] for name in scores}
        for sign in (-1, 1)
    )
    doubtful = set(undecided(scores, low, high, count, min_rank))
    before = {(name, rank) for name, ranks in least_important(scores, count, min_rank).items() for rank in ranks}
    for _ in range(20):
        moved = {
            name: [
                random.choice([low[name][k], high[name][k], random.uniform(low[name][k], high[name][k])])
                for k in range(len(s))
            ]
            for name, s in scores.items()
        }
        moved_set = {(name, rank) for name, ranks in least_important(moved, count, min_rank).items() for rank in ranks}
        assert before ^ moved_set <= doubtful


def test_nothing_is_undecided_where_bounds_do_not_cross():
    scores = {"a": [0.1, 0.5], "b": [0.2, 0.9]}
    low, high = ({name: [s + d for s in values] for name, values in scores.items()} for d in (-0.1, 0.1))
    assert undecided(scores, low, high, 2) == []
    assert undecided(scores, low, high, 1) == [("a", 0), ("b", 0)]

"""The search over made-up curves, and on a model against cuts one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qalora.adapter import search
from qalora.adapter.compression import Kept, Point, Size, kept
from qalora.adapter.cutting import Losses, cut, rank_orders
from qalora.adapter.model import gated_layers
from qalora.adapter.principal import into_basis
from qalora.adapter.search import Asked, Ranking, find_cut

THEIRS = {"m": "factors as training left them"}


@pytest.fixture
def made_up(monkeypatch):
    """run(costs, asked) → (the cut, the numbers of ranks measured). `costs` of an order gives the loss difference of a
    number of ranks; the standard error is 0.01."""

    def run(costs, asked, gain=0.0):
        """gain: what training on takes off the difference."""
        measured = []
        first = {order: 7 * place for place, order in enumerate(costs)}  # the rank that each has in front
        orders = {order: {"m": [-float((rank - first[order]) % 100) for rank in range(100)]} for order in costs}

        def order_of(own):
            found = [order for order in costs if first[order] in own and (first[order] - 1) % 100 not in own]
            return found[0] if found else next(iter(costs))

        def point(model, judging, own: Kept, factors=None, *, whole, of):
            count, order = len(own["m"]), order_of(own["m"])
            trained_on = factors not in (None, THEIRS)
            assert trained_on or factors == (THEIRS if order == "trained" else None)
            measured.append(-count if trained_on else count)
            difference = costs[order](count) - (gain if trained_on else 0)
            return Point(count / of, count, 10 * count, 1 + difference, difference, 0.01, own, factors)

        asked = replace(asked, orders=tuple(costs))
        of_basis = {order: scores for order, scores in orders.items() if order != "trained"}
        as_trained = Ranking(orders["trained"], THEIRS) if "trained" in costs else None
        monkeypatch.setattr(search, "ranks", lambda model: {"m": 100})
        monkeypatch.setattr(search, "into_basis", lambda *args: {"m": [1.0] * 100})
        monkeypatch.setattr(search, "rank_orders", lambda *args: of_basis)
        monkeypatch.setattr(search, "ranking_as_trained", lambda *args: as_trained)
        monkeypatch.setattr(search, "losses", lambda *args: Losses([1.0, 1.0], [1, 1]))
        monkeypatch.setattr(search, "rank_parameters", lambda *args: {"m": 10})
        monkeypatch.setattr(search, "point", point)
        monkeypatch.setattr(search, "refitted", lambda *args: {"m": args})
        return find_cut(None, [], [], asked), measured

    return run


def test_the_order_that_cuts_deepest_wins_and_curves_end_where_they_cost(made_up):
    costs = {"path": lambda n: 0.0 if n >= 25 else 1.0, "values": lambda n: 0.0 if n >= 60 else 1.0}
    found, measured = made_up(costs, Asked())
    assert (found.chosen.order, found.chosen.point.ranks) == ("path", 25)
    assert measured == [75, 50, 25, 12, 6, 75, 50, 25]  # two failures in a row are enough


def test_training_on_goes_down_from_the_smallest_that_holds_for_as_long_as_that_holds(made_up):
    costs = {"path": lambda n: 0.0 if n >= 50 else 0.01 if n >= 25 else 1.0}
    found, measured = made_up(costs, Asked(refit=True, refit_steps=7), gain=0.02)
    assert measured == [75, 50, 25, 12, 6, -50, -25, -12]
    assert (found.chosen.point.ranks, found.chosen.point.difference) == (25, pytest.approx(-0.01))
    assert found.chosen.point is found.chosen.refitted and found.chosen.plain.difference == 0.01
    assert found.chosen.point.factors["m"][-3:] == (found.chosen.plain.kept, 7, None)
    assert made_up(costs, Asked(), gain=0.02)[0].chosen.point.ranks == 50
    nowhere, measured = made_up({"path": lambda n: 0.03}, Asked(refit=True), gain=0.02)
    assert nowhere.chosen.point.ranks == 100
    assert measured[6:] == [-75]


def test_training_on_that_does_not_help_is_left(made_up):
    given, _ = made_up({"path": lambda n: 0.01}, Asked(Size(ranks=50), refit=True), gain=-0.02)
    assert given.chosen.point is given.chosen.plain
    deepest, _ = made_up({"path": lambda n: 0.0 if n >= 50 else 1.0}, Asked(refit=True), gain=-0.02)
    assert (deepest.chosen.point.ranks, deepest.chosen.point) == (50, deepest.chosen.plain)
    whole, _ = made_up({"path": lambda n: 0.0}, Asked(Size(ranks=100), refit=True), gain=0.02)
    assert whole.chosen.refitted is None  # nothing left that could be made up for


def test_of_two_orders_that_cut_as_deep_the_better_wins(made_up):
    costs = {"path": lambda n: -0.001 if n >= 25 else 1.0, "values": lambda n: -0.002 if n >= 25 else 1.0}
    assert made_up(costs, Asked())[0].chosen.order == "values"


def test_ranks_that_training_left_are_cut_and_trained_on_as_they_are(made_up):
    costs = {"path": lambda n: 0.0 if n >= 60 else 1.0, "trained": lambda n: 0.0 if n >= 25 else 1.0}
    found, _ = made_up(costs, Asked())
    assert (found.chosen.order, found.chosen.point.ranks, found.chosen.point.factors) == ("trained", 25, THEIRS)
    found, _ = made_up({"trained": lambda n: 0.01}, Asked(Size(ranks=50), refit=True), gain=0.02)
    assert found.chosen.point.factors["m"][-1] == THEIRS
    whole, _ = made_up({"path": lambda n: 0.5, "trained": lambda n: 0.4}, Asked(Size(ranks=100)))
    assert list(whole.curves) == ["path"] and whole.chosen.order is None  # nothing leaves, in whatever order


def test_one_failure_by_chance_ends_no_curve(made_up):
    found, _ = made_up({"path": lambda n: 0.05 if n == 75 else 0.0 if n >= 9 else 1.0}, Asked())
    assert found.chosen.point.ranks == 12


def test_where_every_cut_costs_something_the_whole_stays(made_up):
    found, _ = made_up({"path": lambda n: 0.5, "values": lambda n: 0.4}, Asked())
    assert (found.chosen.order, found.chosen.point.ranks, found.chosen.point.share) == (None, 100, 1.0)
    assert made_up({"path": lambda n: 0.5}, Asked(tolerance=0.5))[0].chosen.point.ranks == 3


def test_a_given_size_takes_the_best_order_and_draws_its_curve(made_up):
    found, _ = made_up({"path": lambda n: 0.3, "values": lambda n: 0.2}, Asked(Size(ranks=40)))
    assert (found.chosen.order, found.chosen.point.ranks) == ("values", 40)
    assert [point.ranks for point in found.curves["path"]] == [100, 40]
    assert [point.ranks for point in found.curves["values"]][:3] == [100, 75, 50]


def test_a_curve_has_no_cut_that_takes_nothing():
    """Half of the ranks had no energy, and left with the basis."""
    assert search._counts(100, 100) == [75, 50, 25, 12, 6, 3]
    assert search._counts(100, 50) == [25, 12, 6, 3]
    assert search._counts(1, 1) == []


def test_one_rank_for_all(made_up):
    found, measured = made_up({"values": lambda n: 0.0 if n >= 20 else 1.0}, Asked(uniform=True))
    assert found.chosen.point.ranks == 25
    assert measured == [75, 50, 25, 12, 6]


def test_on_a_model(tiny_adapter, make_batch):
    """Of every order's points the smallest that holds; and a whole adapter against the base."""
    model = tiny_adapter(r=2, targets=["q_proj", "v_proj"]).eval()
    scoring, judging = [make_batch(rows=4, seed=1)], [make_batch(rows=6, seed=2)]
    found = find_cut(model, scoring, judging, Asked(orders=("path", "values")))
    points = [point for curve in found.curves.values() for point in curve]
    assert found.chosen.point.ranks == min(p.ranks for p in points if p.difference <= 0)
    gain = sum(found.base.rows) / sum(found.base.tokens) - sum(found.whole.rows) / sum(found.whole.tokens)
    assert found.gain[0] == pytest.approx(gain)
    assert found.hurts == (gain < -found.gain[1])


def test_ranks_that_training_left_on_a_model(tiny_adapter, make_batch):
    """Also of modules that have fewer ranks in the basis, or none: against the same ranks cut by hand, from a twin."""
    model, twin = (with_idle_ranks(tiny_adapter(r=4, targets=["q_proj", "v_proj"])).eval() for _ in range(2))
    scoring, judging = [make_batch(rows=4, seed=1)], [make_batch(rows=6, seed=2)]
    found = find_cut(model, scoring, judging, Asked(Size(ranks=5), orders=("values", "trained")))
    taken = found.curves["trained"][1]
    scores = rank_orders(twin, into_basis(twin, "trained"), scoring, ["sum"])["sum"]
    (idle, _), (other, _), *_ = scores.items()
    of_some = {name: of for name, of in scores.items() if name != idle}
    of_some[other][1] = -9.0
    assert taken.kept == kept(of_some, Size(ranks=5), dict.fromkeys(of_some, 1))
    cut(twin, taken.kept)
    with torch.no_grad():
        expected = float(twin(**judging[0]).loss)
    assert taken.loss == pytest.approx(expected, rel=1e-5)
    cut(model, taken.kept, taken.factors)
    for layer, other in zip(gated_layers(model).values(), gated_layers(twin).values(), strict=True):
        assert torch.equal(layer.A, other.A) and torch.equal(layer.B, other.B)


def with_idle_ranks(model):
    """The first module adds nothing, and so leaves the basis; another has rank 3 of 4."""
    first, second, *_ = gated_layers(model).values()
    first.B.data.zero_()
    second.B.data[:, 1] = 0
    return model

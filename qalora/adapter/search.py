"""The cut of an adapter: its basis, the order of its ranks and its size, found by rows that gave no scores.

Which order is best depends on how much the scoring rows tell, so every one has its curve on rows that judge. One of
them leaves the ranks as training left them: a start that gives ranks a meaning may have left ones that can go. At each
size the order is taken that costs least with its standard error added. What stays is trained on by the scoring rows
(refit.py), and stays so where the judging rows are the better for it. Without a given size the smallest is taken that
costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

from peft import PeftModel

from qalora import processes
from qalora.adapter.ablation import MicroBatch
from qalora.adapter.compression import SHARES, Kept, Order, Per, Point, Size, kept, paired, parameters_of
from qalora.adapter.cutting import Losses, losses, point, rank_orders
from qalora.adapter.layer import Factors, factors_of
from qalora.adapter.model import gated_layers, rank_parameters, ranks
from qalora.adapter.principal import Basis, into_basis
from qalora.adapter.refit import refitted
from qalora.adapter.scores import PerRank, check_finite
from qalora.progress import Bar

BASIS: Basis = "svd"
PER: Per = "rank"
ORDERS: tuple[Order, ...] = ("path", "values", "shrunk", "trained")
CLEARLY = 3.0  # standard errors above the whole adapter's loss, twice in a row: a curve goes down no further


@dataclass(frozen=True)
class Asked:
    """
    Attributes:
        size: of the cut; None: the smallest that costs nothing.
        tolerance: nats that it may cost all the same.
        uniform: all modules keep the same number of ranks, as far as they have them.
        orders: that are tried: those of `rank_orders` in the basis, and `trained`, the paper's scores of the ranks that
            training left.
        refit: what stays is trained on, where that helps; refit_steps: by that many steps; None: as refit.py says.
    """

    size: Size | None = None
    tolerance: float = 0.0
    uniform: bool = False
    basis: Basis = BASIS
    orders: tuple[Order, ...] = ORDERS
    per: Per = PER
    refit: bool = False
    refit_steps: int | None = None


@dataclass(frozen=True)
class Ranking:
    """
    Attributes:
        scores: of every rank.
        factors: of the layers, whose ranks these are; None: their own.
    """

    scores: PerRank
    factors: Factors | None = None

    @property
    def adding(self) -> int:
        """How many ranks have energy."""
        return sum(map(math.isfinite, chain(*self.scores.values())))


@dataclass(frozen=True)
class Choice:
    """
    Attributes:
        order: the one that won; None: every rank stays that adds something.
        plain: a point of its curve; refitted: that trained on; None: this was not tried.
        point: which of both is taken.
    """

    order: Order | None
    plain: Point
    refitted: Point | None
    point: Point


@dataclass(frozen=True)
class Cut:
    """
    Attributes:
        curves: order → its points, the largest first; without new weights.
        whole, base: losses of the whole adapter and of the base alone on the rows that judge.
    """

    basis: Basis
    chosen: Choice
    curves: dict[Order, list[Point]]
    whole: Losses
    base: Losses

    @property
    def gain(self) -> tuple[float, float]:
        """(how much lower the whole adapter's loss is than the base's, its standard error)."""
        return paired(self.base.rows, self.whole.rows, self.whole.tokens)

    @property
    def hurts(self) -> bool:
        """Whether the base alone is better than the whole adapter, beyond the standard error."""
        gain, stderr = self.gain
        return gain < -stderr


def find_cut(
    model: PeftModel, scoring: Sequence[MicroBatch], judging: Sequence[MicroBatch], asked: Asked = Asked()
) -> Cut:
    """Brings the adapter into the basis, and finds which of its ranks should stay; none leaves yet, but those without
    energy.

    Args:
        scoring: rows that order the ranks.
        judging: other rows, that decide between orders and sizes.

    Raises:
        AnswerNo: the adapter adds nothing, or a score is not finite.
    """
    with Bar("cutting") as bar:
        return _find_cut(model, scoring, judging, asked, bar)


def _find_cut(
    model: PeftModel, scoring: Sequence[MicroBatch], judging: Sequence[MicroBatch], asked: Asked, bar: Bar
) -> Cut:
    """`find_cut`, whose measurements move a bar."""
    total, widest = sum(ranks(model).values()), max(ranks(model).values())
    trained = ranking_as_trained(model, scoring) if "trained" in asked.orders else None
    values = into_basis(model, asked.basis, scoring)
    orders = {order: Ranking(scores) for order, scores in rank_orders(model, values, scoring, asked.orders).items()}
    whole, base = losses(model, judging), losses(model, judging, {})
    check_finite({}, whole.mean, base.mean)
    costs = rank_parameters(model, values)
    everything = kept(values, Size(), costs)
    leaves = asked.size is None or kept(values, asked.size, costs) != everything
    if trained is not None and (leaves or not orders):  # where nothing does, all orders are one
        orders["trained"] = _of_modules(trained, values)
    count = sum(map(len, everything.values()))
    left = max(map(len, values.values())) if asked.uniform else count
    counts = _counts(widest if asked.uniform else total, left)
    sizes = [Size(max_rank=count) if asked.uniform else Size(ranks=count) for count in counts]
    searched = len(orders) if asked.size is None else 1  # curves; a given size needs that of the best order alone
    bar.expect(searched * len(sizes) + (0 if asked.size is None else len(orders)))

    def measure(order: Order, size: Size) -> Point:
        own = orders[order]
        found = point(model, judging, kept(own.scores, size, costs, asked.per), own.factors, whole=whole, of=total)
        bar.advance()
        return as_written(found)

    def as_written(found: Point) -> Point:
        """With the parameters of modules that are filled up to one rank."""
        if not asked.uniform:
            return found
        rank = max(map(len, found.kept.values()), default=0)
        return replace(found, parameters=rank * sum(costs[name] for name in found.kept))

    start = as_written(Point(count / total, count, parameters_of(everything, costs), whole.mean, 0.0, 0.0, everything))

    def trained_on(order: Order, found: Point) -> Point | None:
        if found.ranks >= orders[order].adding:  # nothing has left that it could make up for
            return None
        train = partial(refitted, model, scoring, found.kept, asked.refit_steps, found.factors)
        return as_written(point(model, judging, found.kept, processes.from_first(train), whole=whole, of=total))

    refit = trained_on if asked.refit else None
    if asked.size is None:
        curves = {order: _descended(partial(measure, order), sizes, asked.tolerance) for order in orders}
        chosen = smallest(curves, asked.tolerance, refit) or Choice(None, start, None, start)
    else:
        at_size = {order: measure(order, asked.size) for order in orders}
        order, plain = best_of(at_size)
        again = refit(order, plain) if refit else None
        chosen = Choice(order if plain.ranks < orders[order].adding else None, plain, again, lowest(plain, again))
        others = _descended(partial(measure, order), sizes, asked.tolerance)
        curves = {order: [found] for order, found in at_size.items()}
        curves[order] += [found for found in others if found.kept != plain.kept]
    curves = {order: _with(start, points) for order, points in curves.items()}
    return Cut(asked.basis, chosen, curves, whole, base)


def ranking_as_trained(model: PeftModel, scoring: Sequence[MicroBatch]) -> Ranking:
    """The paper's scores of the ranks that the adapter has, those without energy last, and a copy of its factors."""
    values = into_basis(model, "trained")
    scores = rank_orders(model, values, scoring, ["sum"])["sum"]
    scores = {
        name: [score if value else -math.inf for score, value in zip(of, values[name], strict=True)]
        for name, of in scores.items()
    }
    return Ranking(scores, {name: (A.clone(), B.clone()) for name, (A, B) in factors_of(gated_layers(model)).items()})


def _of_modules(ranking: Ranking, modules: Collection[str]) -> Ranking:
    """The part of some modules: those that have left add nothing."""
    scores = {name: of for name, of in ranking.scores.items() if name in modules}
    return Ranking(scores, {name: ranking.factors[name] for name in scores} if ranking.factors else None)


def smallest(
    curves: Mapping[Order, Sequence[Point]],
    tolerance: float,
    refit: Callable[[Order, Point], Point | None] | None,
) -> Choice | None:
    """The choice of fewest ranks that `holds`; None: there is none. From the smallest cut that holds as it is, cuts are
    trained on, down to the last that holds so.

    Args:
        tolerance: nats that the loss may be above the whole adapter's.
    """
    falling = [best_of(points) for points in _by_size(curves)]
    held = [index for index, (_, plain) in enumerate(falling) if plain.holds(tolerance)]
    found = None
    for order, plain in falling[held[-1] if held else 0 :]:
        again = refit(order, plain) if refit else None
        holding = [each for each in (plain, again) if each and each.holds(tolerance)]
        if not holding:
            break
        found = Choice(order, plain, again, lowest(*holding))
    return found


def best_of(points: Mapping[Order, Point]) -> tuple[Order, Point]:
    """Of cuts of one size, by order, the one of the lowest bound."""
    order = min(points, key=lambda order: points[order].bound)
    return order, points[order]


def lowest(*points: Point | None) -> Point:
    """The point of the lowest bound."""
    return min(filter(None, points), key=lambda point: point.bound)


def _by_size(curves: Mapping[Order, Sequence[Point]]) -> Iterator[dict[Order, Point]]:
    """The points of each size, by order, the largest first."""
    for count in sorted({each.ranks for points in curves.values() for each in points}, reverse=True):
        yield {order: each for order, points in curves.items() for each in points if each.ranks == count}


def cut_by_values(model: PeftModel, asked: Asked) -> Kept:
    """The ranks that stay by singular values alone, without any row, at the size that is asked for."""
    values: PerRank = into_basis(model, "svd")
    orders: tuple[Order, ...] = ("values",)
    scores = rank_orders(model, values, (), orders)["values"]
    return kept(scores, asked.size or Size(), rank_parameters(model, values), asked.per)


def _counts(largest: int, left: int) -> list[int]:
    """Numbers of ranks at the curve's shares of the largest, falling: those below what is left of it in the basis."""
    counts = {max(1, math.floor(share * largest + 1e-9)) for share in SHARES}
    return sorted((count for count in counts if count < left), reverse=True)


def _with(start: Point, points: Sequence[Point]) -> list[Point]:
    """A curve with the whole adapter at its beginning, once."""
    return [start, *sorted((found for found in points if found.kept != start.kept), key=lambda found: -found.ranks)]


def _descended(measure: Callable[[Size], Point], sizes: Sequence[Size], tolerance: float) -> list[Point]:
    """A curve, as far down as it is of interest."""
    found: list[Point] = []
    worse = 0
    for size in sizes:
        found.append(measure(size))
        worse = worse + 1 if found[-1].difference > tolerance + CLEARLY * found[-1].stderr else 0
        if worse == 2:
            break
    return found

"""The cut of an adapter: its basis, the order of its ranks and its size, found by rows that gave no scores.

Which order is best depends on how much the scoring rows tell, so every one has its curve, and the curves decide: at a
given size the lowest loss, without one the smallest size that costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

from peft import PeftModel

from qalora.adapter.ablation import MicroBatch
from qalora.adapter.compression import SHARES, Kept, Order, Per, Point, Size, kept, paired, parameters_of, smallest
from qalora.adapter.cutting import Losses, losses, point, rank_orders
from qalora.adapter.model import rank_parameters, ranks
from qalora.adapter.principal import Basis, into_basis
from qalora.adapter.scores import PerRank

Measure = Callable[[Size], Point]
BASIS: Basis = "svd"
PER: Per = "rank"
ORDERS: tuple[Order, ...] = ("path", "values", "shrunk")
CLEARLY = 3.0  # standard errors above the whole adapter's loss, twice in a row: a curve goes down no further
BISECTIONS = 2  # between the smallest size that costs nothing and the next that does


@dataclass(frozen=True)
class Asked:
    """
    Attributes:
        size: of the cut; None: the smallest that costs nothing.
        tolerance: nats that it may cost all the same.
        uniform: all modules keep the same number of ranks, as far as they have them.
        orders: that are tried.
    """

    size: Size | None = None
    tolerance: float = 0.0
    uniform: bool = False
    basis: Basis = BASIS
    orders: tuple[Order, ...] = ORDERS
    per: Per = PER


@dataclass(frozen=True)
class Cut:
    """
    Attributes:
        order: the one that won.
        chosen: a point of its curve.
        curves: order → its points, the largest first.
        whole, base: losses of the whole adapter and of the base alone on the rows that judge.
    """

    basis: Basis
    order: Order
    chosen: Point
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
    total, widest = sum(ranks(model).values()), max(ranks(model).values())
    values = into_basis(model, asked.basis, scoring)
    orders = rank_orders(model, values, scoring, asked.orders)
    whole, base = losses(model, judging), losses(model, judging, {})
    costs = rank_parameters(model, values)

    def measured(order: Order) -> Measure:
        return lambda size: point(model, judging, kept(orders[order], size, costs, asked.per), whole=whole, of=total)

    measures = {order: measured(order) for order in orders}
    everything = kept(values, Size(), costs)
    start = Point(
        sum(map(len, everything.values())) / total,
        sum(map(len, everything.values())),
        parameters_of(everything, costs),
        whole.mean,
        0.0,
        0.0,
        everything,
    )
    find = _smallest if asked.size is None else _of_size
    best, chosen, curves = find(measures, asked, start, widest if asked.uniform else total)
    curves = {order: sorted([start, *points], key=lambda found: -found.parameters) for order, points in curves.items()}
    return Cut(asked.basis, best, chosen, curves, whole, base)


def cut_by_values(model: PeftModel, asked: Asked) -> Kept:
    """The ranks that stay by singular values alone, without any row, at the size that is asked for."""
    values: PerRank = into_basis(model, "svd")
    orders: tuple[Order, ...] = ("values",)
    scores = rank_orders(model, values, (), orders)["values"]
    return kept(scores, asked.size or Size(), rank_parameters(model, values), asked.per)


Curves = dict[Order, list[Point]]


def _of_size(
    measures: Mapping[Order, Measure], asked: Asked, start: Point, largest: int
) -> tuple[Order, Point, Curves]:
    """Every order at the size that is asked for, and the curve of the best of them."""
    curves: Curves = {order: [measure(asked.size or Size())] for order, measure in measures.items()}
    best = min(curves, key=lambda order: curves[order][0].loss)
    chosen = curves[best][0]
    curves[best] += [here for _, here in _descended(measures[best], asked, largest) if here.kept != chosen.kept]
    return best, chosen, curves


def _smallest(
    measures: Mapping[Order, Measure], asked: Asked, start: Point, largest: int
) -> tuple[Order, Point, Curves]:
    """Every order's curve, and the smallest size on any of them that costs nothing."""
    down = {order: _descended(measure, asked, largest) for order, measure in measures.items()}
    curves: Curves = {order: [here for _, here in points] for order, points in down.items()}
    ends = {order: smallest([start, *points], asked.tolerance) for order, points in curves.items()}
    best = min(ends, key=lambda order: (ends[order].parameters, ends[order].loss))
    curves[best] += _between(measures[best], asked, down[best], ends[best], largest)
    return best, smallest([start, *curves[best]], asked.tolerance), curves


def _size(count: int, asked: Asked) -> Size:
    return Size(max_rank=count) if asked.uniform else Size(ranks=count)


def _descended(measure: Measure, asked: Asked, largest: int) -> list[tuple[int, Point]]:
    """Numbers of ranks, of all modules or of each, with what they cost: as far down as it is of interest."""
    counts = {max(1, round(share * largest)) for share in SHARES} - {largest}
    found: list[tuple[int, Point]] = []
    worse = 0
    for count in sorted(counts, reverse=True):
        here = measure(_size(count, asked))
        found.append((count, here))
        worse = worse + 1 if here.difference > asked.tolerance + CLEARLY * here.stderr else 0
        if worse == 2:
            break
    return found


def _between(
    measure: Measure, asked: Asked, down: Sequence[tuple[int, Point]], chosen: Point, largest: int
) -> list[Point]:
    """Further points between the smallest size that holds and the next smaller one, which does not."""
    good = min((count for count, here in down if here.parameters >= chosen.parameters), default=largest)
    bad = max((count for count, here in down if here.parameters < chosen.parameters), default=good)
    found: list[Point] = []
    for _ in range(BISECTIONS):
        middle = round(sqrt(good * bad))
        if middle in (good, bad):
            break
        found.append(measure(_size(middle, asked)))
        if found[-1].holds(asked.tolerance):
            good = middle
        else:
            bad = middle
    return found

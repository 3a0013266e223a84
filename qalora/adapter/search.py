"""The cut of an adapter: its basis, the order of its ranks and its size, found by rows that gave no scores.

Which order is best depends on how much the scoring rows tell, so every one has its curve, and the curves decide: at a
given size the lowest loss, without one the smallest size that costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from peft import PeftModel

from qalora.adapter.ablation import MicroBatch
from qalora.adapter.compression import SHARES, Kept, Order, Per, Point, Size, kept, paired, parameters_of, smallest
from qalora.adapter.cutting import Losses, losses, point, rank_orders
from qalora.adapter.model import rank_parameters, ranks
from qalora.adapter.principal import Basis, into_basis
from qalora.adapter.scores import PerRank, check_finite
from qalora.progress import Bar

BASIS: Basis = "svd"
PER: Per = "rank"
ORDERS: tuple[Order, ...] = ("path", "values", "shrunk")
CLEARLY = 3.0  # standard errors above the whole adapter's loss, twice in a row: a curve goes down no further


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
    with Bar("cutting") as bar:
        return _find_cut(model, scoring, judging, asked, bar)


def _find_cut(
    model: PeftModel, scoring: Sequence[MicroBatch], judging: Sequence[MicroBatch], asked: Asked, bar: Bar
) -> Cut:
    """`find_cut`, whose measurements move a bar."""
    total, widest = sum(ranks(model).values()), max(ranks(model).values())
    values = into_basis(model, asked.basis, scoring)
    orders = rank_orders(model, values, scoring, asked.orders)
    whole, base = losses(model, judging), losses(model, judging, {})
    check_finite({}, whole.mean, base.mean)
    costs = rank_parameters(model, values)
    everything = kept(values, Size(), costs)
    count = sum(map(len, everything.values()))
    start = Point(count / total, count, parameters_of(everything, costs), whole.mean, 0.0, 0.0, everything)
    counts = _counts(widest if asked.uniform else total)
    searched = len(orders) if asked.size is None else 1  # curves; a given size needs that of the best order alone
    bar.expect(searched * len(counts) + (0 if asked.size is None else len(orders)))
    sizes = [Size(max_rank=count) if asked.uniform else Size(ranks=count) for count in counts]

    def measure(order: Order, size: Size) -> Point:
        found = point(model, judging, kept(orders[order], size, costs, asked.per), whole=whole, of=total)
        bar.advance()
        return found

    if asked.size is None:
        curves = {order: _descended(partial(measure, order), sizes, asked.tolerance) for order in orders}
        ends = {order: smallest([start, *points], asked.tolerance) for order, points in curves.items()}
        best = min(ends, key=lambda order: (ends[order].ranks, ends[order].loss))
        chosen = ends[best]
    else:
        at_size = {order: measure(order, asked.size) for order in orders}
        best = min(at_size, key=lambda order: at_size[order].loss)
        chosen = at_size[best]
        others = _descended(partial(measure, best), sizes, asked.tolerance)
        curves = {order: [found] for order, found in at_size.items()}
        curves[best] += [found for found in others if found.kept != chosen.kept]
    curves = {order: sorted([start, *points], key=lambda found: -found.ranks) for order, points in curves.items()}
    return Cut(asked.basis, best, chosen, curves, whole, base)


def cut_by_values(model: PeftModel, asked: Asked) -> Kept:
    """The ranks that stay by singular values alone, without any row, at the size that is asked for."""
    values: PerRank = into_basis(model, "svd")
    orders: tuple[Order, ...] = ("values",)
    scores = rank_orders(model, values, (), orders)["values"]
    return kept(scores, asked.size or Size(), rank_parameters(model, values), asked.per)


def _counts(largest: int) -> list[int]:
    """Numbers of ranks below the largest, at the curve's shares of it, falling."""
    return sorted({max(1, round(share * largest)) for share in SHARES} - {largest}, reverse=True)


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

"""Pictures of a run: where the ranks went, and what the loss did meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from qalora.rank_grid import grid, signed
from qalora.results.compression import ORDERS

DPI = 150
BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#8c8c8c"


def draw_ranks(ranks: Mapping[str, int], start: Mapping[str, int], path: str | Path) -> None:
    """Heat map of the final ranks: a row for each block, a column for each kind of module.

    A cell shows the final rank and its change; its colour is the change alone. A module without ranks is
    hatched.

    Args:
        ranks: full module name → final rank; a module that is missing has none left.
        start: full module name → rank at the start; every module of the picture.
        path: where the PNG goes.
    """
    rows, columns, _ = grid(start)
    height = _row_height(rows)
    figure = Figure(figsize=(max(2.2 + 0.9 * len(columns), 6.0), 1.5 + height * len(rows)), layout="constrained")
    _draw_map(figure.add_subplot(), ranks, start, height)
    _save(figure, path)


def draw_compression(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    chosen: tuple[str | None, Mapping[str, float]] | None,
    losses: Mapping[str, float],
    ranks: Mapping[str, int],
    start: Mapping[str, int],
    path: str | Path,
) -> None:
    """A cut: the loss of every order of the ranks against the share that is kept, and the rank map of what is.

    Args:
        curves: order → points with `share`, `loss` and `stderr`, the standard error of its difference from the whole,
            if known; none: no row was read.
        chosen: the order, None where every rank stays, and the point that were taken.
        losses: of the `whole` adapter and of the `base` alone.
        ranks, start: as of `draw_ranks`.
    """
    rows, columns, _ = grid(start)
    height = _row_height(rows)
    width = max(2.2 + 0.9 * len(columns), 6.0)
    top = 3.4 if chosen else 0.0
    figure = Figure(figsize=(width, 1.5 + height * len(rows) + top), layout="constrained")
    if chosen is None:
        _draw_map(figure.add_subplot(), ranks, start, height)
    else:
        upper, lower = figure.subplots(2, 1, height_ratios=(top, 1.5 + height * len(rows)))
        _draw_curves(upper, curves, chosen, losses)
        _draw_map(lower, ranks, start, height)
    _save(figure, path)


def _draw_curves(
    axes: Axes,
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    chosen: tuple[str | None, Mapping[str, float]],
    losses: Mapping[str, float],
) -> None:
    _tidy(axes)
    best, taken = chosen
    dashes = iter(("-", "--", ":", "-."))
    for order, points in curves.items():
        color, width, line = (BLUE, 1.6, "-") if order == best else (GREY, 1.0, next(dashes))
        shares, values = [point["share"] for point in points], [point["loss"] for point in points]
        axes.plot(
            shares,
            values,
            marker="o",
            markersize=3.5,
            label=ORDERS[order],
            color=color,
            linewidth=width,
            linestyle=line,
        )
        if order == best:
            errors = [point["stderr"] or 0.0 for point in points]  # none of a single row
            low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(shares, low, high, color=BLUE, alpha=0.12, linewidth=0)
    axes.axhline(losses["whole"], color=ORANGE, linewidth=1, linestyle="--", label="whole adapter")
    if losses["base"] <= max(point["loss"] for points in curves.values() for point in points):
        axes.axhline(losses["base"], color=ORANGE, linewidth=1, linestyle=":", label="base alone")
    axes.plot([taken["share"]], [taken["loss"]], marker="o", markersize=9, color=BLUE, fillstyle="none", linestyle="")
    axes.set_xscale("log")
    least = min(point["share"] for points in curves.values() for point in points)
    axes.set_xticks([share for share in (1, 0.5, 0.25, 0.125, 0.06, 0.03, 0.015) if share >= least])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.invert_xaxis()
    axes.set_xlabel("ranks kept")
    axes.set_ylabel("loss, nats a token")
    how = f", ordered by {ORDERS[best]}" if best else ""
    axes.set_title(f"Kept: {taken['share']:.1%} of the ranks{how}", size=10)
    axes.legend(frameon=True, framealpha=0.9, edgecolor="none", fontsize=8)


def _row_height(rows: Sequence[str]) -> float:
    """Inches a row of the rank map: 2 to 80 blocks stay readable."""
    return min(max(0.24, 9 / len(rows)), 0.4)


def _draw_map(axes: Axes, ranks: Mapping[str, int], start: Mapping[str, int], height: float) -> None:
    rows, columns, place = grid(start)
    figure: Any = axes.figure

    changes = {name: ranks.get(name, 0) - before for name, before in start.items()}
    norm = TwoSlopeNorm(0, min(-1, *changes.values()), max(1, *changes.values()))
    cells = [[float("nan")] * len(columns) for _ in rows]
    for name, (row, column) in place.items():
        cells[row][column] = changes[name]
    image = axes.imshow(cells, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")

    size = min(9.0, 30 * height)
    for name, (row, column) in place.items():
        shade = abs(norm(changes[name]) - 0.5)
        color = "white" if shade > 0.33 else "black"
        if not ranks.get(name, 0):
            color = "white"
            axes.add_patch(
                Rectangle(
                    (column - 0.5, row - 0.5),
                    1,
                    1,
                    facecolor="#333333",
                    edgecolor="#777777",
                    hatch="////",
                    linewidth=0,
                )
            )
        axes.text(
            column - 0.06,
            row,
            str(ranks.get(name, 0)),
            ha="right",
            va="center",
            size=size,
            color=color,
            weight="bold",
        )
        axes.text(column + 0.04, row, signed(changes[name]), ha="left", va="center", size=0.78 * size, color=color)

    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelsize=max(size, 7), top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_xticks([i - 0.5 for i in range(1, len(columns))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("block")
    empty = sum(not ranks.get(name, 0) for name in start)
    axes.set_title(
        f"Ranks per module: {sum(ranks.values()):,} at the end, {sum(start.values()):,} at the start"
        + (f"; hatched: no rank left ({empty})" if empty else ""),
        size=10,
    )
    bar = figure.colorbar(image, ax=axes, label="change from the start", aspect=30, fraction=0.04, pad=0.02)
    bar.ax.set_yscale("linear")
    bar.locator = MaxNLocator(nbins=9, integer=True)
    bar.outline.set_visible(False)


def draw_loss(
    log_history: Sequence[Mapping[str, Any]],
    allocation_steps: Sequence[int],
    path: str | Path,
    *,
    total_rank: Mapping[int, int] | None = None,
    budget: int | None = None,
) -> None:
    """Training and validation loss over optimizer steps, with a mark at each allocation round.

    Args:
        log_history: the Trainer's: entries with `step` and `loss` (nats a token) or `eval_loss`.
        allocation_steps: optimizer steps after which a round took place.
        path: where the PNG goes.
        total_rank: optimizer step → total rank from then on; draws a second, smaller panel.
        budget: ranks that the total never exceeds; shown in that panel.
    """
    figure = Figure(figsize=(8, 5.5 if total_rank else 4.5), layout="constrained")
    if total_rank:
        losses, totals = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        _draw_totals(totals, total_rank, budget, _last_step(log_history))
        _mark(totals, allocation_steps)
        totals.set_xlabel("optimizer step")
    else:
        losses = figure.add_subplot()
        losses.set_xlabel("optimizer step")
    _tidy(losses)
    _mark(losses, allocation_steps, label="allocation round")

    for key, label, style in (
        ("loss", "training", dict(color=BLUE, linewidth=1.4)),
        ("eval_loss", "validation", dict(color=ORANGE, linewidth=1, marker="o", markersize=5)),
    ):
        points = [(entry["step"], float(entry[key])) for entry in log_history if key in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=label, **style)
            if key == "eval_loss":
                step, loss = min(points, key=lambda point: point[1])
                losses.annotate(
                    f"best {loss:.4f}",
                    (step, loss),
                    (0, -14),
                    textcoords="offset points",
                    ha="center",
                    size=8,
                    color=ORANGE,
                )
    losses.margins(y=0.12)
    losses.set_ylabel("loss, nats a token")
    losses.set_title("Loss", size=11)
    if losses.lines:
        losses.legend(frameon=False, loc="upper right")
    _save(figure, path)


def _draw_totals(axes: Axes, total_rank: Mapping[int, int], budget: int | None, last: int) -> None:
    steps = sorted(total_rank)
    totals = [total_rank[step] for step in steps]
    axes.step([*steps, max(last, steps[-1])], [*totals, totals[-1]], where="post", color=BLUE, linewidth=1.4)
    _tidy(axes)
    axes.set_ylabel("total rank")
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    top = max([*totals, budget or 0])
    low = min(totals)
    axes.set_ylim(low - 0.35 * (top - low) - 1, top + 0.35 * (top - low) + 1)
    if budget is not None:
        axes.axhline(budget, color=ORANGE, linewidth=1, linestyle="--")
        where: dict[str, Any] = dict(xycoords=("axes fraction", "data"), textcoords="offset points")
        style: dict[str, Any] = dict(ha="right", va="top", size=8, color=ORANGE)
        axes.annotate(f"budget {budget:,}", (1, budget), (-4, -3), **where, **style)


def _mark(axes: Axes, steps: Sequence[int], label: str = "_") -> None:
    for i, step in enumerate(steps):
        axes.axvline(step, color=GREY, linewidth=0.8, linestyle=":", label=label if i == 0 else "_", zorder=0)


def _tidy(axes: Axes) -> None:
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _last_step(log_history: Sequence[Mapping[str, Any]]) -> int:
    return max((int(entry["step"]) for entry in log_history), default=0)


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI, metadata={"Software": "qalora"})

"""The figures of a run's page, as plotly's figures, in the colours of a light page; `DARK` has those of a dark one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import plotly.graph_objects as go

from qalora.memory import GONE, KEPT
from qalora.rank_grid import grid
from qalora.results.facts import RunFacts

INK, MUTED, GRID, PANEL = "#1c2330", "#6b7484", "#e5e8ee", "#ffffff"
BLUE, ORANGE = "#2563c9", "#d9541e"
SERIES = ("#2f6fd0", "#5b9bd5", "#1d9a8a", "#7cb342", "#e0a526", "#d9541e", "#a64d9c", "#8c93a3")
# Few ranks to many, around those of the start.
RANKS = ("#2166ac", "#8bbbdd", "#f1f3f6", "#f2a284", "#b2182b")
# Each colour above, on a dark page.
DARK = {
    INK: "#e8ebf1", MUTED: "#98a2b3", GRID: "#2c3442", PANEL: "#171d27",
    BLUE: "#6fa8ff", ORANGE: "#ff8f5e",
    **dict(zip(
        SERIES, ("#5a97ee", "#86bdf0", "#3dbdac", "#9ccc65", "#f2c14e", "#ff8f5e", "#c97fc0", "#a9b0be"), strict=True,
    )),
    **dict(zip(RANKS, ("#5aa2ec", "#33608f", "#232b38", "#9c4a2e", "#ff7a4d"), strict=True)),
}  # fmt: skip
MIB = 2**20


def losses(run: RunFacts) -> go.Figure | None:
    """Training and validation loss over optimizer steps, with a line at each round of allocation."""
    figure = go.Figure()
    training, validation = _points(run.log, "loss"), _points(run.log, "eval_loss")
    if training:
        figure.add_scatter(
            x=[step for step, _ in training],
            y=[loss for _, loss in training],
            name="training",
            mode="lines" if len(training) > 1 else "markers",
            line=dict(color=BLUE, width=2),
            hovertemplate="step %{x}<br>%{y:.4f}<extra>training</extra>",
        )
    if validation:
        figure.add_scatter(
            x=[step for step, _ in validation],
            y=[loss for _, loss in validation],
            name="validation",
            mode="lines+markers",
            line=dict(color=ORANGE, width=2),
            marker=dict(size=7),
            hovertemplate="step %{x}<br>%{y:.4f}<extra>validation</extra>",
        )
    if not figure.data:
        return None
    for record in run.rounds:
        figure.add_vline(x=record["step"], line=dict(color=MUTED, width=1, dash="dot"))
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title="nats per token")
    return _laid_out(figure, 300)


def speed(run: RunFacts) -> go.Figure | None:
    """Tokens per second over optimizer steps, as the log has them: the mean since training began."""
    points = _points(run.log, "tokens_per_second")
    if len(points) < 2:
        return None
    figure = go.Figure()
    figure.add_scatter(
        x=[step for step, _ in points],
        y=[rate for _, rate in points],
        mode="lines",
        line=dict(color=BLUE, width=2),
        hovertemplate="step %{x}<br>%{y:,.0f} tokens per second<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title="tokens per second", rangemode="tozero")
    return _laid_out(figure, 240)


def drawn_terms(plan: Mapping[str, Any]) -> dict[str, int]:
    """The terms of a plan, in bytes, none of them below zero: what is gone again is taken off what the blocks kept."""
    terms = {name: size for name, size in (plan.get("terms") or {}).items() if size}
    gone = terms.pop(GONE, 0)
    return {name: size + gone if name in KEPT else size for name, size in terms.items()}


def memory(run: RunFacts) -> go.Figure | None:
    """The plan by term, one bar, above the measured peak, another."""
    plan, measured = run.metrics.get("plan") or {}, (run.metrics.get("train") or {}).get("peak_memory_bytes")
    terms = drawn_terms(plan)
    if not terms and measured is None:
        return None
    figure = go.Figure()
    for (name, size), color in zip(terms.items(), cycle(SERIES), strict=False):
        figure.add_bar(
            y=["planned"],
            x=[size / MIB],
            name=name,
            orientation="h",
            marker=dict(color=color, line=dict(width=1, color=PANEL)),
            hovertemplate=f"{name}<br>%{{x:,.1f}} MiB<extra></extra>",
        )
    if measured is not None:
        figure.add_bar(
            y=["measured"],
            x=[measured / MIB],
            name="peak",
            orientation="h",
            marker=dict(color=INK),
            hovertemplate="measured peak<br>%{x:,.1f} MiB<extra></extra>",
            showlegend=False,
        )
    figure.update_layout(barmode="stack", bargap=0.35, showlegend=False)
    figure.update_xaxes(title="MiB")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return _laid_out(figure, 170)


def rank_map(run: RunFacts) -> tuple[go.Figure, list[dict[str, object]]] | None:
    """(the map of the first state, for each state its label, its total, and its ranks): a column per block, a row per
    kind."""
    states = run.states
    if not states:
        return None
    names = list(dict.fromkeys(name for _, ranks in states for name in ranks))
    blocks, kinds, place = grid(names)
    first = states[0][1]
    cells = [_cells(ranks, first, place, len(kinds), len(blocks)) for _, ranks in states]
    most = max(max(ranks.values(), default=0) for _, ranks in states)
    middle = sorted(first.values())[len(first) // 2] if first else 0
    reach = max(most - middle, middle, 1)
    figure = go.Figure()
    figure.add_heatmap(
        z=cells[-1]["ranks"],
        customdata=cells[-1]["changes"],
        text=cells[-1]["texts"],
        x=blocks,
        y=kinds,
        zmin=middle - reach,
        zmax=middle + reach,
        colorscale=[[i / (len(RANKS) - 1), color] for i, color in enumerate(RANKS)],
        xgap=1.5,
        ygap=1.5,
        texttemplate="%{text}",
        hovertemplate="block %{x} · %{y}<br>rank %{z}%{customdata}<extra></extra>",
        showscale=False,
        hoverongaps=False,
    )
    figure.update_xaxes(title="block", type="category", showgrid=False, zeroline=False)
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, zeroline=False)
    steps = [
        {"label": label, "total": sum(ranks.values()), **cell}
        for (label, ranks), cell in zip(states, cells, strict=True)
    ]
    return _laid_out(figure, 110 + 30 * len(kinds)), steps


def _cells(
    ranks: Mapping[str, int], first: Mapping[str, int], place: Mapping[str, tuple[int, int]], rows: int, columns: int
) -> dict[str, list[list[object]]]:
    found: dict[str, list[list[Any]]] = {
        name: [[None] * columns for _ in range(rows)] for name in ("ranks", "changes", "texts")
    }
    for name, (column, row) in place.items():
        rank, change = ranks.get(name, 0), ranks.get(name, 0) - first.get(name, 0)
        found["ranks"][row][column] = rank
        found["changes"][row][column] = f" ({change:+d} since the start)".replace("-", "−") if change else ""
        found["texts"][row][column] = str(rank)
    return found


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(int(entry["step"]), float(entry[key])) for entry in log if key in entry and "step" in entry]


def _laid_out(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        template="none",
        height=height,
        margin=dict(l=64, r=16, t=16, b=48),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend=dict(orientation="h", x=0, y=1.02, xanchor="left", yanchor="bottom"),
        font=dict(color=INK, size=12, family="inherit"),
        hoverlabel=dict(align="left", bgcolor=PANEL, bordercolor=MUTED, font=dict(color=INK)),
    )
    axis = dict(automargin=True, zeroline=False, gridcolor=GRID, linecolor=GRID, fixedrange=True, ticks="")
    figure.update_xaxes(**axis, title_font_color=MUTED, tickfont_color=MUTED)
    figure.update_yaxes(**axis, title_font_color=MUTED, tickfont_color=MUTED)
    return figure

"""The page of a run: one HTML file that needs no network, of what the run's folder says.

`render` is a pure function of the facts. plotly draws, with its script inside the file; style and script of the page
lie beside this module.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from itertools import cycle
from typing import Any

from qalora import __version__
from qalora.results.facts import RunFacts, without_paths

ANSWERS = 3
SCORES = {"exact_match": "exact match", "accuracy": "accuracy", "rougeL": "ROUGE-L"}


def render(run: RunFacts) -> str:
    """The page as text, with everything in it."""
    from plotly.offline import get_plotlyjs

    from qalora.results import figures as drawn

    ranks = drawn.rank_map(run)
    figures = {
        "losses": drawn.losses(run),
        "rank-map": ranks and ranks[0],
        "speed": drawn.speed(run),
        "memory": drawn.memory(run),
    }
    there = {name: json.loads(figure.to_json()) for name, figure in figures.items() if figure is not None}
    states = ranks[1] if ranks else []
    data = {"figures": there, "states": states, "dark": drawn.DARK}
    body = "\n".join(
        [
            _header(run),
            _tiles(run),
            _loss_section(run) if "losses" in there else "",
            _rank_section(run, len(states)) if states else "",
            _pair(_speed_section() if "speed" in there else "", _memory_section(run) if "memory" in there else ""),
            _answers(run),
            _settings(run),
            f"<footer>Written by qalora {escape(__version__)} from the files of the run's folder.</footer>",
        ]
    )
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(run.name)} · qalora</title>
<link rel="icon" href="data:,">
<style>
{_beside("page.css")}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="figures">{_embedded(data)}</script>
<script>{get_plotlyjs()}</script>
<script>
{_beside("page.js")}</script>
</body>
</html>
"""
    return page.encode("utf-8", "replace").decode("utf-8")


def _header(run: RunFacts) -> str:
    said = [without_paths(str(run.recipe.get("model") or "")), run.recipe_name and f"recipe {run.recipe_name}"]
    if run.train_rows is not None:
        said.append(f"{run.train_rows:,} training rows")
    if steps := (run.metrics.get("train") or {}).get("steps"):
        said.append(f"{steps:,} optimizer steps")
    elif run.log:
        said.append(f"{max(int(entry.get('step', 0)) for entry in run.log):,} optimizer steps so far")
    return f"<header><h1>{escape(run.name)}</h1><p>{escape(' · '.join(part for part in said if part))}</p></header>"


def _tiles(run: RunFacts) -> str:
    before, after = run.metrics.get("before") or {}, run.metrics.get("after") or {}
    train, allocation = run.metrics.get("train") or {}, run.metrics.get("allocation") or {}
    tiles = []
    for name, label, unit in (
        ("loss", "loss, nats per token", ""),
        *((key, label, " %") for key, label in SCORES.items()),
    ):
        values = [
            f"{figures[name]:.3f}" if not unit else f"{figures[name]:.1f}"
            for figures in (before, after)
            if name in figures
        ]
        if values:
            when = ", before → after" if len(values) == 2 else ", after" if name in after else ", before"
            tiles.append((" → ".join(values) + unit, label + when))
    if allocation:
        tiles.append((f"{allocation['total_rank']:,} of {allocation['budget']:,}", "ranks, of the budget"))
    if train:
        tiles.append((f"{train['tokens_per_second']:,.0f}", "tokens per second"))
        tiles.append((f"{train['peak_memory_bytes'] / 2**30:.2f} GiB", "peak memory"))
        tiles.append((_duration(train["seconds"]), "training"))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>' for value, label in tiles
    )
    return f'<div class="tiles">{cells}</div>' if tiles else ""


def _loss_section(run: RunFacts) -> str:
    rounds = "Dotted lines are rounds of allocation." if run.rounds else ""
    best = min((entry["eval_loss"] for entry in run.log if "eval_loss" in entry), default=None)
    note = " ".join(text for text in (f"Best validation loss {best:.4f}." if best is not None else "", rounds) if text)
    return _section("Loss", note, '<div class="plot" id="losses"></div>')


def _rank_section(run: RunFacts, count: int) -> str:
    slider = ""
    if count > 1:
        slider = (
            f'<div class="slider"><input type="range" id="round" min="0" max="{count - 1}" step="1" '
            f'value="{count - 1}" '
            'aria-label="state of the ranks"><output for="round" id="round-said"></output></div>'
        )
    moved = (
        "Blue has fewer ranks than most had at the start, red more."
        if count > 1
        else "No round of allocation moved them."
    )
    return _section("Ranks per linear layer", moved, f'{slider}<div class="plot" id="rank-map"></div>')


def _speed_section() -> str:
    return _section(
        "Tokens per second", "Mean since training began, evaluations included.", '<div class="plot" id="speed"></div>'
    )


def _memory_section(run: RunFacts) -> str:
    plan = run.metrics.get("plan") or {}
    notes = []
    if plan:
        notes.append(f"Planned {_size(plan['total'])} for rows of {plan['seq_len']:,} tokens.")
    if peak := (run.metrics.get("train") or {}).get("peak_memory_bytes"):
        what = "the whole process, programs and libraries included" if plan.get("device") == "cpu" else "the peak"
        notes.append(f"Measured {_size(peak)}, {what}.")
    return _section("Memory", " ".join(notes), f'<div class="plot" id="memory"></div>{_terms(plan)}')


def _terms(plan: Mapping[str, Any]) -> str:
    """The legend of the planned bar, with each term's size."""
    from qalora.results.figures import DARK, SERIES, drawn_terms

    items = "".join(
        f'<li><i style="--light:{color};--dark:{DARK[color]}"></i>{escape(name)}<b>{_size(size)}</b></li>'
        for (name, size), color in zip(drawn_terms(plan).items(), cycle(SERIES), strict=False)
    )
    return f'<ul class="legend">{items}</ul>' if items else ""


def _answers(run: RunFacts) -> str:
    """The first rows that were answered before or after, as the evaluation wrote them."""
    after = {line.get("row"): line for line in run.after}
    lines = [line for line in (run.after or run.before) if "answer" in line][:ANSWERS]
    before = {line.get("row"): line for line in run.before}
    if not lines:
        asked = (run.recipe.get("evaluation") or {}).get("metrics")
        if not asked or {"exact_match", "accuracy", "rougeL"} & set(asked):
            return ""
        note = "evaluation.metrics asks for no answers; exact_match, rougeL or accuracy write them."
        return _section("Answers before and after", note, "")
    shown = "".join(_answer(line, before.get(line.get("row")), after.get(line.get("row"))) for line in lines)
    return _section("Answers before and after", f"The first {len(lines)} validation rows.", shown)


def _answer(line: Mapping[str, object], before: Mapping[str, object] | None, after: Mapping[str, object] | None) -> str:
    cells = [
        _cell(when, found) for when, found in (("before", before), ("after", after)) if found and "answer" in found
    ]
    cells.append(f'<div><h3>reference</h3><p class="text">{escape(str(line.get("reference", "")))}</p></div>')
    prompt = escape(str(line.get("prompt", "")).strip())
    return f'<div class="answer"><p class="text prompt">{prompt}</p><div class="pair">{"".join(cells)}</div></div>'


def _cell(when: str, found: Mapping[str, object]) -> str:
    score = next(((label, found[name]) for name, label in SCORES.items() if name in found), None)
    right = score is not None and score[1] == 100.0
    said = "" if score is None else f" · {score[0]} {score[1]:.0f} %"
    text = escape(str(found["answer"])) or "<em>(empty)</em>"
    return f'<div class="{"right" if right else "other"}"><h3>{when}{said}</h3><p class="text">{text}</p></div>'


def _settings(run: RunFacts) -> str:
    if not run.recipe:
        return ""
    command = ""
    if run.command is not None:
        command = f'<pre class="command">{escape(shlex.join(["qalora", "finetune", *run.command]))}</pre>'
    sections = {"run": {name: value for name, value in run.recipe.items() if not isinstance(value, dict)}}
    sections |= {name: value for name, value in run.recipe.items() if isinstance(value, dict)}
    tables = "".join(_settings_table(name, settings) for name, settings in sections.items() if settings)
    return (
        f"<section><details open><summary>Settings</summary>{command}<div "
        f'class="settings">{tables}</div></details></section>'
    )


def _settings_table(name: str, settings: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(_shown(value))}</td></tr>" for key, value in settings.items()
    )
    return f"<table><caption>{escape(name)}</caption>{rows}</table>"


def _section(title: str, note: str, content: str) -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{content}</section>"


def _pair(left: str, right: str) -> str:
    return f'<div class="two">{left}{right}</div>' if left and right else left + right


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False) if value else "–"
    return str(value)


def _size(size: float) -> str:
    if size < 2**20:
        return f"{size / 2**10:,.{0 if size >= 10 * 2**10 else 1}f} KiB"
    return f"{size / 2**20:,.{0 if size >= 10 * 2**20 else 1}f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _embedded(data: object) -> str:
    """JSON that may stand in a script element, whatever texts are in it."""
    return json.dumps(data).replace("<", "\\u003c")


def _beside(name: str) -> str:
    return (files("qalora.results") / name).read_text(encoding="utf-8")

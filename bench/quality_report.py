"""What bench/quality.py measured, as a table, a plot with every seed's point, and the ranks that methods end with."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from common import TARGETS, table

from qalora.text_scores import exact_match

BOOTSTRAP = 2000
BASELINE = "lora"
# A method → what differs from it in the allocation alone: none, and a random one.
CONTROLS = {
    "alora": ("lora", "random"),
    "alora-gradient": ("lora-gradient", "random-gradient"),
    "alora-scores": ("lora-quantization", "random-scores"),
    "alora-quantization": ("lora-quantization", "random-quantization"),
    "alora-r2": ("lora-r2", "random-r2"),
    "alora-r16": ("lora-r16", "random-r16"),
}

Line = Mapping[str, Any]  # of quality.jsonl


class Measure(NamedTuple):
    name: str
    lower_is_better: bool


LOSS = Measure("loss", lower_is_better=True)


def report(
    lines: Sequence[Line],
    tasks: Mapping[str, Measure],
    rates: Mapping[str, float | None],
    defaults: Mapping[str, str],
    plot: Path,
) -> str:
    """Markdown: for every task median, points by seed and paired differences to LoRA, and seconds of runs on the
    default's processor; then where the ranks went.

    Args:
        lines: of the runs that were measured on test rows, the rest is left out.
        tasks: task → what decides there.
        rates: method → the learning rate that was chosen for it, in the order of the tables.
        defaults: task → the method that is the default in runs of its length.
        plot: where the picture goes.
    """
    measured = comparable([line for line in lines if line["run"]["split"] == "test"], defaults)
    found = {
        (task, method): by_seed
        for task in tasks
        for method, rate in rates.items()
        if (by_seed := _by_seed(measured, task, method, rate))
    }
    if not found:
        return "nothing was measured on test rows yet"
    parts = ["# quality\n"]
    for task, measure in tasks.items():
        rows = [_row(found, task, method, measure, defaults[task]) for method in rates if (task, method) in found]
        if rows:
            better = "lower" if measure.lower_is_better else "higher"
            parts += [f"## {task}: {measure.name} ({better} is better)\n", table(rows)]
    added = [
        _added(measured, tasks, method, control, rates[method])
        for method, controls in CONTROLS.items()
        for control in controls
    ]
    added = [row for row in added if any(row[task] for task in tasks)]
    if added:
        parts += [
            "## What allocation adds\n\nThe mean over the seeds of the difference to the same start without "
            "allocation, and with a "
            "random one (95 % bootstrap interval), at the rate chosen for the method; below zero is better for a loss, "
            "above zero for an accuracy.\n",
            table(added),
        ]
    ranks = [_ranks(task, method, list(by_seed.values())) for (task, method), by_seed in found.items()]
    ranks = [row for row in ranks if row is not None]
    if ranks:
        parts += [
            "## Where the ranks are in the end\n\nOverlap is the share of the ranks that two seeds have in the same "
            "modules, on "
            "average over the pairs of seeds; methods that move nothing have 1.\n",
            table(ranks),
        ]
    draw(found, tasks, plot)
    return "\n".join(parts)


def comparable(lines: Sequence[Line], defaults: Mapping[str, str]) -> list[Line]:
    """Of every task and seed the lines of one dtype, that in which the default ran, or most methods: a seed's
    differences are between runs that compute alike, and a seed counts once."""
    methods: dict[tuple[str, int], dict[str, set[str]]] = {}
    for line in lines:
        run = line["run"]
        methods.setdefault((run["task"], run["seed"]), {}).setdefault(run["dtype"], set()).add(run["method"])
    chosen = {
        (task, seed): max(by_dtype, key=lambda dtype: (defaults[task] in by_dtype[dtype], len(by_dtype[dtype])))
        for (task, seed), by_dtype in methods.items()
    }
    return [line for line in lines if line["run"]["dtype"] == chosen[line["run"]["task"], line["run"]["seed"]]]


def _by_seed(lines: Sequence[Line], task: str, method: str, rate: float | None) -> dict[int, Line]:
    return {
        line["run"]["seed"]: line
        for line in lines
        if (line["run"]["task"], line["run"]["method"], line["run"]["learning_rate"]) == (task, method, rate)
    }


def _row(
    found: Mapping[tuple[str, str], Mapping[int, Line]], task: str, method: str, measure: Measure, default: str
) -> dict[str, Any]:
    own = found[task, method]
    values = {seed: line["result"][measure.name] for seed, line in sorted(own.items())}
    difference = None if method == BASELINE else _difference(own, found.get((task, BASELINE), {}), measure)
    first = next(iter(own.values()))
    processors = {line["device"] for line in found.get((task, default), own).values()}
    seconds = [line["cpu_seconds"] for line in own.values() if line["device"] in processors]
    return {
        "method": f"**{method}**, the default" if method == default else method,
        "median": f"{statistics.median(values.values()):.4f}",
        "by seed": ", ".join(f"{value:.4f}" for value in values.values()),
        "minus LoRA": difference,
        **({} if measure.name == "loss" else {"median loss": f"{statistics.median(_values(own.values(), LOSS)):.4f}"}),
        "lr": f"{first['run']['learning_rate']:g}",
        "parameters": f"{max(line['parameters'] for line in own.values()):,}",
        "CPU seconds": f"{statistics.median(seconds):.0f}" if seconds else None,  # where the default ran
        "peak MB": f"{statistics.median(line['peak_bytes'] for line in own.values()) / 1e6:.0f}",
    }


def _added(
    lines: Sequence[Line], tasks: Mapping[str, Measure], method: str, control: str, rate: float | None
) -> dict[str, Any]:
    """A method against its control, task by task, at one learning rate: so nothing but the allocation differs."""
    differences = {
        task: _difference(_by_seed(lines, task, method, rate), _by_seed(lines, task, control, rate), measure)
        for task, measure in tasks.items()
    }
    return {"method": method, "minus": control, **differences}


def _difference(own: Mapping[int, Line], others: Mapping[int, Line], measure: Measure) -> str | None:
    """Mean difference over the seeds that both have, and its interval where there is more than one."""
    paired = [
        own[seed]["result"][measure.name] - others[seed]["result"][measure.name] for seed in own if seed in others
    ]
    if not paired:
        return None
    mean = f"{statistics.fmean(paired):+.4f}"
    if len(paired) == 1:
        return f"{mean} (1 seed)"
    low, high = interval(paired)
    return f"{mean} ({low:+.4f} … {high:+.4f})"


def _ranks(task: str, method: str, lines: Sequence[Line]) -> dict[str, Any] | None:
    """Ranks by kind of map, on average over the seeds; None where every module kept the same."""
    maps = [line["ranks"] for line in lines if line["ranks"]]
    if not maps:
        return None
    return {
        "task": task,
        "method": method,
        **{
            kind: format(
                statistics.fmean(sum(r for name, r in ranks.items() if name.endswith(kind)) for ranks in maps), ".0f"
            )
            for kind in TARGETS
        },
        "overlap": f"{statistics.fmean(overlap(a, b) for a, b in combinations(maps, 2)):.2f}"
        if len(maps) > 1
        else None,
    }


def answer_measures(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    measures: Iterable[str],
    answer_pattern: str | None = None,
) -> dict[str, float]:
    """Answers against all references of their prompts: corpus BLEU as sacrebleu has it, the best ROUGE-L F1 of each,
    and exact match with the first reference; all in percent."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    found = {}
    if "bleu" in measures:
        most = max(map(len, references))
        columns = [[of[i] if i < len(of) else None for of in references] for i in range(most)]
        found["bleu"] = sacrebleu.corpus_bleu(list(answers), columns).score
    if "rougeL" in measures:
        scorer = RougeScorer(["rougeL"])
        best = [
            scorer.score_multi(of, answer)["rougeL"].fmeasure for answer, of in zip(answers, references, strict=True)
        ]
        found["rougeL"] = 100 * statistics.fmean(best)
    if "exact_match" in measures:
        found["exact_match"] = statistics.fmean(
            exact_match(answer, of[:1], answer_pattern) for answer, of in zip(answers, references, strict=True)
        )
    return found


def overlap(a: Mapping[str, int], b: Mapping[str, int]) -> float:
    """Share of the ranks that two allocations have in the same modules: Σ min / the mean of their sums."""
    common = sum(min(a.get(name, 0), b.get(name, 0)) for name in a.keys() | b.keys())
    return 2 * common / (sum(a.values()) + sum(b.values()))


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    choose = random.Random(0)
    means = sorted(statistics.fmean(choose.choices(differences, k=len(differences))) for _ in range(BOOTSTRAP))
    return means[int(0.025 * BOOTSTRAP)], means[int(0.975 * BOOTSTRAP) - 1]


def draw(found: Mapping[tuple[str, str], Mapping[int, Line]], tasks: Mapping[str, Measure], path: Path) -> None:
    """A panel a task: every seed a point, the median a line, LoRA's median dashed across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [task for task in tasks if any(key[0] == task for key in found)]
    figure, panels = plt.subplots(1, len(shown), figsize=(1 + 3.6 * len(shown), 3.8), squeeze=False)
    for axes, task in zip(panels[0], shown, strict=True):
        measure = tasks[task]
        names = [method for of, method in found if of == task]
        for x, method in enumerate(names):
            values = _values(found[task, method].values(), measure)
            axes.plot([x] * len(values), values, "o", color="#1f6fb2", alpha=0.6, markersize=5)
            axes.hlines(statistics.median(values), x - 0.3, x + 0.3, color="#1f6fb2", linewidth=2)
        if BASELINE in names:
            middle = statistics.median(_values(found[task, BASELINE].values(), measure))
            axes.axhline(middle, color="#d9822b", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_title(
            f"{task}: {measure.name}, {'lower' if measure.lower_is_better else 'higher'} is better", fontsize=9
        )
        axes.grid(axis="y", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _values(lines: Iterable[Line], measure: Measure) -> list[float]:
    return [line["result"][measure.name] for line in lines]

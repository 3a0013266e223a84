"""What bench/compress.py measured, as tables and a picture of loss against adapter size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import table

from qalora.adapter.compression import Kept, Order, Point, paired
from qalora.adapter.search import ORDERS, best_of, smallest

Line = Mapping[str, Any]  # of compress.jsonl
OF_BASIS = tuple(order for order in ORDERS if order != "trained")  # which is the trained basis' sum
REFITTED = "chosen, refitted"  # what the rows that choose take of OF_BASIS, trained on
TAKEN: dict[tuple[str | None, str], Order] = {  # (basis, order) of a line → the program's order
    **{("svd", order): order for order in OF_BASIS},
    ("trained", "sum"): "trained",
}
SCHEDULES = {"constant": "constant rate", "linear": "rate falling to 0"}
SHOWN = {  # (basis, order, per) → its name, in the order of the tables
    ("trained", "random", "rank"): "trained, random",
    ("trained", "sum", "rank"): "trained, sum (the paper's)",
    ("trained", "path", "rank"): "trained, path",
    ("svd", "random", "rank"): "svd, random",
    ("svd", "sum", "rank"): "svd, sum",
    ("svd", "values", "rank"): "svd, singular values alone",
    ("svd", "path", "rank"): "svd, path",
    ("svd", "path", "parameter"): "svd, path per parameter",
    ("svd", "shrunk", "rank"): "svd, shrunk",
    ("svd", "chosen", "rank"): "**what other rows choose**",
    ("svd", REFITTED, "rank"): "that, trained on (`--refit`)",
    ("svd-act", "values", "rank"): "svd-act, singular values",
    ("svd-act", "path", "rank"): "svd-act, path",
    ("svd-act", "shrunk", "rank"): "svd-act, shrunk",
}


class Adapter(NamedTuple):
    """A run, and its lines by (basis, order, per, share)."""

    run: Mapping[str, Any]
    lines: dict[tuple[str | None, str, str, float], Line]

    @property
    def whole(self) -> Line:
        return self.lines[None, "whole", "rank", 1.0]

    def difference(self, line: Line, rows: str = "test") -> tuple[float, float]:
        """(the loss of a cut minus the whole's on the same rows, its standard error)."""
        return paired(line[rows], self.whole[rows], line[f"{rows}_tokens"])

    def point(self, line: Line) -> Point:
        return point_of(line, self.whole, {})

    def cuts(self) -> dict[float, dict[Any, Point]]:
        """Share → order → point, of the cuts among which the rows that choose decide."""
        found: dict[float, dict[Any, Point]] = {}
        for (basis, order, per, share), line in self.lines.items():
            if per == "rank" and (basis, order) in TAKEN:
                found.setdefault(share, {})[TAKEN[basis, order]] = self.point(line)
        return {share: points for share, points in found.items() if "path" in points}

    def cut(self, order: str, share: float) -> Line:
        """The line of one of the program's orders."""
        basis, name = next(key for key, taken in TAKEN.items() if taken == order)
        return self.lines[basis, name, "rank", share]

    def chosen(self) -> Line | None:
        """What `--tolerance 0` takes on the rows that choose, of the cuts that were measured; None: no cut is there."""
        cuts = self.cuts()
        curves = {order: [points[order] for points in cuts.values() if order in points] for order in ORDERS}
        choice = smallest(curves, 0.0, None)
        if choice is None:
            return self.whole if cuts else None
        return self.cut(choice.order, choice.point.share)


def point_of(line: Line, whole: Line, ranks: Kept) -> Point:
    """A line as a point of the program's curve, on the rows that choose."""
    mean, error = paired(line["choosing"], whole["choosing"], line["choosing_tokens"])
    return Point(line["share"], line["ranks"], line["parameters"], loss(line, "choosing"), mean, error, ranks)


def order_of(line: Line) -> Order:
    """The program's name of a line's order."""
    return TAKEN[line["basis"], line["order"]]


def loss(line: Line, rows: str = "test") -> float:
    """Nats per supervised token."""
    return sum(line[rows]) / sum(line[f"{rows}_tokens"])


def report(lines: Sequence[Line], planned: Sequence[Mapping[str, Any]], picture: Path) -> str:
    """Markdown.

    Args:
        planned: the runs of the whole grid.
        picture: where loss against size is drawn.
    """
    found: dict[tuple[Any, ...], Adapter] = {}
    for line in lines:
        adapter = found.setdefault(tuple(line["run"].values()), Adapter(line["run"], {}))
        adapter.lines[line["basis"], line["order"], line["per"], line["share"]] = line
    adapters = [adapter for adapter in found.values() if (None, "whole", "rank", 1.0) in adapter.lines]
    for adapter in adapters:
        adapter.lines.update(chosen_orders(adapter))
    cut = [adapter for adapter in adapters if any(order == "path" for _, order, *_ in adapter.lines)]
    if not cut:
        return "nothing was cut yet\n"
    parts = ["# compress\n", what_ran(adapters, cut, planned)]
    for task in dict.fromkeys(adapter.run["task"] for adapter in cut):
        parts += [f"## {task}\n", losses_of(task, [adapter for adapter in cut if adapter.run["task"] == task])]
    for group in dict.fromkeys(group_of(adapter.run) for adapter in cut):
        own = [adapter for adapter in cut if group_of(adapter.run) == group]
        parts += [f"## The bar: {group}\n", bar(own), f"## `--tolerance 0`: {group}\n", tolerance(own)]
    if all_orders := every_order(cut):
        parts += ["## Bases and scores\n", all_orders]
    if same := whole_refitted(cut):
        parts += ["## The whole adapter trained on likewise\n", same]
    if control := narrow(adapters, cut):
        parts += ["## Against LoRA trained at that size\n", control]
    draw(adapters, cut, picture)
    return "\n".join(parts)


def chosen_orders(adapter: Adapter) -> dict[tuple[str | None, str, str, float], Line]:
    """At each share what `qalora compress --keep` takes: the order that the rows that choose prefer."""
    found: dict[tuple[str | None, str, str, float], Line] = {}
    for share, points in adapter.cuts().items():
        order, _ = best_of(points)
        found["svd", "chosen", "rank", share] = adapter.cut(order, share)
    return found


def what_ran(adapters: Sequence[Adapter], cut: Sequence[Adapter], planned: Sequence[Mapping[str, Any]]) -> str:
    there: set[Any] = {key[:3] for adapter in cut for key in adapter.lines}
    never = [name for key, name in SHOWN.items() if key not in there and key[1] != "chosen"]
    text = (
        f"{len(cut)} adapters were cut, and {len(adapters) - len(cut)} were trained narrow as controls.\n"
        "`python bench/compress.py --data data --work DIR` runs what is missing.\n"
        "Losses are nats per supervised token on test rows, which chose nothing.\n"
        "Differences are paired with the whole adapter's, ± their standard error over the rows.\n\n"
    )
    rows = [
        {
            "task": adapter.run["task"],
            "adapter": title(adapter),
            "rate": f"{adapter.run['learning_rate']:g}",
            "parameters": f"{adapter.whole['parameters']:,}",
            "base": f"{loss(adapter.lines[None, 'base', 'rank', 1.0]):.4f}",
            "whole": f"{loss(adapter.whole):.4f}",
            "rows, tokens that choose": f"{len(adapter.whole['choosing'])}, {sum(adapter.whole['choosing_tokens'])}",
            "that measure": f"{len(adapter.whole['test'])}, {sum(adapter.whole['test_tokens'])}",
        }
        for adapter in adapters
    ]
    text += table(rows)
    if never:
        text += f"\nCuts of the plan that no adapter has: {'; '.join(never)}.\n"
    there_are = [dict(adapter.run) for adapter in adapters]
    counts = []
    for group in dict.fromkeys(map(group_of, planned)):
        own = [dict(run) for run in planned if group_of(run) == group]
        counts.append(f"{group}: {sum(run in there_are for run in own)} of {len(own)}")
    return text + f"\nAdapters of the plan that are there: {'; '.join(counts)}.\n"


def losses_of(task: str, adapters: Sequence[Adapter]) -> str:
    """A row per adapter and order, a column per share."""
    rows, shares = [], shares_of(adapters)
    for adapter in adapters:
        for key, name in SHOWN.items():
            cuts = {share: adapter.lines.get((*key, share)) for share in shares}
            if any(cuts.values()):
                rows.append(
                    {
                        "adapter": title(adapter),
                        "basis, order": name,
                        **{f"{share:.3g}": cut and shown(adapter.difference(cut)) for share, cut in cuts.items()},
                    }
                )
    return table(rows)


def shares_of(adapters: Sequence[Adapter]) -> list[float]:
    """Of their cuts, falling."""
    return sorted({share for adapter in adapters for *_, share in adapter.lines if share < 1}, reverse=True)


def bar(adapters: Sequence[Adapter]) -> str:
    """Of how many adapters a cut holds, by order, and what the median costs over tasks."""
    rows = []
    shares = shares_of(adapters)
    for key, name in SHOWN.items():
        own = [adapter for adapter in adapters if (*key, 0.5) in adapter.lines]
        if not own:
            continue
        row: dict[str, Any] = {"basis, order": name, "adapters": len(own)}
        for share in shares:
            pairs = [
                adapter.difference(adapter.lines[*key, share]) for adapter in own if (*key, share) in adapter.lines
            ]
            held = f"{sum(mean <= error for mean, error in pairs)} of {len(pairs)}"
            row[f"no loss at {share:.3g}"] = held if pairs else None
            row[f"median at {share:.3g}"] = f"{statistics.median(mean for mean, _ in pairs):+.4f}" if pairs else None
        rows.append(row)
    return (
        "No loss: the difference to the whole adapter is at most its standard error.\n\n"
        + table(rows)
        + "\n"
        + versus(adapters)
    )


def every_order(adapters: Sequence[Adapter]) -> str:
    """What each basis and score costs, as the median over the adapters that were cut in all of them."""
    own = [adapter for adapter in adapters if ("svd", "random", "rank", 0.5) in adapter.lines]
    if not own:
        return ""
    shares = shares_of(own)
    rows = []
    for key, name in SHOWN.items():
        row: dict[str, Any] = {"basis, order": name}
        for share in shares:
            found = [adapter for adapter in own if (*key, share) in adapter.lines]
            means = [adapter.difference(adapter.lines[*key, share])[0] for adapter in found]
            row[f"{share:.3g}"] = f"{statistics.median(means):+.4f}" if len(found) == len(own) else None
        if any(list(row.values())[1:]):
            rows.append(row)
    tasks = ", ".join(adapter.run["task"] for adapter in own)
    return f"Losses minus the whole's, the median over {tasks} ({title(own[0])}).\n\n" + table(rows)


def versus(adapters: Sequence[Adapter]) -> str:
    """How often an order is worse than singular values, and than the paper's scores, on the same rows."""
    rows = []
    for key, name in SHOWN.items():
        if key[1] not in ("path", "shrunk", "chosen", REFITTED) or key[0] == "trained" or key[2] != "rank":
            continue
        if not any(own[:3] == key for adapter in adapters for own in adapter.lines):
            continue
        row: dict[str, Any] = {"basis, order": name}
        for other, called in (
            (("svd", "values", "rank"), "singular values alone"),
            (("trained", "sum", "rank"), "the paper's"),
        ):
            pairs = [
                paired(line["test"], adapter.lines[*other, line["share"]]["test"], line["test_tokens"])
                for adapter in adapters
                for own, line in adapter.lines.items()
                if own[:3] == key and (*other, line["share"]) in adapter.lines
            ]
            row[f"worse than {called}"] = f"{sum(mean > error for mean, error in pairs)} of {len(pairs)} cuts"
            row[f"better than {called}"] = f"{sum(mean < -error for mean, error in pairs)} of {len(pairs)} cuts"
        rows.append(row)
    return "Worse, better: by more than the standard error of the paired difference.\n\n" + table(rows)


def tolerance(adapters: Sequence[Adapter]) -> str:
    """Where the rows that choose land, and whether that holds on test rows."""
    rows, held = [], 0
    for adapter in adapters:
        chosen = adapter.chosen()
        if chosen is None:
            continue
        mean, error = adapter.difference(chosen)
        held += mean <= error
        rows.append(
            {
                "task": adapter.run["task"],
                "adapter": title(adapter),
                "taken": "the whole" if chosen is adapter.whole else f"{order_of(chosen)}, {chosen['share']:.3g}",
                "parameters": f"{chosen['parameters']:,}",
                "minus the whole, on test rows": shown((mean, error)),
                "holds": "yes" if mean <= error else "no",
            }
        )
    return f"It holds on the test rows of {held} of {len(rows)} adapters.\n\n" + table(rows)


def whole_refitted(adapters: Sequence[Adapter]) -> str:
    """What the same steps give the whole adapter, which the cut ones can be compared with."""
    rows = []
    for adapter in adapters:
        line = adapter.lines.get(("svd", "whole, refitted", "rank", 1.0))
        if line is not None:
            again = [adapter.lines.get(("svd", REFITTED, "rank", share)) for share in (0.5, 0.25)]
            shares = {f"at {cut['share']:.3g}": shown(adapter.difference(cut)) for cut in again if cut}
            whole = shown(adapter.difference(line))
            rows.append({"task": adapter.run["task"], "adapter": title(adapter), "whole": whole, **shares})
    return table(rows) if rows else ""


def narrow(adapters: Sequence[Adapter], cut: Sequence[Adapter]) -> str:
    """LoRA trained with few ranks, at the rate that the rows that choose prefer, against cuts of like size."""
    rows = []
    for whole in cut:
        run = whole.run
        for r in sorted({each.run["r"] for each in adapters if each.run["r"] < run["r"]}, reverse=True):
            controls = [
                each for each in adapters if {**each.run, "learning_rate": 0} == {**run, "r": r, "learning_rate": 0}
            ]
            best = whole.lines.get(("svd", "chosen", "rank", r / run["r"]))
            if not controls or best is None:
                continue
            control = min(controls, key=lambda each: loss(each.whole, "choosing"))
            difference = paired(best["test"], control.whole["test"], best["test_tokens"])
            rows.append(
                {
                    "task": run["task"],
                    "seed": run["seed"],
                    "r, cut from": f"{r}, {run['r']}",
                    "rates tried": ", ".join(f"{each.run['learning_rate']:g}" for each in controls),
                    "best": f"{control.run['learning_rate']:g}",
                    "trained narrow": f"{loss(control.whole):.4f}",
                    "cut": f"{loss(best):.4f}",
                    "order": order_of(best),
                    "parameters": f"{control.whole['parameters']:,} and {best['parameters']:,}",
                    "cut minus narrow": shown(difference),
                }
            )
    return table(rows) if rows else ""


def title(adapter: Adapter) -> str:
    return f"{group_of(adapter.run)}, seed {adapter.run['seed']}"


def group_of(run: Mapping[str, Any]) -> str:
    """What adapters of several tasks and seeds have in common."""
    return f"{run['origin']}, r = {run['r']}, {SCHEDULES[run['schedule']]}"


def shown(difference: tuple[float, float]) -> str:
    return f"{difference[0]:+.4f} ± {difference[1]:.4f}"


def draw(adapters: Sequence[Adapter], cut: Sequence[Adapter], path: Path) -> None:
    """A panel per task: loss against parameters, log scale; lines join the cuts of one order, crosses are LoRA trained
    at that size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(adapter.run["task"] for adapter in cut))
    figure, panels = plt.subplots(1, len(tasks), figsize=(1 + 3.6 * len(tasks), 3.8), squeeze=False)
    colors = {
        ("svd", "path", "rank"): "#1f6fb2",
        ("svd", "values", "rank"): "#4c9f70",
        ("svd", "shrunk", "rank"): "#8a5fb0",
        ("svd-act", "path", "rank"): "#17a2b8",
        ("trained", "sum", "rank"): "#d9822b",
    }
    for axes, task in zip(panels[0], tasks, strict=True):
        named: set[str] = set()
        for adapter in cut:
            for key, color in colors.items():
                own = [line for own, line in adapter.lines.items() if own[:3] == key]
                if adapter.run["task"] != task or not own:
                    continue
                points = sorted((line["parameters"], loss(line)) for line in [*own, adapter.whole])
                label = None if SHOWN[key] in named else SHOWN[key]
                named.add(SHOWN[key])
                axes.plot(*zip(*points, strict=True), "o-", color=color, alpha=0.7, markersize=3, label=label)
        for adapter in adapters:
            if adapter.run["task"] == task and adapter not in cut:
                label = None if "narrow" in named else "LoRA trained at that size, each rate"
                named.add("narrow")
                axes.plot(adapter.whole["parameters"], loss(adapter.whole), "kx", markersize=6, label=label)
        axes.set_xscale("log")
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("parameters of the adapter", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    panels[0][0].set_ylabel("loss on test rows, nats per token", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)

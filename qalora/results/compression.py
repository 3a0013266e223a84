"""What compress.json says of a cut, in sentences and for a model card. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMPRESSION = "compress.json"
PICTURE = "compression.png"
FEW = 8  # rows of which no standard error is to be believed
COARSE = 0.01  # nats per token: a standard error that hides what users would mind
ORDERS = {
    "path": "path scores",
    "sum": "sum scores",
    "values": "singular values",
    "shrunk": "path scores drawn to singular values",
    "trained": "sum scores of the ranks as training left them",
}


def section(report: Mapping[str, Any], *, later: bool) -> str:
    """The section of a model card; empty where nothing was cut.

    Args:
        later: the cut was made after the run, whose figures are of the whole adapter.
    """
    if not report:
        return ""
    lines = [f"- {line[0].upper()}{line[1:]}." for line in in_sentences(report)]
    if later:
        lines.append("- Figures before and after training, and numbers of the run's ranks, are of the whole adapter.")
    return "## Compression\n\n" + "\n".join(lines)


def in_sentences(report: Mapping[str, Any]) -> list[str]:
    """What was kept, what it costs, and what decided."""
    kept, whole = report["kept"], report["whole"]
    size = _size(kept, whole)
    if "loss" not in kept:
        return [f"{size}, by singular values alone: no row was read, so what the cut costs is not known"]
    judged = report["judged_on"]
    lines = [
        size,
        f"loss {kept['loss']:.4f}, of the whole adapter {whole['loss']:.4f}, of the base {report['base_loss']:.4f}: "
        f"{kept['difference']:+.4f}{_error(kept['stderr'])} nats per token from the whole, on {_judges(judged)}",
        f"the order is that of {ORDERS[report['order']]}, the best of {len(report['orders'])} here"
        if report["order"]
        else "every rank stays that adds something, so no order decided",
    ]
    lines += _coarse(judged["rows"], kept["stderr"], judged.get("least_stderr"))
    if "refit" in report:
        lines.append(_refit(report["refit"]))
    if report["whole_hurts"]:
        lowest = report["lowest"]
        lines.append(
            f"the whole adapter hurts on these rows: the base alone is {-report['gain']:.4f}"
            f"{_error(report['gain_stderr'])} nats per token better, and of the sizes tried {lowest['ranks']:,} "
            f"ranks have the lowest loss, {lowest['loss']:.4f}; are they rows that it was trained for?"
        )
    return lines


def _judges(judged: Mapping[str, Any]) -> str:
    rows = f"{judged['rows']:,} row{'s' if judged['rows'] > 1 else ''}"
    if also := judged.get("also"):
        return f"{rows} that also {also}"
    return f"{rows} that only judge{'' if judged['rows'] > 1 else 's'}"


def _coarse(rows: int, stderr: float | None, least: float | None) -> list[str]:
    """A line where the rows that judge are too few.

    Args:
        stderr: of what was kept, 0 for the whole; None: of a single row.
        least: of the cut that was measured finest.
    """
    if stderr is None:
        return ["a single row has no standard error, and cannot tell a loss from none; more rows judge finer"]
    if rows < FEW:
        return [f"{rows} rows are too few even for the standard error to be known; more rows judge finer"]
    error = stderr or least or 0.0
    if error <= COARSE:
        return []
    return [f"{rows:,} rows tell a difference no finer than ± {error:.3f} nats per token; more rows judge finer"]


def _size(kept: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    if kept["parameters"] > whole["parameters"]:
        return (
            f"{kept['ranks']:,} ranks and {kept['parameters']:,} parameters are written, of {whole['ranks']:,} and "
            f"{whole['parameters']:,}: one rank for all fills up modules that have fewer, so leave --uniform out, or "
            "ask for a smaller size"
        )
    share = kept["ranks"] / whole["ranks"]
    return (
        f"{kept['ranks']:,} of {whole['ranks']:,} ranks ({share:.1%}) and {kept['parameters']:,} of "
        f"{whole['parameters']:,} parameters are kept"
    )


def _refit(refit: Mapping[str, Any] | None) -> str:
    if refit is None:
        return "nothing was trained on that stays: every rank is kept that adds something"
    after = "no number" if refit["loss_after"] is None else f"{refit['loss_after']:.4f}"
    return (
        "a few steps of training on the rows that ordered took the loss of what was kept from "
        f"{refit['loss_before']:.4f} to {after}, {'and stay' if refit['helped'] else 'so they were taken back'}"
    )


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.4f}"

"""What compress.json says of a cut, in sentences and for a model card. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMPRESSION = "compress.json"
PICTURE = "compression.png"
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
        f"{kept['difference']:+.4f}{_error(kept['stderr'])} nats per token from the whole, on "
        + (f"{judged['rows']:,} rows that only judge" if judged["rows"] > 1 else "1 row that only judges"),
        f"the order is that of {ORDERS[report['order']]}, the best of {len(report['orders'])} here",
    ]
    if kept["stderr"] is None:
        lines.append("a single row has no standard error, and cannot tell a loss from none; more rows judge finer")
    elif kept["stderr"] > COARSE:
        lines.append(
            f"{judged['rows']:,} rows cannot tell a loss of {kept['stderr']:.3f} nats per token from none; more rows "
            "judge finer"
        )
    if "refit" in report:
        lines.append(_refit(report["refit"]))
    if report["whole_hurts"]:
        lines.append(
            f"the whole adapter hurts on these rows: the base alone is {-report['gain']:.4f}"
            f"{_error(report['gain_stderr'])} nats per token better; are they rows that it was trained for?"
        )
    return lines


def _size(kept: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    if kept["parameters"] > whole["parameters"]:
        return (
            f"{kept['ranks']:,} ranks and {kept['parameters']:,} parameters are written, of {whole['ranks']:,} and "
            f"{whole['parameters']:,}: one rank for all fills up modules that have fewer, so leave --uniform out, or "
            "pass a smaller --max-rank"
        )
    return (
        f"{kept['ranks']:,} of {whole['ranks']:,} ranks ({kept['share']:.1%}) and {kept['parameters']:,} of "
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

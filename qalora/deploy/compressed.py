"""A cut adapter, measured as it will be read, and written: plain PEFT LoRA in the dtype of the one that came in, what
is known of the cut, its pictures and its card."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qalora import processes
from qalora.adapter.ablation import MicroBatch
from qalora.adapter.compression import Point, paired
from qalora.adapter.cutting import Losses, cut, losses
from qalora.adapter.layer import factors_of
from qalora.adapter.model import ADAPTER, gated_layers, ranks, sync_config, write_adapter
from qalora.adapter.provenance import read_provenance
from qalora.adapter.saved import SavedAdapter
from qalora.adapter.search import Asked, Choice, Cut, cut_by_values, find_cut
from qalora.adapter.surgery import replace_ranks
from qalora.card_files import keep_users_card, write_card
from qalora.data.rows import supervised_tokens
from qalora.deploy.read_by_peft import compare_with_peft
from qalora.files import write_json, written_beside
from qalora.pictures import draw_compression
from qalora.results.card import adapter_card
from qalora.results.compression import COMPRESSION, PICTURE
from qalora.results.facts import run_of


@dataclass(frozen=True)
class Rows:
    """
    Attributes:
        scoring: micro-batches that order the ranks and train what stays.
        judging: others, that say what a cut costs.
        also: what else these decide, such as "chose the weights"; empty: they only judge.
    """

    scoring: Sequence[MicroBatch]
    judging: Sequence[MicroBatch]
    also: str = ""


def cut_model(
    model: PeftModel,
    asked: Asked,
    rows: Rows | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Cuts the model's adapter in place, and measures what will be written.

    Args:
        rows: None: singular values alone decide, and nothing is measured.
        dtype: of the file that it is for, to which weights are rounded.

    Returns:
        What compress.json says of it.
    """
    report: dict[str, Any] = {"whole": size_of(model)}
    total = report["whole"]["ranks"]
    if rows is None:
        cut(model, cut_by_values(model, asked))
        report |= {"basis": "svd", "order": "values"}
    else:
        found = find_cut(model, rows.scoring, rows.judging, asked)
        report |= report_of(found, asked)
        report["scored_on"] = {
            "rows": sum(len(micro["labels"]) for micro in rows.scoring),
            "supervised_tokens": supervised_tokens(micro["labels"] for micro in rows.scoring),
        }
        report["judged_on"]["also"] = rows.also
        report["whole"]["loss"] = found.whole.mean
        chosen = processes.from_first(lambda: found.chosen.point)
        cut(model, chosen.kept, chosen.factors)
    share = sum(ranks(model).values()) / total
    if asked.uniform:
        to_one_rank(model)
    round_weights(model, dtype)
    report["kept"] = {"share": share, **size_of(model)}
    if rows is not None:
        report["kept"] |= cost(losses(model, rows.judging), found.whole)
    return {**report, "ranks": ranks(model)}


def report_of(found: Cut, asked: Asked) -> dict[str, Any]:
    """What compress.json says of a search, but for what was kept in the end."""
    gain, stderr = found.gain
    chosen = found.chosen
    return {
        "basis": "trained" if chosen.order == "trained" else found.basis,
        "order": chosen.order,
        "orders": list(found.curves),
        "judged_on": {
            "rows": len(found.whole.rows),
            "supervised_tokens": sum(found.whole.tokens),
            "least_stderr": _least_error(found),
        },
        "base_loss": found.base.mean,
        "gain": gain,
        "gain_stderr": known(stderr),
        "whole_hurts": found.hurts,
        "lowest": _figures(min(chain(*found.curves.values()), key=lambda point: point.loss)),
        "curves": {order: [_figures(point) for point in points] for order, points in found.curves.items()},
        **({"refit": _refit(chosen)} if asked.refit else {}),
    }


def _least_error(found: Cut) -> float | None:
    """The standard error of the cut that was measured finest: how much the rows that judge can tell; None: no cut was
    measured, or a single row judges."""
    errors = [point.stderr for points in found.curves.values() for point in points if point.stderr]
    return known(min(errors, default=math.inf))


def known(number: float) -> float | None:
    """JSON knows no infinity, which is the standard error of a single row, and nothing that is not a number."""
    return number if math.isfinite(number) else None


def size_of(model: PeftModel) -> dict[str, int]:
    layers = gated_layers(model).values()
    return {
        "ranks": sum(len(layer.A) for layer in layers),
        "parameters": sum(layer.A.numel() + layer.B.numel() for layer in layers),
    }


def cost(found: Losses, whole: Losses) -> dict[str, float | None]:
    """Of a cut adapter, on the same rows as the whole."""
    difference, stderr = paired(found.rows, whole.rows, whole.tokens)
    return {"loss": found.mean, "difference": difference, "stderr": known(stderr)}


def to_one_rank(model: PeftModel) -> None:
    """Every module at the largest rank, padded with zeros, its scaling folded into B and 1 from then on: for servers
    that know one rank and one scaling."""
    rank = max(ranks(model).values())
    for layer in gated_layers(model).values():
        more = rank - len(layer.A)
        replace_ranks(layer, F.pad(layer.A.data, (0, 0, 0, more)), F.pad(layer.s * layer.B.data, (0, more)), 1.0)
    sync_config(model)


def dtype_of(adapter: SavedAdapter) -> torch.dtype:
    """What the adapter's file holds; float32 where it holds several, or another than 16 and 32 bits."""
    found = {tensor.dtype for pair in adapter.pairs.values() for tensor in pair}
    return found.pop() if found in ({torch.float16}, {torch.bfloat16}) else torch.float32


def round_weights(model: PeftModel, dtype: torch.dtype) -> None:
    """Gives the adapter's weights the values that a file of this dtype holds; they stay in fp32."""
    for layer in gated_layers(model).values():
        layer.A.data, layer.B.data = layer.A.data.to(dtype).float(), layer.B.data.to(dtype).float()


# ------------------------------------------------------------------------------------------------------------- on disk


def store(
    model: PeftModel,
    report: dict[str, Any],
    output_dir: Path,
    adapter: SavedAdapter,
    tokenizer: PreTrainedTokenizerBase,
    computed_in: torch.dtype,
    started: float,
) -> dict[str, Any]:
    """Writes the folder beside its place, has vanilla PEFT read it, and moves it there. The model is left without its
    adapter.

    Args:
        report: of `cut_model`.
        adapter: that came in.
        computed_in: dtype of the base.
        started: `time.perf_counter()` then.

    Returns:
        The report, with what the comparison found and the seconds.

    Raises:
        RuntimeError: vanilla PEFT makes another function of it.
    """
    start = {name: len(A) for name, (A, _) in adapter.pairs.items()}
    with written_beside(output_dir) as partial:
        write_cut(model, partial, dtype_of(adapter), adapter.config.base_model_name_or_path)
        if provenance := read_provenance(adapter.path):
            provenance.write(partial)
        draw(report, start, partial / PICTURE)
        compared = compare_with_peft(model, partial, tokenizer, computed_in)
        report = {**report, "verified": compared, "seconds": time.perf_counter() - started}
        write_json(partial / COMPRESSION, report)
        if not keep_users_card(output_dir, partial):
            write_card(partial, adapter_card(partial, run_of(adapter.path), output_dir.resolve().name))
    return report


def write_cut(model: PeftModel, folder: Path, dtype: torch.dtype, base_name: str | None) -> None:
    """Writes the adapter into a folder, and reads it back.

    Args:
        dtype: of the file, to which weights have been rounded.
        base_name: what the adapter that came in called its base.

    Raises:
        RuntimeError: the file does not read back equal.
    """
    config: Any = model.peft_config[ADAPTER]
    names = ranks(model)
    if isinstance(config.target_modules, (set, list)):  # a kind of which no module is left is no target
        config.target_modules = {
            target
            for target in config.target_modules
            if any(name == target or name.endswith(f".{target}") for name in names)
        }
    sync_config(model)
    if len(set(config.rank_pattern.values())) == len(set(config.alpha_pattern.values())) == 1:
        config.rank_pattern, config.alpha_pattern = {}, {}
    config.base_model_name_or_path = base_name or config.base_model_name_or_path
    config.inference_mode = True
    with _in_dtype(model, dtype):
        write_adapter(model, folder)


@contextmanager
def _in_dtype(model: PeftModel, dtype: torch.dtype) -> Iterator[None]:
    layers = gated_layers(model)
    own = factors_of(layers)
    try:
        for layer in layers.values():
            layer.A.data, layer.B.data = layer.A.data.to(dtype), layer.B.data.to(dtype)
        yield
    finally:
        for name, layer in layers.items():
            layer.A.data, layer.B.data = own[name]


def draw(report: Mapping[str, Any], start: Mapping[str, int], file: Path) -> None:
    """The curves and the rank map of a cut.

    Args:
        report: of `cut_model`.
        start: full module name → its ranks before.
    """
    curves = report.get("curves", {})
    chosen = (report["order"], report["kept"]) if curves else None
    levels = {"whole": report["whole"]["loss"], "base": report["base_loss"]} if curves else {}
    draw_compression(curves, chosen, levels, report["ranks"], start, file)


def _refit(chosen: Choice) -> dict[str, Any] | None:
    """None: nothing was trained on that stays."""
    if chosen.refitted is None:
        return None
    before, after = chosen.plain.loss, known(chosen.refitted.loss)
    return {"loss_before": before, "loss_after": after, "helped": chosen.point is chosen.refitted}


def _figures(point: Point) -> dict[str, float | None]:
    names = ("share", "ranks", "parameters", "loss", "difference", "stderr")
    return {name: known(getattr(point, name)) for name in names}

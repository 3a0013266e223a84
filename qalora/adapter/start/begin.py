"""One call that says where an adapter's ranks begin, before any trainer."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import torch
from peft import PeftModel

from qalora.adapter.ablation import MicroBatch
from qalora.adapter.allocation import Init, Share
from qalora.adapter.allocation_round import Record, keep_best_corrections
from qalora.adapter.callback import Attempt, Budget, once, tokenized
from qalora.adapter.model import check_adapted, gated_layers, rank_parameters, ranks
from qalora.adapter.start.gradient import start_along_gradient
from qalora.adapter.start.quantization import start_at_quantization_error
from qalora.arguments import whole
from qalora.base.checkpoint import Weights
from qalora.data.batching import Collator, micro_batches, on_device
from qalora.errors import InputError, check_choice

T = TypeVar("T")
Start = tuple[Record, Mapping[str, object]]  # a line of allocation.jsonl, and the scores beside it


def start(
    model: PeftModel,
    rows: Iterable[Mapping[str, Any]],
    init: Init = "quantization",
    *,
    original: Weights | None = None,
    share: Share = "even",
    max_rows: int = 16,
    batch_size: int = 4,
    min_rank: int = 0,
    max_rank: int | None = None,
    budget: Budget = "parameters",
    seed: int = 42,
    attempt: Attempt[Start | None] = once,
) -> Start | None:
    """Points the ranks of an untrained adapter, in place.

    Args:
        model: from `attach`.
        rows: training rows, of which `max_rows` are read: `input_ids` and `labels` (−100 where no loss), lists of
            integers.
        init: kaiming: anywhere, as PEFT has it; gradient: along the leading directions of ∂L/∂W, B staying zero;
            quantization: at what 4 bits took from each linear layer (QERA, arXiv 2410.06040; CLoQ, 2501.18475, in
                another arrangement).
        original: the base's 16-bit weights, for init="quantization": `LoadedBase.original()`.
        share: even: every module keeps its ranks; scores: of twice as many corrections, those stay that lower the loss
            most.
        max_rows: rows that are read.
        batch_size: rows per forward.
        min_rank: ranks that every module keeps, for share="scores".
        max_rank: ranks that no module exceeds, for share="scores".
        budget: what share="scores" never exceeds, see `AllocationCallback`.
        seed: of everything drawn.
        attempt: how work on a batch is tried, where memory may run out.

    Returns:
        With share="scores", what `AllocationCallback.record_start` takes.

    Raises:
        InputError: no adapter, or one that has begun already; rows that are not tokenized; no
            `original`, where init="quantization" needs it; or a setting that is none.
    """
    check_choice("init", init, get_args(Init))
    check_choice("share", share, get_args(Share))
    check_choice("budget", budget, get_args(Budget))
    whole("max_rows", max_rows)
    whole("batch_size", batch_size)
    whole("min_rank", min_rank, 0)
    whole("max_rank", max_rank, optional=True)
    check_adapted(model, "start")
    found = tokenized(rows, "rows")
    if any(bool(layer.B.any()) for layer in gated_layers(model).values()):
        raise InputError("model: its adapter was started or trained already; `attach` makes a new one.")
    if init == "quantization" and original is None:
        raise InputError(
            "original is missing: init='quantization' needs the base's 16-bit weights, as LoadedBase.original() reads "
            "them; init='gradient' does without."
        )
    if share == "scores" and init != "quantization":
        raise InputError(f"share='scores' chooses among corrections of init='quantization', and init is {init!r}.")
    if init == "kaiming":
        return None
    chosen = starting_rows(found, max_rows, seed)
    batch = on_device(micro_batches(chosen, batch_size, Collator(0)), device_of(model))
    even = ranks(model)

    def begin(batch: Sequence[MicroBatch]) -> Start | None:
        generator = torch.Generator().manual_seed(seed)
        if original is None or init == "gradient":
            start_along_gradient(model, batch, generator=generator)
        elif share == "even":
            start_at_quantization_error(model, batch, original, generator=generator)
        else:
            cost = rank_parameters(model, even)
            record, importance = keep_best_corrections(
                model,
                None,
                batch,
                original,
                even,
                budget=sum(even.values()),
                parameters=sum(even[name] * cost[name] for name in even) if budget == "parameters" else None,
                min_rank=min_rank,
                max_rank=max_rank,
                seed=seed,
            )
            return record, {"method": "midpoint", "importance": importance}
        return None

    return attempt(batch, begin)


def starting_rows(rows: Sequence[T], most: int, seed: int) -> list[T]:
    """The training rows that decide where ranks point when they are born."""
    return random.Random(seed).sample(rows, min(most, len(rows)))


def device_of(model: PeftModel) -> torch.device:
    return next(iter(gated_layers(model).values())).A.device

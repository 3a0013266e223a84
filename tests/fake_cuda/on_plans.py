"""Planned bytes against those allocated by a second optimizer step, of real shapes on the device without hardware."""

from __future__ import annotations

import gc
from dataclasses import replace

import gpu
import pytest

from qalora.base.registry import MODELS
from qalora.memory import CUDA_CONTEXT
from qalora.sizes import MLP_TILE

SEVEN = gpu.Case("train", "llama-7b")
EIGHT = gpu.Case("train", "llama3.1-8b", rows=2, tokens=2048)
LONG = gpu.Case("train", "llama3.1-8b", r=32, kept="offload", tile=MLP_TILE)
# Case, and how many tokens of the first row stay (the rest is padding).
CASES = {
    "7B false": (replace(SEVEN, kept=False), None),
    "7B fp16": (replace(SEVEN, dtype="float16"), None),
    "7B 8-bit moments": (replace(SEVEN, optim="paged_adamw_8bit", r=64), None),
    "13B": (replace(SEVEN, model="llama-13b"), None),
    "33B": (replace(SEVEN, model="llama-30b"), None),
    "8B": (EIGHT, None),
    "8B selective": (replace(EIGHT, kept="selective"), None),
    "8B padded": (EIGHT, 2000),
    "8B packed": (replace(EIGHT, rows=1, tokens=4096, samples=2), None),
    "8B 145k tokens": (replace(LONG, tokens=145_000, tile=16 * MLP_TILE), None),
}


def measured(device, case, shape, stay):
    model = gpu.by_qalora(case, shape, "cuda")
    step, optimizer = gpu.stepper(case, model, "cuda")
    batch = gpu.tokens_of(case, shape, "cuda")
    if stay is not None:
        batch["attention_mask"][0, stay:] = 0
        batch["labels"][0, stay:] = -100
    step(batch)
    gc.collect()
    device.reset_peak()
    step(batch)
    return device.peak, gpu.paged_bytes(optimizer)


@pytest.mark.parametrize(("case", "stay"), CASES.values(), ids=CASES)
def test_the_plan_is_within_3_percent_of_what_a_step_allocates(shapes_only, case, stay):
    whole = MODELS[case.model][1]
    few, more = ((n, *measured(shapes_only, case, replace(whole, num_hidden_layers=n), stay)) for n in (2, 3))
    # Each further block takes what the third took.
    peak, paged = (
        low + (whole.num_hidden_layers - few[0]) * (high - low) for low, high in zip(few[1:], more[1:], strict=True)
    )
    planned = gpu.plan_of(case, whole)()
    print(f"\n{peak / 2**20:.1f} MiB computed, {(planned.total - CUDA_CONTEXT - paged) / 2**20:.1f} planned", end=" ")
    assert planned.total - CUDA_CONTEXT - paged == pytest.approx(peak, rel=0.03)

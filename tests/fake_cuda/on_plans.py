"""Planned bytes against those allocated by a second optimizer step, of real shapes on the device without hardware:
some of the cases of bench/plan_fake.py, of every kind."""

from __future__ import annotations

from dataclasses import replace

import plan_fake
import pytest

from qalora.base.registry import MODELS
from qalora.fitting import largest
from qalora.memory import plan_memory
from qalora.sizes import MLP_TILE

CASES = (
    "7B false", "7B 8-bit moments", "13B fp16", "33B true", "8B padded selective", "8B packed", "8B 60k tokens",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_within_3_percent_of_what_a_step_allocates(shapes_only, name):
    case = plan_fake.CASES[name]
    # A head of 8,192 tokens, for most of the time goes into chunks of logits; a long row at half the width.
    shape = replace(MODELS[case.model][1], vocab_size=8192)
    if case.tokens > 10_000:
        widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        shape = replace(shape, **{field: getattr(shape, field) // 2 for field in widths})
        case = replace(case, tokens=32_000)
    peak, paged = plan_fake.by_blocks(shapes_only, case, shape, name in plan_fake.PADDED)
    planned = plan_fake.planned_bytes(case, shape, paged)
    print(f"\n{peak / 2**20:.1f} MiB computed, {planned / 2**20:.1f} planned", end=" ")
    assert planned == pytest.approx(peak, rel=0.03)


def test_the_longest_context_of_8b_in_24_gib_is_no_longer_than_attentions_backward_lets_it():
    shape = MODELS["llama3.1-8b"][1]

    def plan(**settings):
        return plan_memory(shape, ranks=32, gradient_checkpointing="offload", mlp_tile=MLP_TILE, **settings)

    assert 145_000 <= largest(plan, 24 * 2**30, "seq_len") <= 165_000

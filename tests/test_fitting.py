"""Settings that fit, against plans made up for the purpose and against the real one."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora.base.registry import MODELS
from qalora.fitting import FULL_FORWARD, HEADROOM, LEVELS, fastest, fit, largest, least, lower
from qalora.memory import MemoryPlan, plan_memory
from qalora.sizes import MLP_TILE

LLAMA = partial(plan_memory, MODELS["llama-7b"][1])


@given(
    memory=st.integers(4 << 30, 80 << 30),
    batch_size=st.integers(1, 48),
    seq_len=st.integers(16, 20_000),
)
def test_what_is_chosen_fits_and_keeps_the_batch(memory, batch_size, seq_len):
    found = fit(LLAMA, memory, batch_size=batch_size, seq_len=seq_len)
    if found is None:
        settings = least(batch_size).settings()
        assert settings["gradient_accumulation_steps"] == batch_size
        frugal = partial(LLAMA, gradient_checkpointing="offload", mlp_tile=MLP_TILE)(
            micro_batch_size=1, gradient_accumulation_steps=batch_size, seq_len=seq_len
        )
        assert LLAMA(seq_len=seq_len, **settings).total == frugal.total > HEADROOM * memory
        return
    settings = found.settings()
    assert settings["gradient_accumulation_steps"] * settings["micro_batch_size"] == batch_size
    assert LLAMA(seq_len=seq_len, **settings).total <= HEADROOM * memory
    assert (settings["gradient_checkpointing"], settings["mlp_tile"]) in [
        (at.checkpointing, at.mlp_tile) for at in LEVELS
    ]


def test_a_step_that_runs_out_goes_down_the_levels_that_a_fit_tries():
    taken, checkpointing, tiled = [(False, None)], False, False
    while level := lower(checkpointing, tiled):
        checkpointing, tiled = level.checkpointing, level.mlp_tile is not None
        taken.append((checkpointing, level.mlp_tile))
    assert taken == [(False, None), ("selective", None), (True, None), ("offload", None), ("offload", 1024)]
    assert taken == [(level.checkpointing, level.mlp_tile) for level in LEVELS]


def test_a_faster_level_is_taken_only_where_its_forward_is_full():
    def plan(micro_batch_size, gradient_checkpointing, **settings):
        return MemoryPlan({"rows": micro_batch_size * {False: 8, "selective": 4}.get(gradient_checkpointing, 2)})

    def chosen(memory, seq_len):
        found = fit(plan, memory, batch_size=16, seq_len=seq_len)
        return found and (found.micro_batch_size, found.gradient_checkpointing)

    assert chosen(1000, 8) == (16, False)
    assert chosen(80, 8) == (16, "selective")
    assert chosen(40, 8) == (16, True)  # 4 rows of 8 tokens would fit without
    assert chosen(40, FULL_FORWARD // 4) == (4, False)  # and are a full forward
    assert chosen(20, 8) == (8, True)
    assert chosen(1, 8) is None


def test_largest_is_the_last_value_that_fits():
    for memory, expected in ((0, 0), (2.5, 2), (10, 9), (1000, 920)):
        assert largest(lambda rows: MemoryPlan({"rows": rows}), memory, "rows") == expected


@pytest.mark.parametrize("card", [16 << 30, 24 << 30])
def test_the_longest_context_of_llama_fits_and_one_token_more_does_not(card):
    frugal = partial(LLAMA, gradient_checkpointing="offload", mlp_tile=MLP_TILE)
    longest = largest(frugal, card, "seq_len")
    assert frugal(seq_len=longest).total <= HEADROOM * card < frugal(seq_len=longest + 1).total


def test_auto_is_the_fastest_level_with_room_for_it():
    def plan(gradient_checkpointing, mlp_tile):
        sizes = {False: 8, "selective": 4, True: 2, "offload": 1}
        return MemoryPlan(
            {"kept": 100 * sizes[gradient_checkpointing]}, host=50 * (gradient_checkpointing == "offload")
        )

    def chosen(memory, **more):
        level = fastest(plan, memory, **more)
        return level.checkpointing, level.mlp_tile

    assert [chosen(memory, host=1000) for memory in (870, 869, 435, 434, 218, 217)] == [
        (False, None), ("selective", None), ("selective", None), (True, None), (True, None), ("offload", None),
    ]  # fmt: skip
    assert chosen(110, host=50) == ("offload", MLP_TILE)  # the host has no room, and nothing is left but to try
    assert chosen(50, host=None) == (True, None)  # on a CPU block inputs are in host memory already
    assert chosen(220, host=None, tile=7) == (True, 7)


def test_host_memory_is_in_the_plan_of_offload_alone():
    planned = LLAMA(gradient_checkpointing="offload", micro_batch_size=2, seq_len=1000)
    assert planned.host == 32 * 2 * 1000 * 4096 * 2  # blocks, rows, tokens, width, bytes of bf16
    assert LLAMA(gradient_checkpointing=True).host == LLAMA(gradient_checkpointing="offload", device="cpu").host == 0

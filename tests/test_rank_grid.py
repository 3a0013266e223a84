"""Every module of an adapter has a cell of its own, in a picture and in a table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qalora.pictures import grid, signed

MAPS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MAPS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def llama(blocks: int, rank: int = 8) -> dict[str, int]:
    return {f"model.layers.{i}.{name}": rank for i in range(blocks) for name in MAPS}


@given(st.integers(1, 90), st.randoms())
def test_grid_places_every_module_in_its_own_cell(blocks, random):
    names = list(llama(blocks))
    random.shuffle(names)
    rows, columns, place = grid(names)
    assert rows == [str(i) for i in range(blocks)]
    assert columns == ["q", "k", "v", "o", "gate", "up", "down"]
    assert len(set(place.values())) == len(names)
    assert place["model.layers.0.mlp.up_proj"] == (0, 5)


def test_grid_takes_any_names():
    rows, columns, place = grid(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "lm.head"])
    assert rows == ["0", "1", "lm"]
    assert columns == ["attn.c_proj", "mlp.c_proj", "head"]
    assert place["lm.head"] == (2, 2)


@pytest.mark.parametrize(("change", "text"), [(3, "+3"), (-2, "−2"), (0, "")])
def test_signed(change, text):
    assert signed(change) == text

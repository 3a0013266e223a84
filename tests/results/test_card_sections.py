"""The sections of a model card."""

from __future__ import annotations

from qalora.results.card import adapter_card


def test_ranks_that_are_all_alike_are_a_sentence(adapter):
    folder = adapter({"model.layers.0.self_attn.q_proj": 4, "model.layers.0.self_attn.v_proj": 4})
    assert "Each of the 2 adapted linear layers has rank 4." in adapter_card(folder)

"""The sections of a model card."""

from __future__ import annotations

from qalora.results.card import adapter_card


def test_ranks_that_are_all_alike_are_a_sentence(adapter):
    folder = adapter({"model.layers.0.self_attn.q_proj": 4, "model.layers.0.self_attn.v_proj": 4})
    assert "Each of the 2 adapted linear layers has rank 4." in adapter_card(folder)


def test_a_gguf_base_says_which_files_transformers_reads_and_what_reads_the_others(adapter):
    ranks = {"model.layers.0.self_attn.q_proj": 4}
    card = adapter_card(adapter(ranks, base="/models/gemma-3-1b-it-Q4_K_M.gguf", name="gguf"))
    assert 'gguf_file="gemma-3-1b-it-Q4_K_M.gguf"' in card
    said = card.split("transformers reads GGUF files of the architectures ")[1]
    assert said.startswith("llama, qwen2, qwen3, qwen35, lfm2. ")
    assert "qalora merge --format gguf-lora" in said and "qalora generate --model gemma-3-1b-it-Q4_K_M.gguf" in said
    assert "GGUF" not in adapter_card(adapter(ranks, name="plain"))

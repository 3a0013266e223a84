"""Tensors of a base under the names of transformers, a block of rows at a time."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from qalora.base import tensor_files
from qalora.base.structure import structure_of
from qalora.base.tensor_files import Safetensors, TorchTensors
from qalora.errors import InputError

TENSORS = {"layers.0.w": torch.arange(40.0).view(10, 4), "lm_head.weight": torch.ones(2, 3, dtype=torch.bfloat16)}


@pytest.fixture(params=[Safetensors, TorchTensors])
def opened(request, tmp_path):
    file = tmp_path / "weights"
    if request.param is Safetensors:
        save_file(TENSORS, file)
    else:
        torch.save(TENSORS, file)
    return request.param([file])


def test_a_file_of_the_decoder_alone_has_the_names_of_a_causal_lm(opened):
    assert opened.stored == {"model.layers.0.w": "layers.0.w", "lm_head.weight": "lm_head.weight"}
    assert opened.shapes == {"model.layers.0.w": (10, 4), "lm_head.weight": (2, 3)}
    assert opened.packed == frozenset() and opened.tensor("lm_head.weight").dtype == torch.bfloat16


def test_pieces_are_blocks_of_rows_in_order(opened, monkeypatch):
    monkeypatch.setattr(tensor_files, "PIECE", 3 * 4 * 4)  # bytes of three rows
    pieces = list(opened.pieces("model.layers.0.w"))
    assert [len(piece) for piece in pieces] == [3, 3, 3, 1]
    assert torch.equal(torch.cat(pieces), TENSORS["layers.0.w"])


@pytest.mark.parametrize(("kind", "message"), [(Safetensors, "not a safetensors"), (TorchTensors, "cannot be read")])
def test_a_damaged_file_is_named(tmp_path, kind, message):
    (tmp_path / "w").write_bytes(b"nothing")
    with pytest.raises(InputError, match=f"/w: {message}"):
        kind([tmp_path / "w"])


@pytest.mark.parametrize("tied", [True, False])
def test_expected_shapes_are_those_that_transformers_saves(tied):
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    shapes = structure_of(LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=tied)).shapes
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (4, 8)
    assert ("lm_head.weight" in shapes) != tied and shapes["model.embed_tokens.weight"] == (11, 8)

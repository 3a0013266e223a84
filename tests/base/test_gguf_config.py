"""A GGUF file as base: positions are scaled as in the model that it was made of, or it is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from qalora.adapter.model import attach, write_adapter
from qalora.base import gguf_config as module
from qalora.base.gguf_config import gguf_config
from qalora.base.gguf_reader import GGUFReader
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import resolve
from qalora.deploy.merging import merge
from qalora.errors import InputError

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS = {
    "Llama 3.1": {**LLAMA3, "factor": 8.0},
    "Llama 3.2": {**LLAMA3, "factor": 32.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "none": {"rope_type": "default"},
}


@pytest.fixture
def exported(save_tiny_llama, tmp_path):
    """exported(config …) → (folder of the model, its GGUF file, made by a merge that adds nothing)."""

    def export(**config):
        folder = save_tiny_llama(tmp_path / "model", **config)
        model = AutoModelForCausalLM.from_pretrained(folder)
        (tmp_path / "adapter").mkdir()
        write_adapter(attach(model, r=1, alpha=1), tmp_path / "adapter")
        merge(
            resolve(str(folder)),
            tmp_path / "adapter",
            tmp_path / "gguf",
            quantization=None,
            format="gguf",
            gguf_type="f32",
        )
        return folder, tmp_path / "gguf" / "model.gguf"

    return export


def load(folder, file, **options):
    """With the folder's tokenizer, for transformers cannot read one without merges from GGUF."""
    return load_base(resolve(str(file)), dtype="float32", tokenizer=load_tokenizer(resolve(str(folder))), **options)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_positions_are_scaled_as_in_the_model(exported, scaling):
    rope = {"rope_theta": 500_000.0, **scaling}
    folder, file = exported(max_position_embeddings=256, rope_parameters=rope)
    ids = torch.randint(3, 40, (1, 200), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
    base = load(folder, file, load_in_4bit=False)
    assert base.model.config.rope_parameters == rope
    torch.testing.assert_close(base.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_scaling_that_is_not_known_is_refused(exported, monkeypatch):
    folder, file = exported(rope_parameters={"rope_theta": 500_000.0, **SCALINGS["Llama 3.1"]})
    monkeypatch.setitem(module.LLAMA3, "high_freq_factor", 2.0)
    with pytest.raises(
        InputError, match=r"model\.gguf: scales positions in a way \(rope_freqs\.weight\) that is not read"
    ):
        load(folder, file)


def test_biases_of_a_llama_are_refused(exported):
    """transformers reads the file without them, and says nothing."""
    folder, file = exported(attention_bias=True)
    assert any(tensor.name.endswith("attn_q.bias") for tensor in GGUFReader(str(file)).tensors)
    for call in (lambda: load(folder, file), lambda: gguf_config(file.parent, file.name)):
        with pytest.raises(InputError, match=r"model\.gguf: has biases \(blk\.0\.attn_.*\), .* use the model's folder"):
            call()

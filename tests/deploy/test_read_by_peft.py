"""That a file which PEFT would read as another function is noticed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from qalora.adapter.model import gated_layers
from qalora.deploy.compressed import write_cut
from qalora.deploy.read_by_peft import compare_with_peft
from qalora.errors import AnswerNo


@pytest.fixture(scope="module")
def tokenizer(save_tiny_llama, tmp_path_factory):
    found = PreTrainedTokenizerFast.from_pretrained(save_tiny_llama(tmp_path_factory.mktemp("base")))
    return lambda text: {"input_ids": [token % 128 for token in found(text)["input_ids"]]}


@pytest.mark.parametrize("four_bit", [False, True])
def test_equal_files_are_found_equal_and_the_base_is_left_as_it_was(tiny_adapter, tmp_path, tokenizer, four_bit):
    model = tiny_adapter(r=2, four_bit=four_bit).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad(), model.disable_adapter():
        bare = model(input_ids=ids).logits
    write_cut(model, tmp_path, torch.float32, None)
    base = model.get_base_model()
    found = compare_with_peft(model, tmp_path, tokenizer, torch.float32)
    assert found["relative_difference"] < 1e-5 < 1e-3 < found["mean_adapter_effect"]
    assert "kernels" not in base.__dict__
    with torch.no_grad():
        torch.testing.assert_close(base(input_ids=ids).logits, bare, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_diverged_is_said_to_have(tiny_adapter, tmp_path, tokenizer):
    model = tiny_adapter(r=2).eval()
    for layer in gated_layers(model).values():
        layer.B.data *= 1e30
    write_cut(model, tmp_path, torch.float32, None)
    with pytest.raises(AnswerNo, match="it has diverged"):
        compare_with_peft(model, tmp_path, tokenizer, torch.float32)


@pytest.mark.parametrize("what", ["a weight", "a scaling", "a module"])
def test_another_function_is_noticed(tiny_adapter, tmp_path, tokenizer, what):
    model = tiny_adapter(r=2, targets=["q_proj", "k_proj"]).eval()
    write_cut(model, tmp_path, torch.float32, None)
    file = tmp_path / "adapter_model.safetensors"
    tensors, config = load_file(file), json.loads((tmp_path / "adapter_config.json").read_text())
    if what == "a weight":
        next(iter(tensors.values()))[0, 0] += 1e-3
    elif what == "a scaling":
        config["lora_alpha"] *= 2
    else:
        config["exclude_modules"] = ["model.layers.0.self_attn.q_proj"]
    save_file(tensors, file)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="other (ranks|modules)"):
        compare_with_peft(model, tmp_path, tokenizer, torch.float32)

from __future__ import annotations

import json
import shutil

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

from qalora.base import checkpoint as checkpoint_module
from qalora.base import tensor_files
from qalora.base.checkpoint import Quantization, open_checkpoint, open_config, trained_pieces
from qalora.base.loading import load_base
from qalora.base.quantized import dequantize, linear_maps
from qalora.base.registry import resolve
from qalora.errors import InputError


@pytest.fixture(scope="module")
def folder(save_tiny_llama, tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("stretch", [1 << 22, 2048], ids=["whole", "in parts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True)], ids=["nf4", "nf4 single", "fp4"]
)
def test_trained_weights_are_those_that_loading_for_training_gives(
    folder, dtype, quant_type, double_quant, stretch, monkeypatch
):
    monkeypatch.setattr(checkpoint_module, "STRETCH", stretch)
    monkeypatch.setattr(tensor_files, "PIECE", 8 * stretch)
    source = resolve(str(folder))
    name = str(dtype).removeprefix("torch.")
    maps = linear_maps(load_base(source, dtype=name, quant_type=quant_type, double_quant=double_quant).model)
    assert {linear.weight.quant_state.quant_type for linear in maps.values()} == {quant_type}
    checkpoint, _ = open_checkpoint(source)
    assert len(maps) == 14
    for module, linear in maps.items():
        parts = list(trained_pieces(checkpoint, f"{module}.weight", Quantization(quant_type, double_quant, dtype)))
        assert (len(parts) > 1) == (linear.weight.quant_state.shape.numel() > max(stretch, 64 * linear.in_features))
        assert torch.equal(torch.cat(parts), dequantize(linear, dtype).float()), module


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("blocksize", [64, 128])
def test_packed_weights_are_read_whatever_their_storage_and_blocks(folder, tmp_path, monkeypatch, storage, blocksize):
    """In several stretches, as a map of real size is."""
    monkeypatch.setattr(checkpoint_module, "STRETCH", 2048)
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", quant_storage=storage)
    packed = {
        "model.layers.0.w_proj.weight": codes,
        **{f"model.layers.0.w_proj.weight.{key}": value for key, value in state.as_dict(packed=True).items()},
    }
    save_file(packed, tmp_path / "model.safetensors")
    checkpoint = tensor_files.Safetensors([tmp_path / "model.safetensors"])
    parts = list(trained_pieces(checkpoint, "model.layers.0.w_proj.weight", Quantization("fp4", True, torch.float32)))
    assert len(parts) > 1
    absmax = weight.view(-1, blocksize).abs().amax(1, keepdim=True)
    state.shape = torch.Size((1, weight.numel()))  # on a CPU rows of 64 are dequantized wrongly in blocks of 128
    assert torch.equal(torch.cat(parts), dequantize_4bit(codes, state).view_as(weight))
    assert ((torch.cat(parts) - weight).view(-1, blocksize).abs() <= 0.16 * absmax).all()  # NF4's widest gap is 0.304


@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", True), ("fp4", False)])
def test_a_folder_saved_in_4_bits_is_read_as_it_stands(folder, tmp_path, quant_type, double_quant):
    """Whatever quantization is asked for beside it."""
    loaded = load_base(resolve(str(folder)), dtype="bfloat16", quant_type=quant_type, double_quant=double_quant)
    loaded.model.save_pretrained(tmp_path / "4bit")
    checkpoint, _ = open_checkpoint(resolve(str(tmp_path / "4bit")))
    for module, linear in linear_maps(loaded.model).items():
        parts = list(trained_pieces(checkpoint, f"{module}.weight", Quantization("nf4", True, torch.bfloat16)))
        assert torch.equal(torch.cat(parts), dequantize(linear, torch.bfloat16).float()), module


@pytest.mark.parametrize("damage", ["missing weight", "no weights", "garbage", "other shape"])
def test_a_damaged_base_is_named(folder, tmp_path, damage):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    file = base / "model.safetensors"
    tensors = load_file(file)
    if damage == "missing weight":
        del tensors["model.norm.weight"]
        save_file(tensors, file)
    elif damage == "no weights":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(b"not a tensor")
    else:
        tensors["model.norm.weight"] = torch.ones(7)
        save_file(tensors, file)
    words = {
        "missing weight": "lack 1 weights .model.norm.weight",
        "no weights": "holds no weights",
        "garbage": "not a safetensors file",
        "other shape": r"model.norm.weight is \(7,\) in the file, \(64,\) by the config",
    }
    with pytest.raises(InputError, match=words[damage]):
        open_checkpoint(resolve(str(base)))


def test_pickled_weights_are_read_as_tensors_only(folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    torch.save(tensors, base / "pytorch_model.bin")
    checkpoint, _ = open_checkpoint(resolve(str(base)))
    assert torch.equal(checkpoint.tensor("model.norm.weight"), tensors["model.norm.weight"])
    assert torch.equal(torch.cat(list(checkpoint.pieces("lm_head.weight"))), tensors["lm_head.weight"])
    torch.save({"model.norm.weight": print}, base / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        open_checkpoint(resolve(str(base)))


def test_a_pad_token_without_an_embedding_is_named(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for pad in (None, -1, config["vocab_size"] - 1):
        (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": pad}))
        assert open_config(resolve(str(tmp_path))).pad_token_id == pad
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": config["vocab_size"]}))
    with pytest.raises(InputError, match=f"pad_token_id {config['vocab_size']}, and vocab_size {config['vocab_size']}"):
        open_config(resolve(str(tmp_path)))

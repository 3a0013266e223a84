"""Files that are written piece by piece, read by the library's own reader."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qalora.base.tensor_files import Safetensors
from qalora.deploy.safetensors_files import NAMES, Written, copied, rounded, write_safetensors
from qalora.errors import InputError


def written(tensor, rows: int = 2) -> Written:
    """In blocks of so many rows."""
    return Written(tuple(tensor.shape), tensor.dtype, lambda: iter(tensor.split(rows) if tensor.ndim else [tensor]))


@pytest.mark.parametrize("dtype", NAMES)
def test_tensors_of_every_dtype_are_read_as_they_were_written(tmp_path, dtype):
    tensor = (torch.arange(21).view(7, 3) % 2).to(dtype)
    write_safetensors(tmp_path, {"a": written(tensor)}, 10**9)
    found = load_file(tmp_path / "model.safetensors")["a"]
    assert found.dtype == dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_several_files_have_an_index(tmp_path):
    tensors = {f"t{i}": torch.full((4, 8), float(i)) for i in range(5)}
    write_safetensors(tmp_path, {name: written(tensor) for name, tensor in tensors.items()}, 256)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys() and len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_what_is_copied_is_bit_for_bit_the_same(tmp_path):
    tensors = {
        "nan": torch.tensor([[float("nan"), float("inf")]]),
        "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "count": torch.tensor([2**40]),
    }
    save_file(tensors, tmp_path / "source.safetensors")
    source = Safetensors([tmp_path / "source.safetensors"])
    write_safetensors(tmp_path, {name: copied(source, name) for name in tensors}, 10**9)
    found = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_a_value_beyond_the_dtype_is_named():
    with pytest.raises(InputError, match=r"^model.norm: a merged value is beyond the range of torch.float16"):
        rounded("model.norm", torch.tensor([1e6]), torch.float16)

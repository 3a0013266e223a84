"""An adapter that a run starts from is read without its weights, and contradicts no setting in silence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from qalora.adapter.given import given_adapter
from qalora.errors import InputError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    tensors = {}
    for name, rank in (("q_proj", 4), ("v_proj", 2)):
        tensors[f"base_model.model.model.layers.0.self_attn.{name}.lora_A.weight"] = torch.ones(rank, 8)
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    return tmp_path / "adapter"


def test_ranks_are_those_of_the_matrices(folder):
    found = given_adapter(folder)
    assert found.ranks == {"model.layers.0.self_attn.q_proj": 4, "model.layers.0.self_attn.v_proj": 2}
    assert (found.r, found.alpha, found.target_modules) == (4, 8, ["q_proj", "v_proj"])


def test_settings_beside_it_agree_or_are_refused_with_both_values(folder):
    found = given_adapter(folder)
    found.check_settings({"r": 4, "target_modules": ["v_proj", "q_proj"]})
    found.check_settings({"target_modules": r".*\.(q|v)_proj"})
    for given, message in (
        ({"r": 8}, "lora.r=8: the adapter in .* has 4"),
        ({"target_modules": ["q_proj"]}, "lora.target_modules=q_proj: .* has q_proj,v_proj"),
        ({"target_modules": r".*\.q_proj"}, "has other modules"),
    ):
        with pytest.raises(InputError, match=message):
            found.check_settings(given)


def test_what_is_no_adapter_names_what_is_near(folder, tmp_path):
    with pytest.raises(InputError, match=rf"did you mean lora\.adapter={folder}\?"):
        given_adapter(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="pickled and not read"):
        given_adapter(folder)

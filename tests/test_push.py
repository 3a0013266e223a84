"""`qalora push`: what would go, before anything does."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from qalora.cli import run
from qalora.push import main


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "huggyllama/llama-7b"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "optimizer.pt").write_bytes(b"state")
    return folder


def test_a_dry_run_lists_files_and_sizes_and_says_what_stays(adapter, capsys):
    assert run(main, [str(adapter), "me/x", "--dry-run"]) == 0
    said = capsys.readouterr()
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in said.out.splitlines()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= listed.keys()
    assert listed["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").stat().st_size
    assert "optimizer.pt" not in listed and "left out: optimizer.pt" in said.err


def test_a_folder_that_is_none_is_refused(tmp_path, capsys):
    assert run(main, [str(tmp_path / "nothing"), "me/x", "--dry-run"]) == 2

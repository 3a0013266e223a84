"""A base is told by its weights and its function, wherever its files lie."""

from __future__ import annotations

import json
import shutil

from safetensors.torch import load_file, save_file

from qalora.base.fingerprint import fingerprint, tensor_header
from qalora.base.registry import resolve


def test_a_base_is_its_weights_wherever_they_lie(save_tiny_llama, tmp_path):
    folder = save_tiny_llama(tmp_path / "a")
    known = fingerprint(resolve(str(folder)))
    copied = shutil.copytree(folder, tmp_path / "b")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "transformers_version": "9", "use_cache": True}))
    tensors = load_file(copied / "model.safetensors")
    assert {name: tuple(entry["shape"]) for name, entry in tensor_header(copied / "model.safetensors").items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    (copied / "model.safetensors").unlink()
    names = sorted(tensors)
    for shard in (0, 1):
        save_file({name: tensors[name] for name in names[shard::2]}, copied / f"model-{shard}.safetensors")
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    (copied / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_file({"other": tensors[names[0]]}, copied / "consolidated.safetensors")  # which nobody reads
    assert fingerprint(resolve(str(copied))) == known
    tensors[names[3]].view(-1)[-1] += 1e-3
    save_file({name: tensors[name] for name in names[1::2]}, copied / "model-1.safetensors")
    assert fingerprint(resolve(str(copied))) != known
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert fingerprint(resolve(str(folder))) != known

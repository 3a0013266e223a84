"""Adapters that others wrote: what can be read is, and what cannot is called by its name."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qalora.adapter.saved import check_adapter, read_adapter, read_config
from qalora.base.registry import resolve
from qalora.errors import InputError


@pytest.fixture(scope="module")
def folder(save_tiny_llama, tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def save(folder):
    """save(path, **options of LoraConfig) → path, written by PEFT."""

    def write(path: Path, **options) -> Path:
        torch.manual_seed(0)
        config = {
            "r": 2,
            "target_modules": "all-linear",
            "init_lora_weights": False,
            "task_type": "CAUSAL_LM",
        } | options
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**config)).save_pretrained(str(path))
        return path

    return write


@pytest.fixture
def plain(save, tmp_path):
    return save(tmp_path / "adapter")


def pickled(plain: Path) -> Path:
    """As PEFT wrote adapters until 2023."""
    torch.save(load_file(plain / "adapter_model.safetensors"), plain / "adapter_model.bin")
    return plain / "adapter_model.bin"


def test_an_old_adapter_in_a_pickle_is_read_like_peft_does(folder, plain):
    file = pickled(plain)
    weights = load_file(plain / "adapter_model.safetensors")
    (plain / "adapter_model.safetensors").unlink()
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(plain))
    found = check_adapter(plain, resolve(str(folder)))
    assert file.is_file()
    assert 2 * len(found.pairs) == len(weights)
    for name, (A, B) in found.pairs.items():
        layer = reference.base_model.model.get_submodule(name)
        assert torch.equal(A, layer.lora_A["default"].weight)
        assert torch.equal(B, layer.lora_B["default"].weight)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/qalora-was-here"),))


@pytest.mark.parametrize("content", [pickle.dumps({"a": Evil()}), b"not a pickle", pickle.dumps([1])])
def test_nothing_in_a_pickle_is_run(plain, content):
    (plain / "adapter_model.safetensors").unlink()
    (plain / "adapter_model.bin").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as tensors"):
        read_adapter(plain)
    assert not Path("/tmp/qalora-was-here").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts the output head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapts the embeddings"),
        ({"modules_to_save": ["lm_head"]}, "whole copies of other layers"),
        ({"modules_to_save": ["embed_tokens"]}, "whole copies of other layers"),
        ({"trainable_token_indices": [1, 2]}, "rows of the embeddings"),
        ({"use_dora": True}, "DoRA"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(next(iter(value.values()))),
)
def test_what_is_no_lora_of_blocks_is_called_by_its_name_and_what_works_is_said(
    folder, save, tmp_path, options, message
):
    save(tmp_path / "adapter", **options)
    with pytest.raises(InputError) as found:
        check_adapter(tmp_path / "adapter", resolve(str(folder)))
    text = str(found.value)
    assert message in text
    assert "base_model.model" not in text
    assert "merge_and_unload" in text
    # What is advised is a model then that needs no adapter.
    base = AutoModelForCausalLM.from_pretrained(folder)
    whole = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    ids = torch.arange(2, 20)[None]
    before = whole(ids).logits
    merged = whole.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- wrong places


def run_folder(there: Path, plain: Path, finished: bool) -> Path:
    run = there / "run"
    for step in (8, 12):
        shutil.copytree(plain, run / f"checkpoint-{step}")
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    if finished:
        shutil.copytree(plain, run / "adapter")
    (run / "recipe.yaml").write_text("{}")
    return run


def message_of(path: Path) -> str:
    with pytest.raises(InputError) as found:
        read_config(path)
    return found.value.as_typed


def test_the_folder_of_a_run_names_its_adapter(plain, tmp_path):
    run = run_folder(tmp_path, plain, finished=True)
    assert message_of(run).endswith(f"the folder of a run; pass the adapter in it: --adapter {run / 'adapter'}")
    read_adapter(run / "adapter")


def test_the_folder_of_an_unfinished_run_names_its_newest_checkpoint(plain, tmp_path):
    run = run_folder(tmp_path, plain, finished=False)
    assert message_of(run).endswith(f"--adapter {run / 'checkpoint-12'}")
    read_adapter(run / "checkpoint-12")


def test_a_folder_above_names_what_is_below(plain, tmp_path):
    run_folder(tmp_path / "outputs", plain, finished=True)
    shutil.copytree(plain, tmp_path / "outputs" / "other")
    text = message_of(tmp_path / "outputs")
    assert "a folder that holds some; pass one of them" in text
    assert f"{tmp_path / 'outputs' / 'run' / 'adapter'}, " in text
    assert "(and 1 more)" in text


def test_other_places_say_what_they_are(folder, plain, tmp_path):
    assert f"a whole model; pass it as --model {folder}, without --adapter" in message_of(folder)
    assert "there is no such folder." in message_of(tmp_path / "nowhere")
    assert "hf download someone/their-lora --local-dir DIR" in message_of(Path("someone/their-lora"))
    assert f"pass the folder of an adapter, such as {plain}" in message_of(plain / "adapter_model.safetensors")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "adapter.gguf").touch()
    assert "in GGUF, which llama.cpp reads" in message_of(tmp_path / "gguf")
    (plain / "adapter_config.json").unlink()
    assert "no adapter_config.json beside its weights" in message_of(plain)


def test_another_kind_of_adapter_is_named(plain):
    file = plain / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "IA3"}))
    assert "peft_type is not LORA (it is IA3)" in message_of(plain)


def test_a_state_dict_and_an_empty_file_are_no_adapters(plain):
    """PEFT loads nothing of either, with a warning at most."""
    file = plain / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}, file)
    with pytest.raises(InputError, match=r"lora_A.default.weight has the name of the adapter in it \(default\)"):
        read_adapter(plain)
    save_file({}, file)
    with pytest.raises(InputError, match="the file of its weights is empty"):
        read_adapter(plain)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_weights_of_8_or_64_bits_are_read_as_peft_reads_them(folder, plain, dtype):
    file = plain / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(plain))
    for name, (A, B) in read_adapter(plain).pairs.items():
        module = reference.get_submodule(f"base_model.model.{name}")
        assert torch.equal(A.float(), module.lora_A.default.weight)
        assert torch.equal(B.float(), module.lora_B.default.weight)


def test_integers_are_no_weights(plain):
    file = plain / "adapter_model.safetensors"
    save_file({key: (100 * tensor).to(torch.int8) for key, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match=r"layers\.\d\.\S+ holds torch.int8, and a LoRA's weights are floating-point"):
        read_adapter(plain)

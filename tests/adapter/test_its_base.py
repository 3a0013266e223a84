"""Whether a base is the one that an adapter was trained on, wherever either lies, and what each command says of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qalora.adapter.its_base import loading_as_trained, other_base, refuse_other_base
from qalora.adapter.provenance import Provenance
from qalora.base.fingerprint import fingerprint, stored_as
from qalora.base.registry import ModelSource, resolve
from qalora.cli import run
from qalora.errors import InputError
from qalora.merge import main as merge

LOADING = {"load_in_4bit": True, "quant_type": "nf4", "double_quant": True, "dtype": "auto"}


@pytest.fixture(scope="module")
def base(save_tiny_llama, tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sibling(base, tmp_path_factory):
    """Another model of the same shapes, such as a chat model beside its base."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("sibling") / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pefts(base, tmp_path_factory):
    """An adapter that PEFT saved."""
    path = tmp_path_factory.mktemp("pefts")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(path))
    return path


@pytest.fixture
def ours(base, pefts, tmp_path):
    """ours(**fields of Provenance) → an adapter trained on the base."""

    def save(**fields):
        path = shutil.copytree(pefts, tmp_path / "ours", dirs_exist_ok=True)
        source = resolve(str(base))
        known = Provenance("models/mine", "nf4", True, "float32", base=fingerprint(source), stored_as=stored_as(source))
        replace(known, **fields).write(path)
        return path

    return save


def in_bf16(base, folder):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_the_same_base_under_any_name_and_in_any_shards_needs_no_word(base, ours, tmp_path):
    moved = shutil.copytree(base, tmp_path / "elsewhere")
    (moved / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(moved, max_shard_size="30KB")
    config = json.loads((moved / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]  # as transformers 4 writes it
    (moved / "config.json").write_text(json.dumps({**config, "rope_theta": theta, "pad_token_id": 0}))
    assert len(list(moved.glob("*.safetensors"))) > 1
    assert other_base(ours(), resolve(str(moved))) is None


@pytest.mark.parametrize("changed", ["weights", "theta"])
def test_another_base_is_refused_with_both_named(base, sibling, ours, tmp_path, changed):
    folder = sibling
    if changed == "theta":
        folder = shutil.copytree(base, tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 1e6
        (folder / "config.json").write_text(json.dumps(config))
    now, then = fingerprint(resolve(str(folder))), fingerprint(resolve(str(base)))
    message = rf"was trained on models/mine \(weights {then[:12]}\), and model {folder} has other weights \({now[:12]}"
    with pytest.raises(InputError, match=message):
        refuse_other_base(ours(), resolve(str(folder)))


def test_another_form_of_the_weights_is_a_line(base, ours, tmp_path):
    """As of a run on a 4-bit checkpoint that is merged into the 16-bit model."""
    line = refuse_other_base(ours(), resolve(str(in_bf16(base, tmp_path / "m"))))
    assert "trained on models/mine (stored as F32)" in line and "(stored as BF16)" in line


@pytest.mark.parametrize(
    ("named", "source", "same"),
    [
        ("meta-llama/Llama-2-7b-hf", ModelSource("llama2-7b", "hub", "x", None, "meta-llama/Llama-2-7b-hf"), True),
        ("meta-llama/Llama-2-7b-hf", ModelSource("/data/llama-2-7b-hf", "folder", "/data/llama-2-7b-hf"), True),
        ("/of/another/machine/llama", ModelSource("llama", "folder", "llama"), True),
        ("org/m", ModelSource("s", "folder", "/c/hub/models--org--m/snapshots/1a2b"), True),
        ("meta-llama/Llama-2-7b-hf", ModelSource("org/Llama-2-7b-chat-hf", "hub", "org/Llama-2-7b-chat-hf"), False),
        (None, ModelSource("anything", "hub", "any/thing"), True),
    ],
)
def test_an_adapter_without_a_fingerprint_goes_by_names(tmp_path, named, source, same):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    found = other_base(tmp_path, source)
    assert (found is None) == same
    assert same or (f"trained on {named}, and --model is {source.name}" in found.line and not found.certain)


def test_an_adapter_of_pefts_whose_base_lies_here_goes_by_its_weights(base, sibling, pefts, tmp_path):
    assert other_base(pefts, resolve(str(shutil.copytree(base, tmp_path / "elsewhere")))) is None
    assert not other_base(pefts, resolve(str(sibling))).certain


def test_gguf_is_its_tensors_and_not_its_other_metadata(base, ours, tmp_path):
    """Tools that add a chat template move every byte."""
    from gguf import GGUFReader

    from qalora.deploy.gguf import Writer

    arguments = ["--model", base, "--adapter", ours(), "--output", tmp_path / "g", "--format", "gguf", "--no-verify"]
    assert merge([*map(str, arguments)]) == 0
    file, known = tmp_path / "g" / "model.gguf", fingerprint(resolve(str(tmp_path / "g" / "model.gguf")))

    def rewritten(name, change=0):
        reader, writer = GGUFReader(file), Writer(str(tmp_path / name), "llama")
        for key, field in reader.fields.items():
            if not key.startswith("GGUF") and key != "general.architecture":
                kinds = field.types
                writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)
        writer.add_string("general.description", "with another chat template")
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data + change, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return fingerprint(resolve(str(tmp_path / name)))

    assert rewritten("same.gguf") == known
    assert rewritten("other.gguf", change=1) != known


def test_merge_writes_nothing_of_another_base_and_reading_commands_say_it(
    sibling, base, ours, tmp_path, capsys, monkeypatch
):
    from qalora.evaluate import main as evaluate
    from qalora.generate import main as generate
    from qalora.score import main as score

    monkeypatch.setattr("qalora.generate.answer", lambda *arguments, **options: "")
    adapter = ours()
    arguments = ["--model", str(sibling), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert run(merge, arguments) == 2
    assert not (tmp_path / "merged").exists()
    assert "has other weights" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    data = ["--data", str(tmp_path / "rows.jsonl"), "--dtype", "float32"]
    commands = {
        generate: ["--prompt", "a"],
        evaluate: [*data, "--quiet"],
        score: [*data, "--method", "first-order", "--output", str(tmp_path / "s.json"), "--rows", "1"],
    }
    for command, flags in commands.items():
        for model, said in ((sibling, 1), (base, 0)):
            assert run(command, ["--model", str(model), "--adapter", str(adapter), *flags]) == 0
            assert capsys.readouterr().err.count("was trained on models/mine") == said


def test_an_adapter_is_not_merged_twice(base, pefts, ours, tmp_path):
    arguments = [
        "--model",
        base,
        "--adapter",
        pefts,
        "--output",
        tmp_path / "merged",
        "--base",
        "original",
        "--no-verify",
    ]
    assert merge([*map(str, arguments)]) == 0
    with pytest.raises(InputError, match=r"pefts.*: is in model .*/merged already"):
        refuse_other_base(pefts, resolve(str(tmp_path / "merged")))
    assert "already" not in refuse_other_base(ours(), resolve(str(tmp_path / "merged")))  # another adapter, in bf16


# ------------------------------------------------------------------------------------------------------- its precision


@pytest.mark.parametrize(
    ("trained", "given", "loaded", "said"),
    [
        (("fp4", False), (), dict(quant_type="fp4", double_quant=False), None),
        ((None, False), (), dict(load_in_4bit=False), "was not quantized, so this one is not either"),
        ((None, False), ("load_in_4bit",), {}, "not quantized, and this one is in 4 bits"),
        (("fp4", True), ("quant_type",), {}, "was trained with quant_type=fp4, and this base has nf4"),
        (("nf4", True), ("quant_type",), {}, None),
    ],
)
def test_a_base_is_loaded_as_it_was_when_the_adapter_was_trained(base, ours, trained, given, loaded, said):
    adapter = ours(quant_type=trained[0], double_quant=trained[1])
    found, line = loading_as_trained(adapter, resolve(str(base)), LOADING, given)
    assert found == LOADING | loaded
    assert (line is None) == (said is None)
    assert said is None or said in line


def test_a_base_asked_for_unquantized_says_what_the_adapter_saw(base, ours):
    adapter = ours()
    found, line = loading_as_trained(adapter, resolve(str(base)), LOADING | {"load_in_4bit": False}, ["load_in_4bit"])
    assert found["load_in_4bit"] is False
    assert "was trained on a base in 4 bits, and this one is not" in line


def test_a_base_that_is_stored_in_4_bits_is_loaded_so_whatever_the_adapter_saw(base, ours, tmp_path):
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "m").mkdir()
    quantization = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | quantization))
    found, line = loading_as_trained(ours(quant_type=None), resolve(str(tmp_path / "m")), LOADING)
    assert found == LOADING
    assert "not quantized, and this one is in 4 bits" in line

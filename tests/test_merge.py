from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from qalora.adapter.provenance import Provenance
from qalora.base.checkpoint import Quantization
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import resolve
from qalora.cli import run
from qalora.errors import InputError
from qalora.merge import asked_quantization, main, parser, trained_quantization


@pytest.fixture(scope="module")
def folder(save_tiny_llama, tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(str(path))
    return path


@pytest.mark.parametrize(
    ("flags", "base", "dtype"),
    [
        (["--base", "dequantized"], "dequantized", torch.bfloat16),
        (["--base", "original", "--dtype", "float32"], "original", torch.float32),
        (["--no-quantize", "--dtype", "float32"], "original", torch.float32),
    ],
    ids=["defaults", "original base", "no-quantize"],
)
def test_the_printed_difference_is_the_measured_one(folder, adapter, tmp_path, capsys, flags, base, dtype):
    arguments = ["--model", str(folder), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
    assert main(arguments + flags) == 0
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["base"] == base
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == dtype
    assert f"largest logit difference {report['max_logit_difference']:.3g}" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["model", "adapter", "output"])
def test_bad_input_is_named_before_any_weights_load(folder, adapter, tmp_path, monkeypatch, wrong):
    def never(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("qalora.deploy.merging.trained_pieces", never)
    (tmp_path / "note.txt").write_text("mine")
    values = {"model": str(folder), "adapter": str(adapter), "output": str(tmp_path / "merged")}
    values[wrong] = {"model": "no-such-model", "adapter": str(folder), "output": str(tmp_path)}[wrong]
    arguments = [part for name, value in values.items() for part in (f"--{name}", value)]
    with pytest.raises(InputError, match=values[wrong]):
        main([*arguments, "--base", "dequantized"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "gguf", "--dtype", "float32"], "--dtype: goes with --format hf, not gguf"),
        (["--gguf-type", "q8_0"], "--gguf-type: goes with --format gguf, not hf"),
        (["--format", "peft", "--base", "original"], "--base: goes with --format hf or gguf, not peft"),
        (["--format", "peft", "--no-verify"], "--no-verify: goes with --format hf or gguf, not peft"),
        (["--format", "peft", "--bnb-4bit-quant-type", "nf4"], "--bnb-4bit-quant-type: goes with --format hf or gguf"),
        (["--base", "original", "--no-double-quant"], "--no-double-quant: of the 4-bit weights"),
        (["--base", "dequantized", "--no-quantize"], "--no-quantize: the same as --base original"),
        (["--max-shard-size", "4 apples"], "--max-shard-size 4 apples: give a size such as"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_without_effect_are_errors(folder, adapter, tmp_path, flags, message):
    with pytest.raises(InputError, match=str(InputError(message))):
        main(["--model", str(folder), "--adapter", str(adapter), "--output", str(tmp_path / "out"), *flags])


def test_the_working_directory_may_be_the_output(folder, adapter, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    arguments = ["--model", str(folder), "--adapter", str(adapter), "--output", ".", "--format", "peft"]
    assert main(arguments) == 0
    assert (here.parent / "here" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("format", ["gguf", "peft", "peft-uniform", "gguf-lora"])
def test_every_format_ends_in_its_file(folder, adapter, tmp_path, format):
    output = tmp_path / "out"
    arguments = ["--model", str(folder), "--adapter", str(adapter), "--output", str(output), "--format", format]
    arguments += ["--base", "dequantized"] if format == "gguf" else []
    assert main(arguments) == 0
    file = {"gguf": "model.gguf", "gguf-lora": "adapter.gguf"}.get(format, "adapter_model.safetensors")
    assert (output / file).is_file()
    assert json.loads((output / "merge.json").read_text())["format"] == format


@pytest.mark.parametrize(
    ("flags", "dtype", "files"),
    [
        (["--format", "gguf", "--gguf-type", "q8_0"], "q8_0", 1),
        (["--max-shard-size", "60KB"], "bfloat16", 5),
    ],
    ids=["gguf type", "shards"],
)
def test_how_it_is_saved_can_be_asked_for(folder, adapter, tmp_path, flags, dtype, files):
    output = tmp_path / "out"
    arguments = ["--model", str(folder), "--adapter", str(adapter), "--output", str(output), "--base", "dequantized"]
    assert main([*arguments, *flags]) == 0
    assert json.loads((output / "merge.json").read_text())["dtype"] == dtype
    assert len([*output.glob("*.gguf"), *output.glob("*.safetensors")]) == files


@pytest.mark.parametrize("window", [256, 16, None])
def test_a_sliding_window_that_llama_cpp_does_not_know_is_said(folder, adapter, tmp_path, capsys, window):
    """The check compares as many tokens as the window holds, and what is written is right as far."""
    base = tmp_path / "mistral"
    shutil.copytree(folder, base)
    fields = json.loads((base / "config.json").read_text())
    fields |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    (base / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 512}))
    arguments = ["--model", str(base), "--adapter", str(adapter), "--output", str(tmp_path / "out"), "--format", "gguf"]
    assert run(main, [*arguments, "--base", "original"]) == 0
    line = f"sliding_window={window}: llama.cpp attends to the whole text in mistral models"
    assert (line in capsys.readouterr().err) == (window is not None)
    assert (json.loads((tmp_path / "out" / "merge.json").read_text())["caveat"] is None) == (window is None)


@pytest.fixture
def asked(folder, monkeypatch):
    """asked(adapter, *flags) → how the training is taken to have had its base; never by what is fast here."""
    monkeypatch.setattr("qalora.base.loading.choose_compute_dtype", lambda *_: pytest.fail("decided by this machine"))

    def ask(adapter, *flags, model=folder):
        arguments = ["--model", str(model), "--adapter", str(adapter), "--output", "o", *flags]
        args = parser().parse_args(arguments)
        return trained_quantization(str(adapter), resolve(str(model)), *asked_quantization(args))

    return ask


def test_the_base_is_as_in_the_run_that_the_adapter_lies_in(asked, tmp_path):
    adapter = tmp_path / "adapter"
    quantization = {
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"quantization": quantization}))
    assert asked(adapter) == Quantization("fp4", False, torch.float32)
    flags = ["--bnb-4bit-quant-type", "nf4", "--bnb-4bit-compute-dtype", "bfloat16"]
    assert asked(adapter, *flags) == Quantization("nf4", False, torch.bfloat16)
    (tmp_path / "recipe.yaml").write_text(
        "quantization: {bnb_4bit_compute_dtype: float16}"
    )  # a T4's run, on any machine
    assert asked(adapter) == Quantization("nf4", True, torch.float16)
    (tmp_path / "recipe.yaml").write_text("quantization: {load_in_4bit: false, bnb_4bit_compute_dtype: bfloat16}")
    assert asked(adapter) == Quantization(None, True, torch.bfloat16)
    assert asked(adapter, "--base", "original") is None


def test_an_adapter_carries_what_it_was_trained_on(asked, tmp_path):
    """Wherever it is copied to, and over the recipe beside it."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "recipe.yaml").write_text("quantization: {load_in_4bit: false}")
    Provenance("m", "fp4", False, "float32").write(tmp_path / "adapter")
    assert asked(tmp_path / "adapter") == Quantization("fp4", False, torch.float32)
    assert asked(tmp_path / "adapter", "--no-quantize") is None
    Provenance("m", None, False, "bfloat16").write(tmp_path / "adapter")
    assert asked(tmp_path / "adapter") == Quantization(None, False, torch.bfloat16)


def test_an_adapter_that_says_nothing_needs_the_flag(asked, folder, adapter, tmp_path, capsys):
    message = "does not say what precision its base had .* --base dequantized .*QLoRA.* --base original"
    with pytest.raises(InputError, match=str(InputError(message))):
        asked(adapter)
    with pytest.raises(InputError, match=str(InputError(message))):
        main(["--model", str(folder), "--adapter", str(adapter), "--output", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []
    assert asked(adapter, "--base", "original") is None
    assert asked(adapter, "--base", "dequantized") == Quantization("nf4", True, torch.bfloat16)
    assert asked(adapter, "--no-double-quant").double_quant is False
    assert "taken as bfloat16" in capsys.readouterr().err
    assert asked(adapter, "--bnb-4bit-compute-dtype", "float32") == Quantization("nf4", True, torch.float32)
    assert capsys.readouterr().err == ""


def test_a_base_that_is_stored_in_4_bits_says_it_itself(asked, folder, adapter, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    quantization = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_compute_dtype": "float16"
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    assert asked(adapter, model=tmp_path) == Quantization("fp4", True, torch.float16)


@pytest.mark.parametrize("text", ["[1, 2", "just words", "quantization: {bits: 4}"])
def test_a_recipe_that_cannot_be_read_is_named(asked, tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=r"recipe.yaml: not the recipe of a run"):
        asked(tmp_path / "adapter")


def test_a_base_in_4_bits_has_no_original_weights(folder, adapter, tmp_path):
    load_base(resolve(str(folder)), dtype="bfloat16").model.save_pretrained(tmp_path / "4bit")
    load_tokenizer(resolve(str(folder))).save_pretrained(tmp_path / "4bit")
    with pytest.raises(InputError, match="stored in 4 bits, and base original asks for 16-bit weights"):
        arguments = ["--model", str(tmp_path / "4bit"), "--adapter", str(adapter), "--output", str(tmp_path / "merged")]
        main([*arguments, "--base", "original"])
    assert not (tmp_path / "merged").exists()


def test_a_rank_that_no_vllm_takes_is_said(folder, tmp_path, capsys):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=513, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    arguments = ["--model", folder, "--adapter", tmp_path / "adapter", "--output", tmp_path / "out"]
    assert main([*map(str, arguments), "--format", "peft-uniform"]) == 0
    out = capsys.readouterr().out
    assert "vLLM: takes ranks up to 512, and this adapter has 513" in out
    assert "None" not in out


# ---------------------------------------------------------------------------------- flags against what is known already


@pytest.mark.parametrize(
    ("known", "flags", "quantization", "said"),
    [
        (
            ("nf4", "float32"),
            ["--base", "original"],
            None,
            "was trained on nf4 weights in float32, and is merged into the",
        ),
        (
            (None, "bfloat16"),
            ["--no-quantize"],
            None,
            "was trained on weights in bfloat16, and is merged into the weights as",
        ),
        ((None, "float32"), ["--base", "original"], None, ""),
        ((None, "bfloat16"), ["--base", "dequantized"], (None, "bfloat16"), "trained on a base that was not quantized"),
        ((None, "bfloat16"), [], (None, "bfloat16"), ""),
        (("nf4", "float32"), ["--base", "dequantized"], ("nf4", "float32"), ""),
        (
            ("nf4", "float32"),
            ["--bnb-4bit-quant-type", "fp4"],
            ("fp4", "float32"),
            "quant_type=nf4, and is merged with",
        ),
        (
            ("nf4", "float32"),
            ["--bnb-4bit-compute-dtype", "bfloat16"],
            ("nf4", "bfloat16"),
            "compute_dtype=float32, and",
        ),
        (("nf4", "float32"), ["--bnb-4bit-quant-type", "nf4"], ("nf4", "float32"), ""),
        (
            (None, "bfloat16"),
            ["--bnb-4bit-quant-type", "nf4"],
            ("nf4", "bfloat16"),
            "quant_type=None, and is merged with",
        ),
    ],
)
def test_flags_that_contradict_the_training_are_taken_and_said(
    asked, tmp_path, capsys, known, flags, quantization, said
):
    """The base of these is stored in fp32."""
    Provenance("m", known[0], known[0] is not None, known[1]).write(tmp_path)
    found = asked(tmp_path, *flags)
    assert (found and (found.quant_type, found.name)) == quantization
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == bool(said)


def test_a_16_bit_base_that_was_trained_in_its_own_dtype_is_original_without_a_word(asked, folder, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    Provenance("m", None, False, "bfloat16").write(tmp_path)
    capsys.readouterr()
    assert asked(tmp_path, "--base", "original", model=tmp_path / "m") is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bnb-4bit-quant-type", "nf4"], "--bnb-4bit-quant-type nf4: --model .* is stored in 4 bits already, fp4"),
        (["--no-double-quant"], "--no-double-quant: --model .* is stored in 4 bits already, with double quantization"),
        (["--bnb-4bit-quant-type", "fp4"], None),
    ],
)
def test_flags_that_contradict_a_base_in_4_bits_are_errors(asked, folder, adapter, tmp_path, flags, message):
    fields = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    fields["quantization_config"] = stored | {"bnb_4bit_use_double_quant": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    if message is None:
        assert asked(adapter, *flags, model=tmp_path).quant_type == "fp4"
        return
    with pytest.raises(InputError, match=str(InputError(message))):
        asked(adapter, *flags, model=tmp_path)

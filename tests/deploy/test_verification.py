"""The check of a merge finds each fault that a merge could have: they are planted, one at a time, by taking the mend
out.

Without the fault each of these merges passes, and is what vanilla transformers makes of the folders.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qalora.base import checkpoint, gguf_config
from qalora.base.checkpoint import Quantization
from qalora.base.gguf_reader import GGUFReader
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import resolve
from qalora.base.weight_files import WeightFiles
from qalora.deploy import gguf, merging, settings
from qalora.deploy.merging import merge
from qalora.deploy.verification import fault
from qalora.errors import AnswerNo, InputError

NF4_FP32, NF4_BF16 = (Quantization("nf4", True, dtype) for dtype in (torch.float32, torch.bfloat16))
BF16 = Quantization(None, False, torch.bfloat16)
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
TRAINED_PIECES, OPEN = merging.trained_pieces, merging.open_checkpoint


@pytest.fixture(scope="module")
def published(save_tiny_llama, tmp_path_factory):
    """An fp32 folder; norms and biases are random too, for a trained model's are no ones and zeros."""
    path = save_tiny_llama(tmp_path_factory.mktemp("base"), attention_bias=True, rope_theta=5000.0)
    tensors = load_file(path / "model.safetensors")
    torch.manual_seed(7)
    for tensor in tensors.values():
        if tensor.ndim == 1:
            tensor += 0.1 * torch.randn(tensor.shape)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def folder(published, tmp_path):
    shutil.copytree(published, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="module")
def adapter(published, tmp_path_factory):
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(published),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(path))
    return path


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


# ----------------------------------------------------------------------------------------------------------- the faults


def reads_the_stale_index(monkeypatch):
    def found(folder, gguf_file=None, *, name):
        return WeightFiles("safetensors", (folder / "old.safetensors",))

    monkeypatch.setattr(checkpoint, "weight_files", found)


def believes_the_config_on_tying(monkeypatch):
    monkeypatch.setattr(checkpoint, "_decide_tying", lambda *_: None)


def ties_what_is_not_tied(monkeypatch):
    def opened(source):
        found, config = OPEN(source)
        config.tie_word_embeddings = True
        del found.structure.shapes["lm_head.weight"]
        return found, config

    monkeypatch.setattr(merging, "open_checkpoint", opened)


def as_stored_but_for(changed):
    """Tensors that `changed` says are not rounded as the training rounded them."""

    def fault(monkeypatch):
        def pieces(found, name, quantization):
            yield from TRAINED_PIECES(found, name, None if changed(name) else quantization)

        monkeypatch.setattr(merging, "trained_pieces", pieces)

    return fault


def quantized_otherwise(other):
    def fault(monkeypatch):
        monkeypatch.setattr(merging, "trained_pieces", lambda found, name, _: TRAINED_PIECES(found, name, other))

    return fault


def loses(key, value):
    """A setting of the config is another in the folder that is written."""

    def fault(monkeypatch):
        write = merging.write_settings

        def written(folder, *rest):
            write(folder, *rest)
            fields = json.loads((folder / "config.json").read_text())
            if key == "rope_theta":
                fields["rope_parameters"]["rope_theta"] = value
                fields.pop("rope_theta", None)
            else:
                fields[key] = value
            (folder / "config.json").write_text(json.dumps(fields))

        monkeypatch.setattr(merging, "write_settings", written)

    return fault


def writes_no(method):
    def fault(monkeypatch):
        monkeypatch.setattr(gguf.GGUFWriter, method, lambda *_: None)

    return fault


def says_no(key):
    def fault(monkeypatch):
        own = gguf.metadata
        monkeypatch.setattr(gguf, "metadata", lambda config: {k: v for k, v in own(config).items() if k != key})

    return fault


def swaps_no_rows(monkeypatch):
    monkeypatch.setattr(gguf, "to_gguf", lambda name, tensor, config: tensor)


# ------------------------------------------------------------------------------------------------------------ the cases


def stale(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: 1.1 * tensor for name, tensor in tensors.items()}, folder / "old.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "old.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tied_by_config_only(folder):
    change_config(folder, tie_word_embeddings=True)


def nothing(folder):
    pass


def is_matrix_of_the_ends(name):
    return name in ("model.embed_tokens.weight", "lm_head.weight")


HF32, HF16, HFB16 = (dict(dtype=dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16))
FP4 = Quantization("fp4", True, torch.float32)
SINGLE = Quantization("nf4", False, torch.float32)
FAULTS = {
    "stale index": (stale, reads_the_stale_index, NF4_FP32, HFB16),
    "stale index, as stored": (stale, reads_the_stale_index, None, HF32),
    "config on tying": (tied_by_config_only, believes_the_config_on_tying, NF4_FP32, HFB16),
    "tied in the result": (nothing, ties_what_is_not_tied, NF4_FP32, HFB16),
    "embeddings as stored": (nothing, as_stored_but_for(is_matrix_of_the_ends), NF4_BF16, HF32),
    "embeddings as stored, fp16": (nothing, as_stored_but_for(is_matrix_of_the_ends), NF4_BF16, HF16),
    "norms as stored": (nothing, as_stored_but_for(lambda name: "norm" in name), NF4_BF16, HF32),
    "biases as stored": (nothing, as_stored_but_for(lambda name: "bias" in name), NF4_BF16, HF32),
    "linear layers as stored": (nothing, as_stored_but_for(lambda name: "_proj.weight" in name), BF16, HF32),
    "unquantized": (nothing, as_stored_but_for(lambda name: "_proj.weight" in name), NF4_FP32, HFB16),
    "fp4": (nothing, quantized_otherwise(FP4), NF4_FP32, HFB16),
    "single quantization": (nothing, quantized_otherwise(SINGLE), NF4_FP32, HF32),
    "another compute dtype": (nothing, quantized_otherwise(NF4_FP32), NF4_BF16, HF32),
    "rope_theta": (nothing, loses("rope_theta", 10_000.0), NF4_FP32, HFB16),
    "eps": (nothing, loses("rms_norm_eps", 1e-2), NF4_FP32, HFB16),
    "activation": (nothing, loses("hidden_act", "gelu"), NF4_FP32, HFB16),
}  # fmt: skip


@pytest.mark.parametrize("planted", [True, False], ids=["planted", "sound"])
@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_a_fault_of_a_folder_is_found(folder, adapter, tmp_path, monkeypatch, case, planted):
    prepare, fault, quantization, options = case
    prepare(folder)
    if planted:
        fault(monkeypatch)
        with pytest.raises(AnswerNo, match="the merged model differs from base \\+ adapter by"):
            merge(resolve(str(folder)), adapter, tmp_path / "merged", quantization=quantization, **options)
        assert not (tmp_path / "merged").exists()
    else:
        report = merge(resolve(str(folder)), adapter, tmp_path / "merged", quantization=quantization, **options)
        assert report["unexplained_difference"] < 1e-4
        assert report["position_difference"] == 0.0


GGUF_FAULTS = {
    "attention_factor": (dict(YARN, attention_factor=0.6), writes_no("add_rope_scaling_attn_factors")),
    "mscale": (dict(YARN, mscale=0.5, mscale_all_dim=2.0), writes_no("add_rope_scaling_attn_factors")),
    "original context": (YARN, writes_no("add_rope_scaling_orig_ctx_len")),
    "the whole scaling": (dict(YARN, rope_type="linear"), writes_no("add_rope_scaling_factor")),
    "rope_theta": (None, writes_no("add_rope_freq_base")),
    "eps": (None, says_no("attention.layer_norm_rms_epsilon")),
    "rows of q and k": (None, swaps_no_rows),
}  # fmt: skip


@pytest.mark.parametrize("planted", [True, False], ids=["planted", "sound"])
@pytest.mark.parametrize("case", GGUF_FAULTS.values(), ids=GGUF_FAULTS)
def test_a_fault_of_a_gguf_file_is_found(folder, adapter, tmp_path, monkeypatch, case, planted):
    rope, fault = case
    change_config(folder, max_position_embeddings=256, rms_norm_eps=1e-2, **({"rope_parameters": rope} if rope else {}))
    options = dict(quantization=NF4_FP32, format="gguf", gguf_type="q8_0")
    if planted:
        fault(monkeypatch)
        with pytest.raises((AnswerNo, InputError)):
            merge(resolve(str(folder)), adapter, tmp_path / "merged", **options)
        assert not (tmp_path / "merged").exists()
    else:
        report = merge(resolve(str(folder)), adapter, tmp_path / "merged", **options)
        assert report["unexplained_difference"] < 1e-3
        assert report["position_difference"] < 1e-5


def test_a_model_that_rounding_alone_changes_is_told_from_a_wrong_merge():
    report = {"relative_difference": 0.062, "unexplained_difference": 1e-6, "position_difference": 0.0}
    assert re.match(
        "rounding to bfloat16 alone changes the logits by 0.062 .*--dtype float32", fault(report, "bfloat16")
    )
    assert fault(report | {"relative_difference": 0.03}, "bfloat16") is None
    wrong = fault(report | {"unexplained_difference": 0.05}, "bfloat16")
    assert "by 0.062 of its logits, more than rounding to bfloat16 explains (0.04)" in wrong


# -------------------------------------------------------------------------------------------------- against the vanilla


@pytest.mark.parametrize("quantization", [NF4_BF16, BF16], ids=["4 bits", "unquantized"])
def test_an_fp32_folder_trained_in_bf16_is_merged_as_it_was_trained(folder, adapter, tmp_path, quantization):
    """Every tensor that training cast: in fp32 the result is the trained model to its last digits but the order of
    sums."""
    merge(resolve(str(folder)), adapter, tmp_path / "merged", quantization=quantization, dtype=torch.float32)
    base = load_base(
        resolve(str(folder)), load_in_4bit=quantization.quant_type is not None, dtype="bfloat16", device="cpu"
    )
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, parameter in base.model.named_parameters():
        if "_proj.weight" not in name:
            assert torch.equal(merged[name], parameter.float()), name
    if quantization is BF16:
        peft = PeftModel.from_pretrained(base.model.float(), str(adapter)).merge_and_unload()
        for name, parameter in peft.named_parameters():
            torch.testing.assert_close(merged[name], parameter, rtol=0, atol=1e-6, msg=name)
    report = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report["quantization"]["compute_dtype"] == "bfloat16"
    assert report["base_files"] == ["model.safetensors"]


@pytest.mark.parametrize("scaling", [dict(YARN, attention_factor=0.6, beta_fast=1.5), None], ids=["yarn", "plain"])
def test_the_reported_difference_is_that_of_whole_models(folder, adapter, tmp_path, monkeypatch, scaling):
    """Each side loaded at once, by load_base and by from_pretrained, gives the logits that were compared block by
    block."""
    from qalora.adapter.model import load_adapter
    from qalora.deploy import verification

    if scaling:
        change_config(folder, rope_parameters=scaling, max_position_embeddings=256)
    text = "Question: What is 17 + 25?\nAnswer:"
    monkeypatch.setattr(verification.compare, "__defaults__", ((text,),))
    report = merge(resolve(str(folder)), adapter, tmp_path / "merged", quantization=NF4_FP32)
    base = load_base(resolve(str(folder)), dtype="float32", device="cpu")
    ids = base.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = load_adapter(base.model, adapter)(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(ids).logits
    assert report["max_logit_difference"] == pytest.approx((found - expected).abs().max().item(), rel=1e-3)


def test_a_merge_of_a_gguf_base_is_compared_with_what_was_trained_on_it(folder, adapter, tmp_path, monkeypatch):
    change_config(folder, rope_parameters=dict(YARN, attention_factor=0.6), max_position_embeddings=256)
    tokenizer = load_tokenizer(resolve(str(folder)))
    # That of bytes has no merges, as GGUF wants.
    monkeypatch.setattr(settings, "read_tokenizer", lambda *_: tokenizer)
    merge(resolve(str(folder)), adapter, tmp_path / "file", quantization=NF4_FP32, format="gguf")
    source = resolve(str(tmp_path / "file" / "model.gguf"))
    report = merge(source, adapter, tmp_path / "merged", quantization=NF4_FP32)
    assert report["unexplained_difference"] < 1e-4
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["rope_parameters"]["attention_factor"] == pytest.approx(0.6)
    as_stored_but_for(lambda name: name == "lm_head.weight")(monkeypatch)
    with pytest.raises(AnswerNo):
        merge(source, adapter, tmp_path / "again", quantization=NF4_FP32, dtype=torch.float32)


def test_a_tokenizer_with_several_chat_templates_writes_the_default_and_the_others_by_name(folder, adapter, tmp_path):
    tokenizer = load_tokenizer(resolve(str(folder)))
    tokenizer.chat_template = {"tool_use": "tools", "default": "plain", "rag": "sources"}
    tokenizer.save_pretrained(folder)
    merge(resolve(str(folder)), adapter, tmp_path / "merged", quantization=None, format="gguf", verify=False)
    fields = GGUFReader(str(tmp_path / "merged" / "model.gguf")).fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.chat")}
    assert sorted(found.pop("tokenizer.chat_templates")) == ["rag", "tool_use"]  # the library's order is that of a set
    assert found == {
        "tokenizer.chat_template": "plain",
        "tokenizer.chat_template.rag": "sources",
        "tokenizer.chat_template.tool_use": "tools",
    }


def test_frequencies_of_llama3_survive_the_file(folder, adapter, tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    change_config(folder, rope_parameters=rope, max_position_embeddings=16384)
    report = merge(resolve(str(folder)), adapter, tmp_path / "merged", quantization=NF4_FP32, format="gguf")
    assert report["position_difference"] < 1e-5
    assert gguf_config.gguf_config(tmp_path / "merged", "model.gguf").rope_parameters["rope_type"] == "llama3"

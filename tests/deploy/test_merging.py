from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qalora.base.loading import load_base
from qalora.base.registry import resolve
from qalora.deploy import merging
from qalora.deploy.merging import check_output, merge_into
from qalora.errors import InputError

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(request, tmp_path_factory):
    """A tiny LLaMA on disk in fp32, with a byte-level tokenizer and LLaMA-2's kind of generation config."""
    torch.manual_seed(0)
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=request.param,
        eos_token_id=1,
        initializer_range=0.1,
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}')
    tokenizer.save_pretrained(path)
    return path


def save_lora(folder, path, **options):
    """A plain PEFT LoRA of random weights, ranks and scalings that differ between modules."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = dict(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={Q0: 2, DOWN1: 6},
        alpha_pattern={Q0: 4, DOWN1: 3},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, LoraConfig(**(config | options)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    return save_lora(folder, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def in_4bit(folder):
    return load_base(resolve(str(folder)), dtype="float32")


@pytest.fixture(scope="module")
def unquantized(folder):
    return load_base(resolve(str(folder)), load_in_4bit=False, dtype="float32")


@pytest.fixture(scope="module")
def merged(in_4bit, adapter, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "merged"
    return path, merge_into(in_4bit, adapter, path)


def test_weights_are_nf4_values_plus_sBA_rounded_once(in_4bit, adapter, merged):
    path, report = merged
    saved, lora = load_file(path / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    maps = {n: m for n, m in in_4bit.model.named_modules() if isinstance(m, Linear4bit)}
    assert report["modules"] == len(maps) == 14
    for name, module in maps.items():
        A, B = (lora[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        s = {Q0: 4 / 2, DOWN1: 3 / 6}.get(name, 8 / 4)
        nf4 = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        assert torch.equal(saved[f"{name}.weight"], (nf4 + s * (B @ A)).bfloat16()), name
        assert module.weight.quant_state.dtype == torch.float32  # or these would not be the exact values


def test_everything_else_is_the_base(in_4bit, merged):
    path, report = merged
    saved, base = load_file(path / "model.safetensors"), dict(in_4bit.model.named_parameters())
    assert report["bytes"] == sum(tensor.nbytes for tensor in saved.values())
    assert saved.keys() == base.keys()
    others = [name for name in base if "_proj.weight" not in name]  # 8 biases, 5 norms, embeddings, head
    assert len(others) == 8 + 5 + 1 + (not in_4bit.model.config.tie_word_embeddings)
    for name in others:
        assert torch.equal(saved[name], base[name].bfloat16()), name


@pytest.mark.parametrize("rslora", [False, True], ids=["LoRA", "rsLoRA"])
def test_on_an_unquantized_base_it_is_what_peft_merges(unquantized, folder, tmp_path, rslora):
    lora = save_lora(folder, tmp_path / "adapter", use_rslora=rslora)
    merge_into(unquantized, lora, tmp_path / "merged", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(lora)).merge_and_unload()
    for (name, a), (_, b) in zip(ours.state_dict().items(), peft.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(ours(ids).logits, peft(ids).logits, rtol=0, atol=1e-5)


def test_plain_transformers_loads_it_without_qalora(in_4bit, adapter, tmp_path):
    path = tmp_path / "merged"
    merge_into(in_4bit, adapter, path, dtype=torch.float32)
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(path)!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({str(path)!r})
assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
assert model.generation_config.temperature == 0.9 and model.config.use_cache
assert tokenizer.apply_chat_template([dict(role="user", content="hi")], tokenize=False) == "hi"
ids = tokenizer("Plain.", return_tensors="pt").input_ids
torch.save(model(ids).logits.detach(), {str(tmp_path / "logits.pt")!r})
assert not any(name.partition(".")[0] in ("qalora", "peft") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    from qalora.adapter.model import load_adapter

    peft_model = load_adapter(in_4bit.model, adapter)
    with torch.no_grad():
        expected = peft_model(in_4bit.tokenizer("Plain.", return_tensors="pt").input_ids).logits
    peft_model.unload()
    torch.testing.assert_close(logits, expected.float(), rtol=0, atol=1e-4)


def test_report_measures_the_rounding(in_4bit, adapter, merged, tmp_path):
    path, report = merged
    assert report == json.loads((path / "merge.json").read_text())
    exact = merge_into(in_4bit, adapter, tmp_path / "fp32", dtype=torch.float32)
    assert exact["max_logit_difference"] < 1e-4 < report["mean_logit_difference"] < report["max_logit_difference"]
    assert report["mean_logit_difference"] < 0.1 * report["mean_adapter_effect"]


def test_the_base_is_left_as_it_was(in_4bit, merged):
    names = [name for name, _ in in_4bit.model.named_parameters()]
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert in_4bit.model.config.quantization_config is not None


def test_merging_again_gives_the_same_bytes(in_4bit, adapter, tmp_path):
    path = tmp_path / "merged"
    reports, contents = [], []
    for _ in range(2):
        reports.append(merge_into(in_4bit, adapter, path))
        contents.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert reports[0] == reports[1]
    assert contents[0] == contents[1]
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_shards_are_read_back_as_one_model(in_4bit, adapter, merged, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SHARD_SIZE", "60KB")
    report = merge_into(in_4bit, adapter, tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 2
    assert report["max_logit_difference"] == merged[1]["max_logit_difference"]


def test_another_content_is_refused_and_kept(in_4bit, adapter, tmp_path):
    path = tmp_path / "merged"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="--overwrite"):
        merge_into(in_4bit, adapter, path)
    assert [file.name for file in path.iterdir()] == ["thesis.tex"]
    merge_into(in_4bit, adapter, path, overwrite=True)
    assert (path / "model.safetensors").is_file()
    assert not (path / "thesis.tex").exists()


def test_a_merge_of_something_else_is_refused(merged, adapter, tmp_path):
    path, report = merged
    check_output(path, model=report["model"], adapter=adapter, overwrite=False)
    with pytest.raises(InputError, match="not a merge of other"):
        check_output(path, model="other", adapter=adapter, overwrite=False)
    with pytest.raises(InputError, match="not a merge"):
        check_output(path, model=report["model"], adapter=tmp_path, overwrite=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_inputs_are_never_overwritten(folder, adapter, overwrite):
    for output in (folder, adapter, adapter.parent):
        with pytest.raises(InputError, match="which the merge reads"):
            check_output(output, model=str(folder), adapter=adapter, overwrite=overwrite)


def test_dora_is_refused_by_name(in_4bit, folder, tmp_path):
    lora = save_lora(folder, tmp_path / "adapter", use_dora=True)
    with pytest.raises(InputError, match="use_dora"):
        merge_into(in_4bit, lora, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_sum_beyond_fp16_is_an_error_and_leaves_nothing(in_4bit, adapter, tmp_path):
    lora = tmp_path / "adapter"
    lora.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: 1e4 * tensor for key, tensor in tensors.items()}, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    with pytest.raises(InputError, match="beyond the range"):
        merge_into(in_4bit, lora, tmp_path / "merged", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_is_noticed_before_the_first_byte(in_4bit, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(InputError, match="the disk has 0.0 GB free"):
        merge_into(in_4bit, adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from gguf import GGUFReader
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora.adapter.model import load_adapter
from qalora.adapter.saved import read_adapter
from qalora.base.checkpoint import Quantization
from qalora.base.loading import load_base
from qalora.base.registry import resolve
from qalora.deploy import merging
from qalora.deploy.merging import merge
from qalora.deploy.output import check_output
from qalora.errors import AnswerNo, InputError

NF4 = Quantization("nf4", True, torch.float32)
Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(request, save_tiny_llama, tmp_path_factory):
    """With biases, and LLaMA-2's kind of generation config."""
    path = save_tiny_llama(
        tmp_path_factory.mktemp("base"), attention_bias=True, tie_word_embeddings=request.param, eos_token_id=1
    )
    (path / "generation_config.json").write_text('{"eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}')
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
def merge_to(folder):
    """merge_to(adapter, path, **options of merge) → report; by default of an NF4 base trained in fp32."""

    def run(lora, path, quantization=NF4, **options):
        return merge(resolve(str(folder)), lora, path, quantization=quantization, **options)

    return run


@pytest.fixture(scope="module")
def merged(merge_to, adapter, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "merged"
    return path, merge_to(adapter, path)


@torch.no_grad()
def adapter_logits(loaded, lora, text):
    model = load_adapter(loaded.model, lora)
    logits = model(loaded.tokenizer(text, return_tensors="pt").input_ids).logits
    model.unload()
    return logits


def test_weights_are_nf4_values_plus_sBA_rounded_once(in_4bit, adapter, merged):
    path, report = merged
    saved, lora = load_file(path / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    maps = {n: m for n, m in in_4bit.model.named_modules() if isinstance(m, Linear4bit)}
    assert report["modules"] == len(maps) == 14
    for name, module in maps.items():
        A, B = (lora[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        s = {Q0: 4 / 2, DOWN1: 3 / 6}.get(name, 8 / 4)
        nf4 = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        # Half a unit in the last place of bf16, and of fp32 for the order of the sum.
        torch.testing.assert_close(
            saved[f"{name}.weight"].float(), nf4 + s * (B @ A), rtol=2**-8 + 1e-6, atol=1e-7, msg=name
        )


def test_everything_else_is_the_base(in_4bit, merged):
    path, report = merged
    saved, base = load_file(path / "model.safetensors"), dict(in_4bit.model.named_parameters())
    header = int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
    assert report["bytes"] == 8 + header + sum(tensor.nbytes for tensor in saved.values())
    assert saved.keys() == base.keys()
    others = [name for name in base if "_proj.weight" not in name]  # 8 biases, 5 norms, embeddings, head
    assert len(others) == 8 + 5 + 1 + (not in_4bit.model.config.tie_word_embeddings)
    for name in others:
        assert torch.equal(saved[name], base[name].bfloat16()), name


@pytest.mark.parametrize("rslora", [False, True], ids=["LoRA", "rsLoRA"])
def test_on_an_unquantized_base_it_is_what_peft_merges(merge_to, folder, tmp_path, rslora):
    lora = save_lora(folder, tmp_path / "adapter", use_rslora=rslora)
    merge_to(lora, tmp_path / "merged", quantization=None, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, str(lora)).merge_and_unload()
    for (name, a), (_, b) in zip(ours.state_dict().items(), peft.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    ids = torch.arange(2, 40)[None]
    torch.testing.assert_close(ours(ids).logits, peft(ids).logits, rtol=0, atol=1e-5)


def test_plain_transformers_loads_it_without_qalora(in_4bit, merge_to, adapter, tmp_path, vanilla):
    path = tmp_path / "merged"
    merge_to(adapter, path, dtype=torch.float32)
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
assert "peft" not in sys.modules
"""
    vanilla(code)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, adapter_logits(in_4bit, adapter, "Plain."), rtol=0, atol=1e-4)


def test_the_merged_folder_is_a_base_in_4_bits_again(merged):
    loaded = load_base(resolve(str(merged[0])), dtype="float32")
    assert loaded.quantized
    assert sum(isinstance(module, Linear4bit) for module in loaded.model.modules()) == 14


def test_report_measures_the_rounding(in_4bit, merge_to, adapter, merged, tmp_path):
    """Against the logits of the loaded models, on one of the texts."""
    path, report = merged
    assert report == json.loads((path / "merge.json").read_text())
    exact = merge_to(adapter, tmp_path / "fp32", dtype=torch.float32)
    assert exact["max_logit_difference"] < 1e-4 < report["mean_logit_difference"] < report["max_logit_difference"]
    assert exact["relative_difference"] < 1e-5 < report["relative_difference"] < report["tolerance"]
    assert exact["greedy_agreement"] == 1.0
    assert exact["kl"] == pytest.approx(0, abs=1e-6)
    assert report["mean_logit_difference"] < 0.1 * report["mean_adapter_effect"]


def test_report_equals_a_comparison_of_whole_models(in_4bit, merge_to, adapter, tmp_path, monkeypatch):
    from qalora.deploy import verification

    text = "Question: What is 17 + 25?\nAnswer:"
    monkeypatch.setattr(verification.compare, "__defaults__", ((text,),))
    report = merge_to(adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    ids = in_4bit.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        found, bare = merged(ids).logits, in_4bit.model(ids).logits
    expected = adapter_logits(in_4bit, adapter, text)
    difference = found - expected
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean().sqrt()
    kl = (expected.softmax(-1) * (expected.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    assert report["max_logit_difference"] == pytest.approx(difference.abs().max().item(), rel=1e-3)
    assert report["mean_logit_difference"] == pytest.approx(difference.abs().mean().item(), rel=1e-3)
    assert report["relative_difference"] == pytest.approx((difference.square().mean().sqrt() / spread).item(), rel=1e-3)
    assert report["kl"] == pytest.approx(kl.item(), rel=2e-2)
    assert report["mean_adapter_effect"] == pytest.approx((expected - bare).abs().mean().item(), rel=1e-3)


def test_a_result_beyond_its_tolerance_is_refused_and_gone(merge_to, adapter, tmp_path, monkeypatch):
    update = merging.low_rank_updates(read_adapter(adapter))[Q0]

    def wrong(lora):  # another adapter's update reaches the file
        A, B, s = update
        return {Q0: (A, B, 3 * s)}

    pieces = merging.merged_pieces
    monkeypatch.setattr(merging, "merged_pieces", lambda c, updates, q: pieces(c, wrong(updates), q))
    with pytest.raises(AnswerNo, match="more than rounding to bfloat16 explains"):
        merge_to(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []
    report = merge_to(adapter, tmp_path / "merged", verify=False)
    assert "relative_difference" not in report


def test_merging_again_gives_the_same_bytes(merge_to, adapter, tmp_path):
    path = tmp_path / "merged"
    reports, contents = [], []
    for _ in range(2):
        reports.append(merge_to(adapter, path))
        contents.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert reports[0] == reports[1]
    assert contents[0] == contents[1]
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_shards_are_read_back_as_one_model(merge_to, adapter, merged, tmp_path):
    report = merge_to(adapter, tmp_path / "merged", max_shard_size=60_000)
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 2
    assert report["max_logit_difference"] == merged[1]["max_logit_difference"]
    whole = AutoModelForCausalLM.from_pretrained(merged[0], dtype="auto").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict().items():
        assert torch.equal(tensor, whole[name]), name


KILL = """
import os, signal
from pathlib import Path
import torch
from qalora.base.checkpoint import Quantization
from qalora.base.registry import resolve
from qalora import files
from qalora.deploy import merging
torch.set_num_threads(1)  # threads do not survive a fork
calls = moment = 0
def killer(function):
    def run(*args, **kwargs):
        global calls
        calls += 1
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return run
merging.rounded = killer(merging.rounded)
merging.compare = killer(merging.compare)
Path.rename = killer(Path.rename)
files._exchange = lambda *_: False  # as on systems that cannot exchange two folders
nf4 = Quantization("nf4", True, torch.float32)
for job in jobs:
    output, _, moment = job.rpartition("@")
    moment = int(moment)
    child = os.fork()
    if not child:
        merging.merge(resolve(folder), adapter, output, quantization=nf4, overwrite=True)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, job
"""


@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
def test_killed_at_any_moment_it_leaves_the_whole_or_nothing(
    folder, adapter, merged, merge_to, forkserver, tmp_path, old
):
    tensors = len(load_file(folder / "model.safetensors"))
    # In the first and the last tensor, before the comparison, and at each renaming.
    moments = [1, tensors, tensors + 1, tensors + 2, *([tensors + 3] if old else [])]
    outputs = {tmp_path / f"merged-{moment}": moment for moment in moments}
    if old:
        for output in outputs:
            shutil.copytree(merged[0], output)
            (output / "of the old one").touch()
    jobs = [f"{output}@{moment}" for output, moment in outputs.items()]
    names = {"__name__": "killed", "folder": str(folder), "adapter": str(adapter), "jobs": jobs}
    killed = forkserver.Process(target=exec, args=(KILL, names))
    killed.start()
    killed.join()
    assert killed.exitcode == 0
    for output in outputs:
        if output.exists():
            assert old
            assert (output / "of the old one").exists()
            assert (output / "model.safetensors").read_bytes() == (merged[0] / "model.safetensors").read_bytes()
        merge_to(adapter, output, overwrite=True, verify=False)
        assert not (output / "of the old one").exists()
        assert (output / "model.safetensors").read_bytes() == (merged[0] / "model.safetensors").read_bytes()
    assert sorted(tmp_path.iterdir()) == sorted(outputs)


def test_another_content_is_refused_and_kept(merge_to, adapter, tmp_path):
    path = tmp_path / "merged"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="overwrite"):
        merge_to(adapter, path)
    assert [file.name for file in path.iterdir()] == ["thesis.tex"]
    merge_to(adapter, path, overwrite=True)
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


def test_dora_is_refused_by_name(merge_to, folder, tmp_path):
    lora = save_lora(folder, tmp_path / "adapter", use_dora=True)
    with pytest.raises(InputError, match="use_dora"):
        merge_to(lora, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", ["module", "shape"])
def test_an_adapter_of_another_model_is_refused(merge_to, adapter, tmp_path, change):
    lora = tmp_path / "adapter"
    shutil.copytree(adapter, lora)
    tensors = load_file(lora / "adapter_model.safetensors")
    if change == "module":
        tensors = {key.replace("layers.1", "layers.7"): tensor for key, tensor in tensors.items()}
    else:
        tensors = {key: tensor[:, :5] if "lora_A" in key else tensor for key, tensor in tensors.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, lora / "adapter_model.safetensors")
    with pytest.raises(InputError, match="made for another model"):
        merge_to(lora, tmp_path / "merged")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_sum_beyond_fp16_is_an_error_and_leaves_nothing(merge_to, adapter, tmp_path):
    lora = tmp_path / "adapter"
    lora.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: 1e4 * tensor for key, tensor in tensors.items()}, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    with pytest.raises(InputError, match="beyond the range"):
        merge_to(lora, tmp_path / "merged", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_is_noticed_before_the_first_byte(merge_to, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "free_disk", lambda path: 10)
    with pytest.raises(InputError, match="the disk has 0.0 GB free"):
        merge_to(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_noticed_before_the_first_byte(merge_to, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merging.psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    with pytest.raises(InputError, match="0.0 GB are available"):
        merge_to(adapter, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_merges_is_read_from_gguf_as_it_was(folder, adapter, merge_to, tmp_path):
    """The tiny one is of bytes alone."""
    merge_to(adapter, tmp_path / "gguf", format="gguf", verify=False)
    found = AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
    for text in ("Zürich 2024,  naïve", "日本語 🙂\n\n"):
        assert found(text)["input_ids"] == AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    base = resolve(str(tmp_path / "gguf" / "model.gguf"))  # which hands its tokenizer on
    merge(base, adapter, tmp_path / "twice", quantization=None, format="gguf", verify=False)
    assert GGUFReader(tmp_path / "twice" / "model.gguf").fields["tokenizer.ggml.merges"].contents() == []

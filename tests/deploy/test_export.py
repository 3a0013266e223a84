"""What the exported files compute, as PEFT, vLLM's formula and llama.cpp's formula read them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from qalora.adapter.model import load_adapter
from qalora.base.checkpoint import Quantization
from qalora.base.loading import load_base
from qalora.base.registry import resolve
from qalora.deploy import gguf
from qalora.deploy.export import export_adapter
from qalora.deploy.merging import merge
from qalora.errors import InputError

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(save_tiny_llama, tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("base"), rope_theta=5000.0)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    """Ranks 2, 4 and 6 with scalings 2, 2 and 1/2, and one module without an adapter, as an allocation leaves it."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern={Q0: 2, DOWN1: 6},
        alpha_pattern={Q0: 4, DOWN1: 3},
        exclude_modules=["model.layers.1.self_attn.k_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def expected(folder, adapter):
    """fp32 logits of base + adapter."""
    base = load_base(resolve(str(folder)), load_in_4bit=False, dtype="float32")
    with torch.no_grad():
        return load_adapter(base.model, adapter)(torch.arange(2, 40)[None]).logits


PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
torch.save(model(torch.arange(2, 40)[None]).logits.detach(), out)
"""


@pytest.mark.parametrize("format", ["peft", "peft-uniform"])
def test_vanilla_peft_computes_the_same_logits(folder, adapter, expected, tmp_path, vanilla, format):
    report = export_adapter(adapter, tmp_path / "out", format, source=resolve(str(folder)))
    vanilla(PEFT, folder, tmp_path / "out", tmp_path / "logits.pt")
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert report["rank"] == 6
    assert report["modules"] == 13
    assert report["relative_difference"] < 1e-6


def test_uniform_is_one_rank_whose_alpha_is_the_rank(folder, adapter, tmp_path):
    report = export_adapter(adapter, tmp_path / "out", "peft-uniform", source=resolve(str(folder)))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (6, 6, {}, {})
    assert report["max_lora_rank"] == 8
    saved, before = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "out", adapter))
    assert saved.keys() == before.keys()
    for name, s in {Q0: 2.0, DOWN1: 0.5, "model.layers.0.mlp.up_proj": 2.0}.items():
        A, B = (saved[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        A0, B0 = (before[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        assert (len(A), B.shape[1]) == (6, 6)
        assert torch.equal(A[: len(A0)], A0)
        assert torch.equal(B[:, : len(A0)], s * B0)  # these scalings are powers of two
        assert not A[len(A0) :].any()
        assert not B[:, len(A0) :].any()


def test_gguf_adapter_is_what_llama_cpp_multiplies(folder, adapter, tmp_path):
    """alpha over the tensor's own rank times B A, with the rows of q and k in llama.cpp's order of pairs."""
    export_adapter(adapter, tmp_path / "out", "gguf-lora", source=resolve(str(folder)))
    reader = GGUFReader(tmp_path / "out" / "adapter.gguf")
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert reader.fields["general.type"].contents() == "adapter"
    assert len(tensors) == 26
    before = load_file(adapter / "adapter_model.safetensors")
    for name, s, stem in [(Q0, 2.0, "blk.0.attn_q"), (DOWN1, 0.5, "blk.1.ffn_down")]:
        A, B = tensors[f"{stem}.weight.lora_a"], tensors[f"{stem}.weight.lora_b"]
        A0, B0 = (before[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        update = s * B0 @ A0
        if "q_proj" in name:  # row 2i of a head is row i of its first half, row 2i + 1 that of its second
            heads = update.view(4, 2, 8, 64)
            update = torch.stack([heads[:, 0], heads[:, 1]], dim=2).reshape(64, 64)
        torch.testing.assert_close(alpha / len(A) * B @ A, update, rtol=1e-5, atol=1e-7)
    assert "ADAPTER ./adapter.gguf" in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.parametrize("format", ["peft-uniform", "gguf-lora"])
def test_an_adapter_of_another_model_is_refused(folder, adapter, tmp_path, format):
    other = tmp_path / "other"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(other)
    with pytest.raises(InputError, match="made for another model"):
        export_adapter(adapter, tmp_path / "out", format, source=resolve(str(other)))
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("gguf_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_transformers_reads_the_gguf_file_as_the_merged_model(folder, adapter, tmp_path, gguf_type):
    options = dict(quantization=Quantization("nf4", True, torch.float32))
    source = resolve(str(folder))
    report = merge(source, adapter, tmp_path / "gguf", format="gguf", gguf_type=gguf_type, **options)
    merge(source, adapter, tmp_path / "hf", dtype=torch.float32, **options)
    assert (
        relative_difference(tmp_path) <= {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 0.05, "q4_0": 0.6}[gguf_type]
    )
    assert report["relative_difference"] <= report["tolerance"]
    assert (tmp_path / "gguf" / "Modelfile").read_text().startswith("FROM ./model.gguf")


@pytest.mark.parametrize("family", ["Qwen2", "Mistral"])
def test_other_families_as_gguf_are_read_by_transformers(folder, adapter, tmp_path, family):
    """Qwen2's biases, and rows of q and k that stay where they are; Mistral's, which change places as LLaMA's."""
    llama = LlamaConfig.from_pretrained(folder)
    same = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(
        **{key: getattr(llama, key) for key in same}, vocab_size=320, initializer_range=0.1
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "base")
    source = resolve(str(tmp_path / "base"))
    merge(source, adapter, tmp_path / "gguf", format="gguf", gguf_type="f32", quantization=None)
    merge(source, adapter, tmp_path / "hf", dtype=torch.float32, quantization=None)
    assert relative_difference(tmp_path) <= 1e-6


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(folder, adapter, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one more>"]})
    tokenizer.save_pretrained(base)
    with pytest.raises(
        InputError, match=r"more tokens \(the last is '<one more>', 258\) than the model has embeddings \(258\)"
    ):
        merge(resolve(str(base)), adapter, tmp_path / "gguf", format="gguf", quantization=None)
    assert not (tmp_path / "gguf").exists()


def relative_difference(path) -> float:
    """Between the logits of path/gguf and path/hf, each as transformers reads it."""
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(path / "gguf", gguf_file="model.gguf", dtype=torch.float32)
        found, expected = found(ids).logits, AutoModelForCausalLM.from_pretrained(path / "hf")(ids).logits
    return ((found - expected).square().mean().sqrt() / expected.std()).item()


def test_gguf_metadata_is_the_models(folder, adapter, tmp_path):
    merge(resolve(str(folder)), adapter, tmp_path / "gguf", format="gguf", quantization=None)
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "gguf" / "model.gguf").fields.items()}
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 5000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    assert {key: fields.get(key) for key in expected} == expected
    assert fields["tokenizer.ggml.tokens"][:2] == ["<pad>", "</s>"]
    assert fields["tokenizer.ggml.token_type"][:3] == [3, 3, 1]


@pytest.mark.parametrize(("kind", "factor"), [("linear", 4.0), ("yarn", 8.0)])
def test_other_rope_scalings_are_named_in_the_metadata(folder, adapter, tmp_path, kind, factor):
    scaled = tmp_path / "scaled"
    config = LlamaConfig.from_pretrained(folder)
    config.rope_parameters = dict(rope_type=kind, rope_theta=5000.0, factor=factor, original_max_position_embeddings=32)
    LlamaForCausalLM.from_pretrained(folder, config=config).save_pretrained(scaled)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(scaled)
    merge(resolve(str(scaled)), adapter, tmp_path / "gguf", format="gguf", quantization=None, verify=False)
    fields = GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    assert fields["llama.rope.scaling.type"].contents() == kind
    assert fields["llama.rope.scaling.factor"].contents() == factor
    assert ("llama.rope.scaling.original_context_length" in fields) == (kind == "yarn")


# ----------------------------------------------------------------------------------------------------------- tokenizers


def splits(*first, **last):
    """Steps, and ByteLevel at their end."""
    return pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **last})])


def words(regex: str, behavior: str = "isolated"):
    return pre_tokenizers.Split(Regex(regex), behavior)


DIGITS = pre_tokenizers.Digits(individual_digits=True)
LLAMA3 = PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@pytest.mark.parametrize(
    ("how", "name"),
    [
        (splits(words(LLAMA3), use_regex=False), "dbrx"),
        (splits(words(PRETOKENIZE_REGEX), use_regex=False), "qwen2"),
        (splits(words(GGUF_PRE_TOKENIZER_SPLITS["qwen35"]), use_regex=False), "qwen35"),
        (splits(words(GGUF_PRE_TOKENIZER_SPLITS["tekken"]), use_regex=False), "tekken"),
        (splits(words(GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"]), use_regex=False), "gpt-4o"),
        (splits(DIGITS), "smollm"),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (splits(words(r"\p{N}{1,3}|\s+"), use_regex=False), None),
        (splits(words(LLAMA3), use_regex=True), None),
        (splits(words(LLAMA3, "removed"), use_regex=False), None),
        (splits(DIGITS, use_regex=False), None),
        (splits(pre_tokenizers.Digits(individual_digits=False)), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None),
        (pre_tokenizers.WhitespaceSplit(), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_how_text_is_split_has_llama_cpps_name_or_is_refused(how, name):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = how
    backend = json.loads(tokenizer.to_str())
    if name is None:
        with pytest.raises(InputError, match="no GGUF name here"):
            gguf._pre_tokenizer(backend)
    else:
        assert gguf._pre_tokenizer(backend) == name


def test_words_that_are_tokens_whatever_the_merges_have_a_name_of_their_own():
    """As in Llama 3, where llama.cpp does the same under one name, and under the other does not."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = splits(words(LLAMA3), use_regex=False)
    assert gguf._pre_tokenizer(json.loads(tokenizer.to_str())) == "llama-bpe"


def test_a_sentencepiece_tokenizer_in_gguf(folder, adapter, tmp_path):
    """LLaMA's kind: bytes for what the vocabulary lacks, and scores that fall in the order of the merges."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", *bytes_, "▁", "a", "b", "c", "ab", "▁ab", "abc"])}
    merges = [("a", "b"), ("▁", "ab"), ("ab", "c")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    base = tmp_path / "base"
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = len(vocab)
    LlamaForCausalLM(config).save_pretrained(base)
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>").save_pretrained(base)
    merge(resolve(str(base)), adapter, tmp_path / "gguf", format="gguf", quantization=None, verify=False)
    reader = GGUFReader(tmp_path / "gguf" / "model.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("llama", "default")
    assert fields["tokenizer.ggml.tokens"] == list(vocab)
    types = dict(zip(vocab, fields["tokenizer.ggml.token_type"], strict=True))
    assert types["<unk>"] == 2 and types["<s>"] == 3 and types["abc"] == 1
    assert {types[byte] for byte in bytes_} == {6}
    scores = dict(zip(vocab, fields["tokenizer.ggml.scores"], strict=True))
    assert scores["ab"] > scores["▁ab"] > scores["abc"] > scores["a"] == scores["c"]
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_space_prefix"] is True


def test_llama3_rope_scaling_becomes_frequency_factors(folder, adapter, tmp_path):
    """Divided by them, plain frequencies are those that transformers rotates with."""
    scaled = tmp_path / "scaled"
    config = LlamaConfig.from_pretrained(folder)
    config.rope_parameters = dict(
        rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(folder, config=config)
    model.save_pretrained(scaled)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(scaled)
    merge(resolve(str(scaled)), adapter, tmp_path / "gguf", format="gguf", quantization=None, verify=False)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    factors = torch.from_numpy(tensors["rope_freqs.weight"].copy())
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / factors, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    assert factors.max() == pytest.approx(8.0)

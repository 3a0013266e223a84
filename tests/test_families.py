"""Every family × every check, on tiny random models with the family's true quirks, against transformers' own forward
with PEFT's layers on the same 4-bit base. What a family cannot have is refused by name, and that is tested then."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from qalora.adapter.ablation import ablate
from qalora.adapter.allocation import AllocationPlan
from qalora.adapter.model import attach, gated_layers, save_adapter
from qalora.adapter.surgery import apply_plan, restore
from qalora.base.checkpoint import Quantization
from qalora.base.families import FAMILIES, family_of
from qalora.base.loading import load_base, load_tokenizer
from qalora.base.quantized import linear_maps, quantize_
from qalora.base.registry import ModelShape, check_packing, resolve, said_of_family, shape_of
from qalora.base.structure import check_plain
from qalora.data.batching import PackingCollator, pack
from qalora.deploy.export import export_adapter
from qalora.deploy.merging import merge
from qalora.errors import InputError
from qalora.kernels import prefixes
from qalora.kernels.activations import set_checkpointing, set_mlp_tile
from qalora.kernels.layout import prepared
from qalora.kernels.loss import summed_loss
from qalora.memory import KEPT, plan_memory

NF4 = Quantization("nf4", True, torch.float32)
COMMON = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip
MIXED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=6)
TIED = dict(tie_word_embeddings=True)
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.5, original_max_position_embeddings=16,
    short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0],
)  # fmt: skip
YARN_SCALED = dict(
    rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0,
    mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3,
)  # fmt: skip
QUIRKS: dict[str, dict] = {
    "llama": {},
    "mistral": dict(sliding_window=6),
    "ministral": MIXED,
    "ministral3": dict(rope_parameters=YARN_SCALED),
    "qwen2": TIED | dict(head_dim=16),
    "qwen3": TIED | dict(num_key_value_heads=1, head_dim=128),  # that of every GGUF file, to transformers
    "qwen3_5_text": dict(  # of weights so small that last bits stay last bits: a delta net norms states over and over
        initializer_range=0.1,
        num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
    ),
    "smollm3": TIED | dict(num_hidden_layers=4),
    "granite": dict(embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.7, logits_scaling=2.5),
    "granitemoehybrid": TIED
    | dict(
        embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.7, logits_scaling=2.5,
        num_local_experts=0, num_experts_per_tok=0, layer_types=["attention"] * 2, shared_intermediate_size=192,
        position_embedding_type="rope",
    ),
    "phi3": dict(rope_parameters=LONGROPE, head_dim=16, original_max_position_embeddings=16),
    "gemma": TIED | dict(num_key_value_heads=1),
    "gemma2": TIED | MIXED | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=20),
    "gemma3_text": TIED | MIXED | dict(num_key_value_heads=1, query_pre_attn_scalar=20, final_logit_softcapping=3.0),
    "gemma4_text": TIED
    | dict(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=6,
        num_kv_shared_layers=2, hidden_size_per_layer_input=64, vocab_size_per_layer_input=260, global_head_dim=64,
        final_logit_softcapping=3.0, use_double_wide_mlp=True,
    ),
    "olmo2": dict(head_dim=16),
    "olmo3": MIXED | dict(head_dim=16),
    "glm4": dict(attention_bias=True),
    "seed_oss": dict(residual_dropout=0.0, attention_dropout=0.0),
    "ernie4_5": TIED | dict(use_bias=True),
    "exaone4": MIXED | dict(head_dim=16),
    "hunyuan_v1_dense": TIED,
    "cohere": TIED | dict(logit_scale=0.25, use_qk_norm=True, head_dim=16),
    "cohere2": TIED | MIXED | dict(logit_scale=0.25, head_dim=16),
    "lfm2": TIED | dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, head_dim=16),
    "apertus": {},
    "arcee": dict(mlp_bias=True),
    "internlm3": dict(qkv_bias=True, bias=True),
    # Without a record:
    "helium": dict(head_dim=16),
    "starcoder2": TIED | dict(use_bias=True),
}  # fmt: skip

# Quirks that llama.cpp has no form of: what is refused, and what a file is made of in its place.
NOT_IN_GGUF: dict[str, tuple[str, dict]] = {
    "gemma2": ("query_pre_attn_scalar=20: llama.cpp divides by √32 there", dict(query_pre_attn_scalar=32)),
    "gemma3_text": ("query_pre_attn_scalar=20: llama.cpp divides by √32 there", dict(query_pre_attn_scalar=32)),
    "ernie4_5": ("a bias of down_proj: llama.cpp has none there", dict(use_bias=False)),
    "exaone4": (
        "windows in 2 blocks: llama.cpp has windows where there are 64",
        dict(sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 2),
    ),
    "arcee": ("a bias of down_proj: llama.cpp has none there", dict(mlp_bias=False)),
    "cohere": ("use_qk_norm=true and 2 blocks: llama.cpp has such norms from 64 blocks on", dict(use_qk_norm=False)),
}
# Of the others transformers reads no GGUF file, or leaves out what the quirks are.
READ_BY_TRANSFORMERS = ("llama", "mistral", "ministral", "qwen2", "qwen3", "qwen3_5_text", "lfm2")

# What the last bits of its weights make of its gradients, in transformers alone: a delta net amplifies them.
TOLERANCE = {"qwen3_5_text": 5e-5}


def test_every_record_is_tried():
    assert set(FAMILIES) <= set(QUIRKS)


class Case:
    """One family: its folder, and what vanilla transformers and PEFT make of it."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.record = name, folder, family_of(name)
        self.tolerance = TOLERANCE.get(name, 1e-5)
        self.bases: dict[str, PreTrainedModel] = {}
        self.reference = self.vanilla()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, 258, (3, 24), generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        mask = torch.ones_like(ids)
        mask[1, 15:], labels[1, 15:] = 0, -100
        self.batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}

    @cached_property
    def expected(self):
        return self.of_vanilla(self.reference, self.batch)

    def of_vanilla(self, model, batch):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
        return loss.item(), grads

    def base(self, dtype: str = "float32") -> PreTrainedModel:
        """The base in 4 bits, without a kernel of ours; read once."""
        if dtype not in self.bases:
            self.bases[dtype] = load_base(self.folder, dtype=dtype).model
        return copy.deepcopy(self.bases[dtype])

    def ours(self, dtype: str = "float32") -> PeftModel:
        return with_weights_of(self.reference, attach(self.base(dtype), r=4, alpha=8))

    def vanilla(self, dtype: str = "float32") -> PeftModel:
        torch.manual_seed(2)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        peft = get_peft_model(self.base(dtype), config)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name and ".layers." in name:  # PEFT adapts linear layers outside of the blocks too
                torch.nn.init.normal_(parameter, std=0.05)
        return peft.train()


def attention_of(case) -> str:
    return "eager" if case.record.eager else "sdpa"


def with_weights_of(reference, model):
    weights = {key: value for key, value in reference.state_dict().items() if "lora_" in key}
    own = dict(model.named_parameters())
    assert {key for key in own if "lora_" in key and ".layers." in key} == {key for key in weights if ".layers." in key}
    for key in weights.keys() & own.keys():
        own[key].data.copy_(weights[key])
    return model.train()


@pytest.fixture(scope="module", params=QUIRKS)
def case(request, save_tiny, tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp(request.param), request.param, **COMMON | QUIRKS[request.param])
    return Case(request.param, folder)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = summed_loss(model, batch) / (batch["labels"][:, 1:] != -100).sum()
    loss.backward()
    return loss.item(), {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}


def assert_same(found, expected, tolerance: float = 1e-5):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert set(found[1]) <= set(expected[1])
    largest = max(grad.norm() for grad in expected[1].values())
    for key, grad in found[1].items():
        difference = (grad - expected[1][key]).norm()
        assert difference <= tolerance * (expected[1][key].norm() + 0.1 * largest), key


def test_loss_and_gradients_at_every_level(case):
    model = case.ours()
    for kept in (False, "selective", True, "offload"):
        set_checkpointing(model, kept)
        assert_same(loss_and_gradients(model, case.batch), case.expected, case.tolerance)


def test_mlp_tiles_change_nothing(case):
    model = case.ours()
    set_mlp_tile(model, 5)
    for kept in ("selective", True):
        set_checkpointing(model, kept)
        assert_same(loss_and_gradients(model, case.batch), case.expected, case.tolerance)


def test_loss_and_gradients_in_bf16(case):
    """Of all gradients together, 2 % apart at most and 2 % in the loss: two ways to round 16-bit states."""
    expected = case.of_vanilla(with_weights_of(case.reference, case.vanilla("bfloat16")), case.batch)
    found = loss_and_gradients(case.ours("bfloat16"), case.batch)
    assert found[0] == pytest.approx(expected[0], rel=2e-2)
    both = [torch.cat([grads[key].flatten().float() for key in found[1]]) for grads in (found[1], expected[1])]
    assert (both[0] - both[1]).norm() <= 2e-2 * both[1].norm()


def test_packed_rows_are_those_rows(case):
    # LongRoPE takes other factors for a batch with a row beyond the original length, packed or not.
    lengths = (15 if case.name == "phi3" else 17, 9, 14)
    rows = [
        {"input_ids": case.batch["input_ids"][i : i + 1, :n], "labels": case.batch["labels"][i : i + 1, :n]}
        for i, n in enumerate(lengths)
    ]
    if case.record.across_rows is not None:
        with pytest.raises(InputError, match=f"data.packing=true: .*{case.record.across_rows[:20]}"):
            check_packing(case.name)
        return
    check_packing(case.name)
    items = [{key: value[0].tolist() for key, value in row.items()} | {"row": i} for i, row in enumerate(rows)]
    packed = {key: value for key, value in PackingCollator()(pack(items, 64)).items() if key != "rows"}
    tokens = sum((row["labels"][:, 1:] != -100).sum() for row in rows)
    losses, sums = 0.0, {}
    for row in rows:
        loss, grads = case.of_vanilla(case.reference, row)
        share = (row["labels"][:, 1:] != -100).sum() / tokens
        losses += share.item() * loss
        sums = {key: sums.get(key, 0) + share * grad for key, grad in grads.items()}
    assert_same(loss_and_gradients(case.ours(), packed), (losses, sums), case.tolerance)


def test_shared_prefixes_change_nothing(case, monkeypatch):
    ids = case.batch["input_ids"][:, :6].clone()
    ids[1, :5], ids[2, :3] = ids[0, :5], ids[0, :3]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found, own = [], prefixes.share
    monkeypatch.setattr(prefixes, "share", lambda *given: found.append(own(*given)) or found[-1])
    assert_same(loss_and_gradients(case.ours(), batch), case.of_vanilla(case.reference, batch), case.tolerance)
    alone = case.record.across_rows is not None or case.record.eager
    assert [shared is not None for shared in found] == ([] if alone else [True])


def test_scores_are_those_of_naive_ablation(case):
    model = case.ours().eval()
    names = list(gated_layers(model))
    ranks = [(names[0], 1), (names[len(names) // 2], 0), (names[-1], 3)]
    found = ablate(model, [case.batch], ranks, memory=2**20)
    reference = copy.deepcopy(case.reference).eval()
    layers = {
        name.removeprefix("base_model.model."): m for name, m in reference.named_modules() if hasattr(m, "lora_B")
    }

    def loss_without(skipped) -> float:
        """The loss with B's columns of the skipped ranks at 0."""
        kept = {name: layer.lora_B["default"].weight.data.clone() for name, layer in layers.items()}
        for name, rank in skipped:
            layers[name].lora_B["default"].weight.data[:, rank] = 0
        with torch.no_grad():
            loss = reference(**case.batch).loss.item()
        for name, value in kept.items():
            layers[name].lora_B["default"].weight.data = value
        return loss

    every = [(name, k) for name in layers for k in range(4)]
    whole, bare = loss_without([]), loss_without(every)
    assert (found.loss, found.base_loss) == (pytest.approx(whole, rel=1e-5), pytest.approx(bare, rel=1e-5))
    for rank in ranks:
        assert found.drop[rank] == pytest.approx(loss_without([rank]) - whole, abs=2e-5)
        assert found.alone[rank] == pytest.approx(bare - loss_without([r for r in every if r != rank]), abs=2e-5)


def test_surgery_and_what_is_saved_are_the_same_function(case, tmp_path):
    """Ranks leave and enter; PEFT reads the adapter, in both forms, and so does a run that resumes."""
    model = case.ours()
    names = list(gated_layers(model))
    apply_plan(model, AllocationPlan(pruned={names[0]: (0, 1, 2, 3), names[1]: (2,)}, grown={names[2]: 2}))
    save_adapter(model, tmp_path / "adapter")
    model.eval()
    inputs = {key: case.batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(**inputs).logits
        for form in ("peft", "peft-uniform"):
            export_adapter(tmp_path / "adapter", tmp_path / form, form, source=resolve(str(case.folder)))
            read = PeftModel.from_pretrained(case.base(), tmp_path / form).eval()
            torch.testing.assert_close(read(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
    resumed = case.ours()
    restore(resumed, tmp_path / "adapter")
    assert_same(loss_and_gradients(resumed, case.batch), loss_and_gradients(model.train(), case.batch))


def test_merges_are_the_live_model_as_transformers_reads_them(case, tmp_path):
    model = case.ours().eval()
    save_adapter(model, tmp_path / "adapter")
    inputs = {key: case.batch[key] for key in ("input_ids", "attention_mask")}
    real = case.batch["attention_mask"].bool()
    plain = AutoModelForCausalLM.from_pretrained(
        case.folder, dtype=torch.float32, attn_implementation=attention_of(case)
    )
    for base, live in ((NF4, model), (None, PeftModel.from_pretrained(plain, tmp_path / "adapter").eval())):
        out = tmp_path / ("original" if base is None else "dequantized")
        own = dict(quantization=base, dtype=torch.float32, verify=base is not None)
        report = merge(resolve(str(case.folder)), tmp_path / "adapter", out, **own)
        if base is not None:
            assert report["unexplained_difference"] < 1e-4 and report["mean_adapter_effect"] > 1e-2
        read = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
        with torch.no_grad():
            torch.testing.assert_close(read(**inputs).logits[real], live(**inputs).logits[real], rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module")
def in_gguf(case, save_tiny, tmp_path_factory):
    """(the live model, the folder of its adapter, that of its merge in GGUF, the base)."""
    folder, given = tmp_path_factory.mktemp(f"{case.name}-gguf"), dict(quantization=NF4, format="gguf", gguf_type="f32")
    if case.name in NOT_IN_GGUF:
        refused, quirks = NOT_IN_GGUF[case.name]
        save_adapter(case.ours().eval(), folder / "refused")
        with pytest.raises(InputError, match=re.escape(f"{case.name} with {refused}")):
            merge(resolve(str(case.folder)), folder / "refused", folder / "out", **given)
        case = Case(case.name, save_tiny(folder / "base", case.name, **COMMON | QUIRKS[case.name] | quirks))
    model, source = case.ours().eval(), resolve(str(case.folder))
    save_adapter(model, folder / "adapter")
    merge(source, folder / "adapter", folder / "out", verify=False, **given)  # the tests read it back themselves
    return model, folder / "adapter", folder / "out", source


def windowless(case) -> dict[str, torch.Tensor]:
    """What llama.cpp has no windows of, within one."""
    ids = case.batch["input_ids"][:1]
    return {"input_ids": ids[:, :6] if case.name in ("mistral", "ministral") else ids}


def test_gguf_is_read_back_or_refused_by_name(case, request, tmp_path):
    if case.record.gguf is None:
        save_adapter(case.ours().eval(), tmp_path / "adapter")
        source, refused = (
            resolve(str(case.folder)),
            f"model_type={case.name}: GGUF is written and read for .* models only",
        )
        with pytest.raises(InputError, match=refused):
            merge(source, tmp_path / "adapter", tmp_path / "out", quantization=NF4, format="gguf")
        with pytest.raises(InputError, match=refused):
            export_adapter(tmp_path / "adapter", tmp_path / "out", "gguf-lora", source=source)
        return
    model, _, merged, source = request.getfixturevalue("in_gguf")
    own = load_tokenizer(source)  # a GGUF file has a token of nothing for each embedding that has none
    readers = [load_base(merged / "model.gguf", load_in_4bit=False, dtype="float32", tokenizer=own).model.eval()]
    if case.name in READ_BY_TRANSFORMERS:
        readers.append(AutoModelForCausalLM.from_pretrained(merged, gguf_file="model.gguf", dtype=torch.float32).eval())
    with torch.no_grad():
        logits = model(**windowless(case)).logits
        for read in readers:
            torch.testing.assert_close(read(**windowless(case)).logits, logits, rtol=2e-4, atol=2e-4)
    text = "Zürich, 2024?"
    assert load_tokenizer(resolve(str(merged / "model.gguf")), spare_tokens=True)(text) == own(text)
    shape = shape_of(resolve(str(merged / "model.gguf")))
    assert shape.linear_maps() == shape_of(source).linear_maps()


def test_granite_4_that_rotates_nothing_is_merged_into_gguf_and_read_back(save_tiny, tmp_path):
    quirks = COMMON | QUIRKS["granitemoehybrid"] | dict(position_embedding_type=None, attention_bias=True)
    source = resolve(str(save_tiny(tmp_path / "base", "granitemoehybrid", **quirks)))
    model = attach(load_base(source, dtype="float32").model, r=2, alpha=4).eval()
    for layer in gated_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    save_adapter(model, tmp_path / "adapter")
    given = dict(quantization=NF4, format="gguf", gguf_type="f32")
    assert merge(source, tmp_path / "adapter", tmp_path / "out", **given)["position_difference"] == 0
    read = load_base(
        tmp_path / "out" / "model.gguf", load_in_4bit=False, dtype="float32", tokenizer=load_tokenizer(source)
    )
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        torch.testing.assert_close(read.model(ids).logits, model(input_ids=ids).logits, rtol=2e-4, atol=2e-4)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_llama_cpp_computes_what_transformers_does(case, request, tmp_path):
    """From the merge as one file, and from the base with the adapter beside it."""
    from llama_cpp import Llama

    if case.record.gguf is None:
        return
    model, adapter, merged, source = request.getfixturevalue("in_gguf")
    nothing = tmp_path / "nothing"
    shutil.copytree(adapter, nothing)
    tensors = load_file(nothing / "adapter_model.safetensors")
    save_file({key: torch.zeros_like(value) for key, value in tensors.items()}, nothing / "adapter_model.safetensors")
    merge(source, nothing, tmp_path / "base", quantization=NF4, format="gguf", gguf_type="f32", verify=False)
    export_adapter(adapter, tmp_path / "lora", "gguf-lora", source=source)
    inputs = windowless(case)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    # It looks GELU up in a table of half precision.
    tolerance = 1e-2 if case.record.gguf.activation.startswith("gelu") else 2e-4
    for file, lora in ((merged, None), (tmp_path / "base", str(tmp_path / "lora" / "adapter.gguf"))):
        client = Llama(
            str(file / "model.gguf"), lora_path=lora, n_ctx=64, logits_all=True, n_threads=1, n_threads_batch=1,
            type_k=0, type_v=0, flash_attn=False, verbose=False,
        )  # fmt: skip
        client.eval(inputs["input_ids"][0].tolist())
        found = torch.from_numpy(np.array(client.scores[: len(logits)]))
        client.close()
        torch.testing.assert_close(found, logits, rtol=tolerance, atol=tolerance)


def test_weights_are_planned_exactly(case):
    model = case.ours("bfloat16")
    terms = plan_memory(shape_of(resolve(str(case.folder))), ranks=4).terms
    maps = linear_maps(model)
    sizes = {name: (m.in_features, m.out_features) for name, m in maps.items()}
    assert sizes == shape_of(resolve(str(case.folder))).linear_maps()
    assert terms["4-bit weights"] == sum(m.weight.data.numel() for m in maps.values())
    assert terms["adapter"] == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = {
        id(p): p for name, p in model.named_parameters() if "lora_" not in name
    }  # biases of some layers are left out
    planned = sum(terms[name] for name in ("4-bit weights", "embeddings and head", "norms and biases"))
    assert planned == pytest.approx(sum(p.nbytes for p in frozen.values()), rel=0.03)


# Wide enough that activations are more than what surrounds them.
WIDE = dict(
    hidden_size=128, intermediate_size=352, num_hidden_layers=2, head_dim=32, num_key_value_heads=2,
    max_position_embeddings=512,
)  # fmt: skip
STEPS = [
    ("float32", True, None, "one"), ("float32", False, None, "one"), ("float32", "selective", None, "packed"),
    ("float32", True, 64, "one"), ("bfloat16", True, None, "one"), ("float32", False, None, "alike"),
]  # fmt: skip


def planned_rows(kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """(256 tokens as one row, as three packed ones, or as four that begin alike, what the plan is told of them)."""
    ids = torch.randint(2, 64, (1, 256))
    if kind == "alike":  # by so little that hardly a state is saved, and attention gathers all of them
        ids = ids.view(4, 64)
        ids[1:, :3] = ids[0, :3]
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}, dict(
            seq_len=64, micro_batch_size=4
        )
    batch, told = {"input_ids": ids, "labels": ids}, dict(seq_len=256, packed=kind == "packed")
    if kind == "packed":
        batch["position_ids"] = torch.cat([torch.arange(n) for n in (100, 90, 66)])[None]
    return batch, told


def test_a_step_is_planned(case, live_bytes):
    """Within 5 % of the tensors alive, of what is kept and of the worst moment. Shared prefixes are not planned for,
    and take no more."""
    assert bool(said_of_family(shape_of(resolve(str(case.folder))))) != (case.name in FAMILIES)
    if case.name not in FAMILIES:
        return
    quirks = {key: value for key, value in QUIRKS[case.name].items() if key not in WIDE}
    layers = 4 if case.name == "gemma4_text" else 2  # it has blocks of four kinds
    quirks["layer_types"] = quirks["layer_types"][-layers:] if "layer_types" in quirks else None
    if case.name == "phi3":
        quirks["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5)
    fields = COMMON | WIDE | quirks | dict(num_hidden_layers=layers)
    config, models = CONFIG_MAPPING[case.name](vocab_size=64, pad_token_id=0, eos_token_id=1, **fields), {}
    for dtype, kept, tile, rows in STEPS:
        if rows == "alike" and (case.record.across_rows or case.record.eager):
            continue
        batch, told = planned_rows("one" if case.record.across_rows else rows)
        if dtype not in models:
            base = AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(case))
            base = base.requires_grad_(False).to(getattr(torch, dtype))
            quantize_(base, compute_dtype=getattr(torch, dtype))
            base.is_loaded_in_4bit = True
            models[dtype] = attach(base, r=8, alpha=16).train()
            for parameter in models[dtype].parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        set_checkpointing(models[dtype], kept)
        set_mlp_tile(models[dtype], tile)
        with live_bytes() as live:
            summed_loss(models[dtype], batch).backward()
        terms = plan_memory(
            ModelShape.from_config(config.to_dict()), gradient_checkpointing=kept, mlp_tile=tile, compute_dtype=dtype,
            device="cpu", **told,
        ).terms  # fmt: skip
        names = (*KEPT, "block working set", "attention's backward beyond it", "loss beyond it")
        planned = sum(terms.get(name, 0) for name in names)
        most = 1.15 if rows == "alike" else 1.05
        assert 0.95 < planned / live.peak < most, (dtype, kept, tile, rows)


# -------------------------------------------------------------------------------------- what cannot be trained, by name


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            dict(model_type="granitemoehybrid", layer_types=["attention"], num_local_experts=32),
            "type granitemoehybrid, a mixture of experts",
        ),
        (dict(model_type="granitemoehybrid", layer_types=["mamba", "attention"]), "type granitemoehybrid, a state-sp"),
        (
            dict(model_type="granitemoehybrid", layer_types=["linear_attention", "full_attention"]),
            "type granitemoehybrid, a state-space model",
        ),
        (dict(model_type="granitemoehybrid"), "type granitemoehybrid, a state-space model"),
        (dict(model_type="granitemoehybrid", layer_types=["linear_attention"]), "type granitemoehybrid, a state-space"),
        (dict(model_type="mixtral"), "type mixtral, a mixture of experts, .* it would need adapters on such tensors"),
        (dict(model_type="qwen3_moe", num_experts=8), "type qwen3_moe, a mixture of experts"),
        (dict(model_type="gpt_oss"), "type gpt_oss, a mixture of experts"),
        (dict(model_type="llama4"), "type llama4, a mixture of experts"),
        (dict(model_type="deepseek_v3"), "type deepseek_v3, a mixture of experts"),
        (dict(model_type="gemma4_text", enable_moe_block=True, num_experts=8), "type gemma4_text, a mixture"),
        (dict(model_type="minimax_m2"), "type minimax_m2, a mixture of experts"),  # by its config's own defaults
        (dict(model_type="t5"), "type t5, an encoder-decoder; it would need a loss and batches for two stacks"),
        (dict(model_type="bart"), "type bart, an encoder-decoder"),
        (dict(model_type="plbart", is_encoder_decoder=True), "type plbart, an encoder-decoder"),
        (dict(model_type="mamba2"), "type mamba2, a state-space model"),
        (dict(model_type="bert"), "type bert, a model that predicts no next token"),
        (dict(model_type="vit"), "type vit, which predicts no next token"),
        # packed rows would run into each other there, and shared prefixes leave out what came before
        (dict(model_type="falcon_h1"), "type falcon_h1, with convolutions along a row .*; it would need a record that"),
        (dict(model_type="bamba"), "type bamba, with convolutions along a row"),
        (dict(model_type="gpt2"), "type gpt2, whose blocks are not at model.layers; it would need a record"),
        (dict(model_type="opt"), "type opt, whose blocks are not at model.layers"),
        (dict(model_type="mine", auto_map={"AutoModel": "m.M"}), r"type mine, which this .*\(auto_map\)"),
        (dict(model_type="qwen9"), "type qwen9, which this transformers does not know; it would need a"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_by_name(fields, named, tmp_path):
    """From config.json alone: there are no weights and no tokenizer."""
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=f"the model is of {named}"):
        load_base(tmp_path)
    with pytest.raises(InputError, match=f"the model is of {named}"):
        shape_of(resolve(str(tmp_path)))


def test_a_model_without_a_record_that_scales_its_logits_is_refused(tmp_path):
    """From config.json alone, too."""
    config = CONFIG_MAPPING["hyperclovax"](vocab_size=260, **COMMON | dict(logits_scaling=3.0))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(InputError, match="type hyperclovax, which does to its logits what is not known here"):
        load_base(tmp_path, dtype="float32")
    with pytest.raises(InputError, match="type hyperclovax, which does to its logits what is not known here"):
        attach(AutoModelForCausalLM.from_config(config), r=4, alpha=8)
    check_plain(config.to_dict() | dict(logits_scaling=1.0), "config.json")


def test_attention_is_told_all_where_blocks_hand_on_no_keywords(save_tiny, tmp_path):
    """StableLM's. Whole rows, which are causal without a mask, and rows that share prefixes."""
    case = Case("stablelm", save_tiny(tmp_path, "stablelm", **COMMON | dict(head_dim=16)))
    ids = case.batch["input_ids"].clone()
    whole = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    alike = ids.clone()
    alike[1, :15], alike[2, :9] = ids[0, :15], ids[0, :9]
    for batch in (whole, whole | {"input_ids": alike, "labels": alike}):
        found = loss_and_gradients(case.ours(), prepared(batch, torch.device("cpu")))
        assert_same(found, case.of_vanilla(case.reference, batch))


def test_a_model_without_fused_attention_keeps_its_own(save_tiny, tmp_path):
    """VaultGemma's caps its scores, which torch's cannot."""
    case = Case("vaultgemma", save_tiny(tmp_path, "vaultgemma", **COMMON | dict(head_dim=16, sliding_window=6)))
    ids = case.batch["input_ids"]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    assert_same(
        loss_and_gradients(case.ours(), prepared(batch, torch.device("cpu"))), case.of_vanilla(case.reference, batch)
    )


def test_a_merge_is_checked_where_attention_has_weights_of_its_own(save_tiny, tmp_path):
    """DiffLlama's has factors beside its linear layers, and hands on a pair."""
    case = Case("diffllama", save_tiny(tmp_path / "base", "diffllama", **COMMON | dict(head_dim=16)))
    save_adapter(case.ours().eval(), tmp_path / "adapter")
    report = merge(
        resolve(str(case.folder)), tmp_path / "adapter", tmp_path / "out", quantization=NF4, dtype=torch.float32
    )
    assert report["max_logit_difference"] < 1e-4 and report["mean_adapter_effect"] > 1e-2


def test_a_dropout_inside_of_an_mlp_keeps_rows_apart(save_tiny, tmp_path):
    quirks = COMMON | dict(attention_dropout=0.0, residual_dropout=0.1)
    model = attach(load_base(save_tiny(tmp_path, "seed_oss", **quirks), dtype="float32").model, r=4, alpha=8).train()
    assert not prefixes.can_share(model.get_base_model(), 6)
    assert prefixes.can_share(model.eval().get_base_model(), 6)

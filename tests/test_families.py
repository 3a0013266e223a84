"""Every family × every check, on tiny random models with the family's true quirks, against transformers' own forward with PEFT's layers
on the same 4-bit base. What a family cannot have is refused by name, and that is what is tested then."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qalora.adapter.model import attach
from qalora.base.families import FAMILIES, family_of
from qalora.base.loading import load_base
from qalora.kernels.activations import set_checkpointing, set_mlp_tile
from qalora.kernels.loss import summed_loss

COMMON = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
)  # fmt: skip
MIXED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=6)
TIED = dict(tie_word_embeddings=True)
LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.5, original_max_position_embeddings=16,
    short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0],
)  # fmt: skip
YARN_SCALED = dict(
    rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0, mscale=1.0,
    mscale_all_dim=1.0, llama_4_scaling_beta=0.3,
)  # fmt: skip
QUIRKS: dict[str, dict] = {
    "llama": {},
    "mistral": dict(sliding_window=6),
    "ministral": MIXED,
    "ministral3": dict(rope_parameters=YARN_SCALED),
    "qwen2": TIED,
    "qwen3": TIED | dict(num_key_value_heads=1),
    "qwen3_5_text": dict(
        num_hidden_layers=4, layer_types=["linear_attention"] * 3 + ["full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=16,
    ),
    "smollm3": TIED | dict(num_hidden_layers=4),
    "granite": dict(embedding_multiplier=3.0, attention_multiplier=0.3, residual_multiplier=0.7, logits_scaling=2.5),
    "phi3": dict(rope_parameters=LONGROPE, head_dim=16, original_max_position_embeddings=16),
    "gemma2": TIED | MIXED | dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0, query_pre_attn_scalar=20),
    "gemma3_text": TIED | MIXED | dict(num_key_value_heads=1, query_pre_attn_scalar=20, final_logit_softcapping=3.0),
    "gemma4_text": TIED
    | dict(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=6, num_kv_shared_layers=2,
        hidden_size_per_layer_input=64, vocab_size_per_layer_input=258, global_head_dim=64, final_logit_softcapping=3.0,
        use_double_wide_mlp=True,
    ),
    "olmo2": {},
    "olmo3": MIXED,
    "glm4": dict(attention_bias=True),
    "seed_oss": dict(residual_dropout=0.0, attention_dropout=0.0),
    "ernie4_5": TIED | dict(use_bias=True),
    "exaone4": MIXED,
    "hunyuan_v1_dense": TIED,
    "cohere2": TIED | MIXED | dict(logit_scale=0.25),
    "lfm2": TIED | dict(layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "apertus": {},
    "internlm3": dict(qkv_bias=True, bias=True),
    # Without a record:
    "helium": dict(head_dim=16),
    "starcoder2": TIED | dict(use_bias=True),
}  # fmt: skip


# fp32: what the order of sums makes of a gradient. A delta net's normed states amplify it.
TOLERANCE = {"qwen3_5_text": 5e-5}


def test_every_record_is_tried():
    assert set(FAMILIES) <= set(QUIRKS)


class Case:
    """One family: its folder, and what vanilla transformers and PEFT make of it."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.record = name, folder, family_of(name)
        self.tolerance = TOLERANCE.get(name, 1e-5)
        self.reference = vanilla(folder)
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
        tokens = (batch["labels"][:, 1:] != -100).sum()
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
        return loss.item(), grads

    def ours(self, dtype: str = "float32") -> PeftModel:
        model = attach(load_base(self.folder, dtype=dtype).model, r=4, alpha=8)
        return with_weights_of(self.reference, model)


def vanilla(folder: Path, dtype: str = "float32") -> PeftModel:
    model = load_base(folder, dtype=dtype).model
    torch.manual_seed(2)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return peft.train()


def with_weights_of(reference, model):
    weights = {key: value for key, value in reference.state_dict().items() if "lora_" in key}
    own = dict(model.named_parameters())
    missing = {key for key in own if "lora_" in key} ^ set(weights)
    assert all(".layers." not in key for key in missing), missing
    for key, value in weights.items():
        if key in own:
            own[key].data.copy_(value)
        else:
            reference.get_parameter(key).data.zero_()
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
    set_checkpointing(model, False)
    set_mlp_tile(model, 5)
    assert_same(loss_and_gradients(model, case.batch), case.expected, case.tolerance)
    set_checkpointing(model, "selective")
    assert_same(loss_and_gradients(model, case.batch), case.expected, case.tolerance)

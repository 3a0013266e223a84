"""What a block is said to keep against what autograd saves for its backward in transformers' own forward."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qalora.adapter.model import attach
from qalora.base.quantized import quantize_
from qalora.base.registry import ModelShape
from qalora.block_memory import MicroBatch, beside_blocks, blocks_of, layers_of
from qalora.kernels.loss import summed_loss

TOKENS = 256
LARGE = dict(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=128, vocab_size=64, max_position_embeddings=512, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
SLIDING = dict(layer_types=["sliding_attention"] * 2 + ["full_attention"], sliding_window=40)
# Families whose blocks are not made as LLaMA's, with several blocks in a row of each kind.
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=40),
    "apertus": {},
    "cohere": dict(use_qk_norm=True),
    "cohere2": SLIDING,
    "gemma3_text": SLIDING,
    "glm4": {},
    "phi3": {},
    "lfm2": dict(layer_types=["conv", "conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "qwen3_5_text": dict(
        layer_types=["linear_attention"] * 2 + ["full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=64, linear_value_head_dim=64,
    ),
    "gemma4_text": dict(
        num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=40,
        num_kv_shared_layers=2, hidden_size_per_layer_input=64, vocab_size_per_layer_input=64, global_head_dim=256,
        use_double_wide_mlp=True,
    ),
}  # fmt: skip


def saved_bytes(model, batch) -> int:
    """Of every storage, but the model's own, that the blocks' forward saves for the backward."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved, found = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    def after_blocks(*_):
        found.append(sum(storage.nbytes() for storage in saved.values()))

    model.get_base_model().model.layers[-1].register_forward_hook(after_blocks)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        summed_loss(model, batch)
    return found[0]


# In 16 bits what is kept in fp32 weighs twice.
IN_BF16 = ("cohere", "qwen3_5_text", "gemma4_text")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, "float32") for family in FAMILIES), *((family, "bfloat16") for family in IN_BF16)],
)
def test_blocks_keep_what_autograd_saves(family, dtype):
    """Without checkpointing, at a hidden size of 512."""
    config = CONFIG_MAPPING[family](**LARGE | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").requires_grad_(False)
    model = model.to(getattr(torch, dtype))
    quantize_(model, compute_dtype=getattr(torch, dtype))
    model.is_loaded_in_4bit = True
    model = attach(model, r=8, alpha=16).train()
    ids = torch.randint(2, 64, (1, TOKENS))
    shape = ModelShape.from_config(config.to_dict())
    batch = MicroBatch(
        rows=1, seq_len=TOKENS, tile=TOKENS, size=getattr(torch, dtype).itemsize, mask=0, packed=False,
        load_in_4bit=True, device="cpu",
    )  # fmt: skip
    layers = layers_of(shape, dict.fromkeys(shape.linear_maps(), 8))
    blocks = blocks_of(shape, layers, batch)
    planned = (
        sum(block.inside for block in blocks)
        - blocks[0].unread
        - blocks[0].copied
        + beside_blocks(shape, layers, batch).all_along
    )
    found = saved_bytes(model, {"input_ids": ids, "labels": ids})
    assert planned == pytest.approx(found, rel=0.03)

"""What a block of each model family holds, from the fields of its config: linear layers, and parameters beside them.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qalora.base.families import family_of

Fields = Mapping[str, Any]
Sizes = tuple[tuple[str, int, int], ...]  # (name in the block, inputs, outputs) of each linear layer


@dataclass(frozen=True)
class Block:
    """
    Attributes:
        linear: its linear layers.
        other: how many parameters it has beside their weights: norms, biases, convolutions.
    """

    linear: Sizes
    other: int


@dataclass(frozen=True)
class Layout:
    """How the blocks of a family differ from LLaMA's.

    Attributes:
        fused_qkv: q, k and v are one linear layer.
        fused_mlp: gate and up are one linear layer.
        biased_output: attention_bias means a bias of attention's last layer too.
    """

    fused_qkv: bool = False
    fused_mlp: bool = False
    biased_output: bool = True


# model_type → its layout. Those of Qwen3.5 and Gemma 4 differ from block to block. Granite 4 is the dense one.
LAYOUTS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen3", "smollm3", "granite", "ministral", "ministral3", "gemma3_text", "olmo2", "olmo3"),
        Layout(),
    ),
    "qwen2": Layout(biased_output=False),
    "phi3": Layout(fused_qkv=True, fused_mlp=True),
    "glm4": Layout(fused_mlp=True, biased_output=False),
    "qwen3_5_text": Layout(),
    "gemma4_text": Layout(),
    "granitemoehybrid": Layout(),
}


def blocks_of(fields: Fields) -> tuple[Block, ...]:
    """The blocks of a model, one for each layer.

    Args:
        fields: of a config whose model_type is one of LAYOUTS, none left out.
    """
    kinds = {"qwen3_5_text": _qwen3_5, "gemma4_text": _gemma4, "granitemoehybrid": _granite4}
    build = kinds.get(fields["model_type"], lambda fields, layer: decoder_block(fields))
    return tuple(build(fields, layer) for layer in range(fields["num_hidden_layers"]))


def beside_blocks(fields: Fields) -> int:
    """Parameters that are in no block and neither embeddings, last norm nor head: Gemma 4's inputs of each layer."""
    inputs = fields.get("hidden_size_per_layer_input") or 0
    rows = fields.get("vocab_size_per_layer_input", fields["vocab_size"]) + fields["hidden_size"]
    return inputs and rows * fields["num_hidden_layers"] * inputs + inputs


def decoder_block(fields: Fields) -> Block:
    """Attention and a gated MLP, as LLaMA and most others have them."""
    d, heads = fields["hidden_size"], fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or d // heads
    kv_heads = fields.get("num_key_value_heads") or heads
    attention, norms = _attention(fields, q=heads * head_dim, kv=kv_heads * head_dim, head_dim=head_dim)
    return _block(fields, attention, norms)


def _qwen3_5(fields: Fields, layer: int) -> Block:
    if _kind(fields, layer, every=fields.get("full_attention_interval", 4)) == "full_attention":
        block = decoder_block(fields)
        (q_name, d, q), *rest = block.linear
        return Block(((q_name, d, 2 * q), *rest), block.other)  # q and the gate of attention's output
    d, heads, head_dim = fields["hidden_size"], fields["linear_num_value_heads"], fields["linear_value_head_dim"]
    value, key = heads * head_dim, fields["linear_num_key_heads"] * fields["linear_key_head_dim"]
    delta_net = (
        ("linear_attn.in_proj_qkv", d, 2 * key + value),
        ("linear_attn.in_proj_z", d, value),
        ("linear_attn.in_proj_b", d, heads),
        ("linear_attn.in_proj_a", d, heads),
        ("linear_attn.out_proj", value, d),
    )
    convolution = (2 * key + value) * fields["linear_conv_kernel_dim"]
    return _block(fields, delta_net, convolution + 2 * heads + head_dim)


def _gemma4(fields: Fields, layer: int) -> Block:
    d, inputs = fields["hidden_size"], fields.get("hidden_size_per_layer_input") or 0
    last = layer == fields["num_hidden_layers"] - 1
    whole = last or _kind(fields, layer, every=6) == "full_attention"
    shares_kv = layer >= fields["num_hidden_layers"] - fields.get("num_kv_shared_layers", 0)
    key_is_value = whole and bool(fields.get("attention_k_eq_v"))
    head_dim = fields.get("global_head_dim", 512) if whole else fields["head_dim"]
    kv_heads = (fields.get("num_global_key_value_heads") if key_is_value else None) or fields["num_key_value_heads"]
    own = (fields.get("per_layer_config") or {}).get(
        str(layer), {}
    )  # as transformers saves what it read of these fields
    head_dim, kv_heads = own.get("head_dim", head_dim), own.get("num_key_value_heads", kv_heads)
    attention, norms = _attention(
        fields, q=fields["num_attention_heads"] * head_dim, kv=kv_heads * head_dim, head_dim=head_dim
    )
    absent = {"k_proj", "v_proj"} if shares_kv else {"v_proj"} if key_is_value else set()
    attention = tuple(layer for layer in attention if layer[0].rpartition(".")[2] not in absent)
    wide = 2 if shares_kv and fields.get("use_double_wide_mlp") else 1
    block = _block(fields, attention, norms - (head_dim if shares_kv else 0), wide=wide)
    if not inputs:
        return block
    per_layer = (("per_layer_input_gate", d, inputs), ("per_layer_projection", inputs, d))
    return Block((*block.linear, *per_layer), block.other + d)


def _granite4(fields: Fields, layer: int) -> Block:
    """Its MLP is the one that experts would share."""
    d, ff = fields["hidden_size"], fields["shared_intermediate_size"]
    block = decoder_block(fields)
    attention = tuple(layer for layer in block.linear if layer[0].startswith("self_attn."))
    return Block((("shared_mlp.input_linear", d, 2 * ff), ("shared_mlp.output_linear", ff, d), *attention), block.other)


def _kind(fields: Fields, layer: int, *, every: int) -> str:
    """The kind of a layer's attention: as the config lists it, else the whole one every so often."""
    kinds = fields.get("layer_types")
    return str(kinds[layer]) if kinds else "sliding" if (layer + 1) % every else "full_attention"


def _attention(fields: Fields, *, q: int, kv: int, head_dim: int) -> tuple[Sizes, int]:
    """The linear layers of an attention, and its parameters beside their weights."""
    d, layout, (_, qk_norm) = (
        fields["hidden_size"],
        LAYOUTS[fields["model_type"]],
        family_of(fields["model_type"]).norms,
    )
    biases = (q + 2 * kv + layout.biased_output * d) if fields.get("attention_bias") else 0
    norms = {"": 0, "head": 2 * head_dim, "width": q + kv}[qk_norm]
    qkv = (("q_proj", d, q), ("k_proj", d, kv), ("v_proj", d, kv))
    layers = (("qkv_proj", d, q + 2 * kv),) if layout.fused_qkv else qkv
    return tuple((f"self_attn.{name}", i, o) for name, i, o in (*layers, ("o_proj", q, d))), biases + norms


def _block(fields: Fields, attention: Sizes, other: int, *, wide: int = 1) -> Block:
    """An attention with the MLP and the norms around both."""
    d, ff, layout = fields["hidden_size"], wide * fields["intermediate_size"], LAYOUTS[fields["model_type"]]
    gate_up = (("gate_up_proj", d, 2 * ff),) if layout.fused_mlp else (("gate_proj", d, ff), ("up_proj", d, ff))
    mlp = tuple((f"mlp.{name}", i, o) for name, i, o in (*gate_up, ("down_proj", ff, d)))
    biases = 2 * ff + d if fields.get("mlp_bias") else 0
    return Block((*attention, *mlp), other + family_of(fields["model_type"]).norms[0] * d + biases)

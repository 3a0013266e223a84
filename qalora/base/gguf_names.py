"""transformers' names, row order and values of a model's tensors ↔ those of GGUF.

llama.cpp differs from transformers in five ways, each of some families only:

    rows of q and k     rotated in neighbouring pairs, where transformers rotates halves: (half, 2) → (2, half)
    heads of values     of a gated delta net: by value within the key, where transformers has them by key
    values              of an RMSNorm 1 + w, of a delta net's decay −exp(A)
    constants           of an activation: metadata, where transformers has tensors
    fused layers        of Granite 4: two tensors, each of half of the rows

https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from qalora.base.families import FAMILIES, Gguf, family_of
from qalora.errors import InputError

if TYPE_CHECKING:
    from gguf import TensorNameMap

# Parameters of transformers that are no module's weight or bias → what the library's map knows, and what follows its
# answer.
SPELLINGS = {"dt_bias": ("dt_proj", ".bias"), "A_log": ("A_log", ""), "layer_scalar": ("layer_scalar", ".weight")}
CONSTANTS = "mlp.act_fn"
# Linear layers of Granite 4 → those of LLaMA that llama.cpp has for them, which have equal shares of the rows.
PARTS = {"shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"), "shared_mlp.output_linear": ("mlp.down_proj",)}


def gguf_of(config: PreTrainedConfig) -> Gguf:
    """How GGUF has a model.

    Raises:
        InputError: not one that is written and read here.
    """
    found = family_of(config.model_type).gguf
    if found is None:
        readable = [model_type for model_type, family in FAMILIES.items() if family.gguf is not None]
        raise InputError(
            f"model_type={config.model_type}: GGUF is written and read for {', '.join(readable)} models only; "
            "use --format hf."
        )
    return found


def gguf_names(name: str, config: PreTrainedConfig) -> tuple[str, ...]:
    """model.layers.3.self_attn.q_proj.weight → blk.3.attn_q.weight; several of a tensor that GGUF has in parts, of as
    many rows each, the first rows first."""
    stem, _, kind = name.rpartition(".")
    known, suffix = SPELLINGS.get(kind, ("", f".{kind}"))
    names = _names(gguf_of(config).architecture, config.num_hidden_layers)
    parts = [stem]
    for fused, own in PARTS.items():
        if stem.endswith(fused):
            parts = [stem.removesuffix(fused) + part for part in own]
    return tuple(f"{names.get_name(f'{part}.{known}' if known else part)}{suffix}" for part in parts)


def constant(name: str) -> str | None:
    """The key of what GGUF has as metadata: model.layers.3.mlp.act_fn.beta → xielu.beta; None of a tensor."""
    return f"xielu.{name.rpartition('.')[2]}" if CONSTANTS in name else None


def is_convolution(name: str) -> bool:
    """Whether a tensor is a convolution of each channel: (channels, 1, width), and (channels, width) in GGUF."""
    return name.endswith(("conv.conv.weight", "conv1d.weight"))


def is_permuted(name: str, config: PreTrainedConfig) -> bool:
    """Whether the rows of this tensor (or of the B of its adapter) have another order in GGUF."""
    return row_order(name, config) is not None


def row_order(name: str, config: PreTrainedConfig) -> Tensor | None:
    """(rows,) of which of transformers' rows each of GGUF's is; None: it is the same."""
    part = _projection(name)
    if gguf_of(config).pairs and part in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return torch.arange(heads * width).view(heads, 2, -1).transpose(1, 2).reshape(-1)
    if "linear_attn" not in name:
        return None
    if part in ("in_proj_qkv", "conv1d"):
        keys = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        values = _value_order(config, config.linear_value_head_dim)
        return None if values is None else torch.cat([torch.arange(keys), keys + values])
    wide = {"in_proj_z": config.linear_value_head_dim, "in_proj_a": 1, "in_proj_b": 1, "A_log": 1, "dt_bias": 1}
    return _value_order(config, wide[part]) if part in wide else None


def column_order(name: str, config: PreTrainedConfig) -> Tensor | None:
    """(columns,) the same of the columns of a weight, or of the A of its adapter."""
    reads_values = "linear_attn" in name and _projection(name) == "out_proj"
    return _value_order(config, config.linear_value_head_dim) if reads_values else None


def to_gguf(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """A tensor as GGUF has it; of one whose rows keep their places, any rows of it."""
    for dim, order in enumerate((row_order(name, config), column_order(name, config))):
        tensor = tensor if order is None else tensor.index_select(dim, order)
    if _is_one_more(name, config):
        return tensor + 1
    if name.endswith("A_log"):
        return -tensor.exp()
    return tensor.squeeze(1) if is_convolution(name) else tensor


def from_gguf(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """The inverse of `to_gguf`."""
    for dim, order in enumerate((row_order(name, config), column_order(name, config))):
        tensor = tensor if order is None else tensor.index_select(dim, order.argsort())
    if _is_one_more(name, config):
        return tensor - 1
    if name.endswith("A_log"):
        return (-tensor).log()
    return tensor.unsqueeze(1) if is_convolution(name) else tensor


def adapter_to_gguf(name: str, A: Tensor, B: Tensor, config: PreTrainedConfig) -> tuple[Tensor, Tensor]:
    """(rank, in) and (out, rank) of the adapter of a linear layer, as its weight is stored."""
    rows, columns = row_order(name, config), column_order(name, config)
    return A if columns is None else A[:, columns], B if rows is None else B[rows]


def adapter_from_gguf(name: str, A: Tensor, B: Tensor, config: PreTrainedConfig) -> tuple[Tensor, Tensor]:
    """The inverse of `adapter_to_gguf`."""
    rows, columns = row_order(name, config), column_order(name, config)
    return A if columns is None else A[:, columns.argsort()], B if rows is None else B[rows.argsort()]


def _value_order(config: PreTrainedConfig, width: int) -> Tensor | None:
    """Of heads of values, each `width` wide: transformers has those of a key side by side, llama.cpp the first of each
    key, then the second of each."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if keys == values:
        return None
    return torch.arange(values * width).view(keys, values // keys, width).transpose(0, 1).reshape(-1)


def _is_one_more(name: str, config: PreTrainedConfig) -> bool:
    """Whether GGUF has 1 + w of a norm's w."""
    plus_one = family_of(config.model_type).weighing == "plus_one"
    return plus_one and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")


def _projection(name: str) -> str:
    """model.layers.3.self_attn.q_proj[.weight] → q_proj"""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


@lru_cache
def _names(architecture: str, blocks: int) -> TensorNameMap:
    import gguf

    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(known[architecture], blocks)

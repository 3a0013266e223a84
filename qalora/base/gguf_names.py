"""transformers' names and row order of a LLaMA-class model ↔ those of GGUF.

llama.cpp rotates neighbouring pairs of a head's rows, transformers its halves: under the architecture `llama` the rows
of q and k are stored in pairs, (half, 2) → (2, half). https://github.com/ggml-org/llama.cpp/blob/master/conversion/llama.py
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedConfig

from qalora.base.families import FAMILIES, Family, family_of
from qalora.errors import InputError

if TYPE_CHECKING:
    from gguf import TensorNameMap


def family(config: PreTrainedConfig) -> Family:
    """The family of a model.

    Raises:
        InputError: not one that is written and read here.
    """
    found = family_of(config.model_type)
    if found.gguf is None:
        readable = [model_type for model_type, family in FAMILIES.items() if family.gguf is not None]
        raise InputError(
            f"model_type={config.model_type}: GGUF is written and read for {', '.join(readable)} models only; "
            "use --format hf."
        )
    return found


def architecture(config: PreTrainedConfig) -> str:
    """GGUF's name for the architecture."""
    return str(family(config).gguf)


def gguf_name(name: str, config: PreTrainedConfig) -> str:
    """model.layers.3.self_attn.q_proj.weight → blk.3.attn_q.weight"""
    stem, _, kind = name.rpartition(".")
    return f"{_names(architecture(config), config.num_hidden_layers).get_name(stem)}.{kind}"


def is_permuted(name: str, config: PreTrainedConfig) -> bool:
    """Whether the rows of this weight or bias (or of the B of its adapter) have another order in GGUF."""
    return family(config).gguf_pairs and _projection(name) in ("q_proj", "k_proj")


def permuted(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """Rows in GGUF's order."""
    if not is_permuted(name, config):
        return tensor
    return tensor.unflatten(0, (_heads(name, config), 2, -1)).transpose(1, 2).reshape(tensor.shape)


def unpermuted(name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
    """The inverse of `permuted`."""
    if not is_permuted(name, config):
        return tensor
    return tensor.unflatten(0, (_heads(name, config), -1, 2)).transpose(1, 2).reshape(tensor.shape)


def _heads(name: str, config: PreTrainedConfig) -> int:
    return config.num_attention_heads if _projection(name) == "q_proj" else config.num_key_value_heads


def _projection(name: str) -> str:
    """model.layers.3.self_attn.q_proj[.weight] → q_proj"""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]


@lru_cache
def _names(arch: str, blocks: int) -> TensorNameMap:
    import gguf

    return gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), blocks)

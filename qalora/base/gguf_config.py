"""The config of a GGUF file's model, with what transformers leaves out when it reads one: how positions are scaled,
biases, and whether the head is tied where the tensors lie in several files.

llama.cpp computes with these keys, under ARCHITECTURE.rope. (src/llama-context.cpp, src/llama-model.cpp, ggml's
rope_yarn):

    freq_base                                θ
    scaling.type, .factor                    linear, yarn or none; linear where there is a factor alone
    scaling.original_context_length          of yarn; else context_length
    scaling.attn_factor                      what cos and sin are multiplied by, over yarn's own 1 + 0.1 ln factor
    rope_freqs.weight                        a tensor: what each frequency is divided by (Llama 3.1, or any other way)

Not read by llama.cpp for these architectures, though there are keys: yarn_beta_fast, yarn_beta_slow, yarn_attn_factor.
A model that needs them is refused.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter, RopeScalingType
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qalora.base.families import family_of
from qalora.base.gguf_names import architecture
from qalora.base.gguf_reader import GGUFReader, fast_gguf, open_shards
from qalora.errors import InputError

FREQUENCIES = "rope_freqs.weight"
# Of Llama 3.1, 3.2 and 3.3; a GGUF file has only what comes of them and of the factor.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gguf_config(folder: str | Path, gguf_file: str) -> PreTrainedConfig:
    """
    Args:
        gguf_file: the first file of a split model.

    Raises:
        InputError: a scaling of positions that would be left out in silence, or a file of a split model that is not
            there.
        OSError, ValueError, KeyError: no GGUF file of a model that transformers knows.
    """
    file = Path(folder) / gguf_file
    readers = open_shards(file)
    with fast_gguf():
        config = AutoConfig.from_pretrained(str(folder), gguf_file=gguf_file)
    if family_of(config.model_type).gguf is not None:  # the others are refused by whoever asked
        tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
        config.tie_word_embeddings = "output.weight" not in tensors
        width = readers[0].fields.get(f"{architecture(config)}.attention.key_length")
        if width is not None and hasattr(config, "head_dim"):
            config.head_dim = int(width.contents())
        if architecture(config) == "llama":
            config.attention_bias = "blk.0.attn_q.bias" in tensors
            config.mlp_bias = "blk.0.ffn_up.bias" in tensors
        config.rope_parameters = dict(config.rope_parameters) | _scaling(readers[0], tensors, config, file)
    return config


def yarn_factor(factor: float) -> float:
    """What YaRN multiplies cos and sin by where nothing else is said (arXiv 2309.00071, eq. 22)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def head_dim(config: PreTrainedConfig) -> int:
    """Of older configs, which do not say it, the share of the hidden size."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_divisors(config: PreTrainedConfig) -> np.ndarray | None:
    """(head_dim / 2,) what each frequency is divided by: Llama 3.1's scaling (arXiv 2407.21783, §3.2; transformers'
    rope type llama3), or divisors as they were read from a file; None of another type."""
    rope = config.rope_parameters
    if not _is_divided(rope):
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu")
    width = head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return (plain / scaled).float().numpy()


def add_positions(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Writes the keys from which llama.cpp computes the positions that transformers computes from the config; of Llama
    3.1's scaling the tensor is written by whoever writes tensors (`rope_divisors`).

    Raises:
        InputError: there are no such keys.
    """
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn") and not _is_divided(rope):
        raise InputError(f"rope_type={kind}: there is no GGUF form of it here; use --format hf.")
    if (share := rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise InputError(f"partial_rotary_factor={share:g}: there is no GGUF form of it here; use --format hf.")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        _add_yarn(writer, config)


def _add_yarn(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    rope, original = config.rope_parameters, config.rope_parameters["original_max_position_embeddings"]
    factor = rope["factor"] or config.max_position_embeddings / original
    frequencies, attention = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    plain = copy.deepcopy(config)
    plain.rope_parameters = dict(rope) | usual
    if not torch.equal(ROPE_INIT_FUNCTIONS["yarn"](plain, "cpu")[0], frequencies):
        asked = ", ".join(
            f"{name}={rope[name]}" for name, value in usual.items() if rope.get(name, value) not in (None, value)
        )
        raise InputError(f"rope_type=yarn with {asked}: llama.cpp knows yarn without it only; use --format hf.")
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)
    if not math.isclose(
        attention, yarn_factor(factor), rel_tol=1e-6
    ):  # of attention_factor, or mscale and mscale_all_dim
        writer.add_rope_scaling_attn_factors(attention / yarn_factor(factor))


def _scaling(reader: GGUFReader, tensors: dict[str, Any], config: PreTrainedConfig, file: Path) -> dict[str, Any]:
    """What the file says of the scaling of positions, as rope_parameters."""

    def field(name: str) -> Any:
        found = reader.fields.get(f"{architecture(config)}.rope.{name}")
        return None if found is None else found.contents()

    factor = field("scaling.factor") or field("scale_linear")
    kind = field("scaling.type") or ("linear" if factor and factor != 1 else "none")
    unscaled = kind == "none" or (kind == "linear" and factor in (None, 0, 1))
    attention = field("scaling.attn_factor")
    if attention not in (None, 1) and kind != "yarn":
        raise _unknown(file, f"{kind} with attn_factor {attention:g}")
    if FREQUENCIES in tensors and unscaled:
        return _divided(np.array(tensors[FREQUENCIES].data), config)
    if unscaled:
        return {}
    if kind == "linear" and FREQUENCIES not in tensors:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "yarn" or not factor or FREQUENCIES in tensors:
        raise _unknown(file, kind)
    own = yarn_factor(factor)
    # Converters write them, and llama.cpp does not read them all; or transformers has no setting for them.
    usual = {"attn_factor": own, "ext_factor": 1.0, "log_multiplier": 0.0, "beta_fast": 32.0, "beta_slow": 1.0}
    for name, plain in ((f"yarn_{name}", value) for name, value in usual.items()):
        value = field(f"scaling.{name}")
        if value is not None and not math.isclose(value, plain, rel_tol=1e-4):
            raise _unknown(file, f"yarn with {name} {value:g}")
    found = {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": int(
            field("scaling.original_context_length") or config.max_position_embeddings
        ),
    }
    return found | ({} if attention is None else {"attention_factor": attention * own})


def _is_divided(rope: dict[str, object]) -> bool:
    """Whether frequencies are divided by constants, whatever the length of the text, and nothing else is scaled."""
    if rope.get("rope_type") == "longrope":
        return rope["short_factor"] == rope["long_factor"] and rope.get("attention_factor") == 1.0
    return rope.get("rope_type") == "llama3"


def _divided(divisors: np.ndarray, config: PreTrainedConfig) -> dict[str, object]:
    """Llama 3.1's scaling where it has these divisors; else they themselves, for which transformers' name is
    longrope."""
    guess = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3}
    scaled = type(config)(**config.to_dict() | {"rope_parameters": dict(config.rope_parameters) | guess})
    if (known := rope_divisors(scaled)) is not None and np.allclose(known, divisors, rtol=1e-3):
        return guess
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "short_factor": divisors.tolist(),
        "long_factor": divisors.tolist(),
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def _unknown(file: Path, kind: str) -> InputError:
    return InputError(
        f"{file}: scales positions in a way ({kind}) that is not read from GGUF here; use the model's folder."
    )

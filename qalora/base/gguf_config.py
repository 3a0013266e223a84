"""The config of a GGUF file's model, and how positions are scaled in either.

llama.cpp computes with these keys, under ARCHITECTURE.rope. (src/llama-context.cpp, src/llama-model.cpp, ggml's
rope_yarn):

    dimension_count                          how much of a head is rotated
    freq_base, freq_base_swa                 θ; of blocks with a window
    scaling.type, .factor                    linear, yarn or none; linear where there is a factor alone
    scaling.original_context_length          of yarn and LongRoPE; else context_length
    scaling.attn_factor                      what cos and sin are multiplied by, over yarn's own 1 + 0.1 ln factor
    rope_freqs.weight                        a tensor: what each frequency is divided by (Llama 3.1, or any other way)
    rope_factors_long.weight, _short.weight  tensors: the same, in a long context and in a short one (LongRoPE)

Not read by llama.cpp for most architectures, though there are keys: yarn_beta_fast, yarn_beta_slow, yarn_attn_factor.
A model that needs them is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, RopeScalingType
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qalora.base.gguf_fields import BY_KIND, head_dim, head_dim_of_whole, read_fields
from qalora.base.gguf_names import gguf_of
from qalora.base.gguf_reader import open_shards
from qalora.base.structure import config_of
from qalora.errors import InputError

FREQUENCIES = "rope_freqs.weight"
FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
# Of Llama 3.1, 3.2 and 3.3; a GGUF file has only what comes of them and of the factor.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
THETA = 10000.0  # of llama.cpp, where a file does not say it
UNROTATED = 1e30  # what llama.cpp divides the frequency by of a pair that Gemma 4 does not rotate
SECTIONS = (11, 11, 10)  # of Qwen3.5, where its config does not say them


def gguf_config(folder: str | Path, gguf_file: str) -> PreTrainedConfig:
    """
    Args:
        gguf_file: the first file of a split model.

    Raises:
        InputError: no GGUF file of a model that is read here, a file of a split model that is not there, or a scaling
            of positions that would be left out in silence.
    """
    file = Path(folder) / gguf_file
    fields = read_fields(file)
    readers = open_shards(file)
    known = CONFIG_MAPPING[fields["model_type"]]().to_dict()
    extra = ("head_dim", "global_head_dim", "num_global_key_value_heads")
    config = config_of({name: value for name, value in fields.items() if name in known or name in extra}, str(file))
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    config.rope_parameters = _positions(readers[0], tensors, config, file)
    config.name_or_path = str(folder)
    return config


def yarn_factor(factor: float) -> float:
    """What YaRN multiplies cos and sin by where nothing else is said (arXiv 2309.00071, eq. 22)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


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


def position_tensors(config: PreTrainedConfig) -> dict[str, np.ndarray]:
    """The tensors of a file that `add_positions` has no keys for."""
    rope = _of_whole(config)
    if rope.get("rope_type") == "proportional":
        pairs = head_dim_of_whole(config) // 2
        rotated = int(pairs * rope.get("partial_rotary_factor", 1.0))
        return {FREQUENCIES: np.array([1.0] * rotated + [UNROTATED] * (pairs - rotated), dtype=np.float32)}
    if "longrope" in gguf_of(config).scalings and rope.get("rope_type") == "longrope":
        return {tensor: np.array(rope[name], dtype=np.float32) for name, tensor in FACTORS.items()}
    divisors = rope_divisors(config)
    return {} if divisors is None else {FREQUENCIES: divisors}


def add_positions(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Writes the keys from which llama.cpp computes the positions that transformers computes from the config.

    Raises:
        InputError: there are no such keys.
    """
    rope, record, width = _of_whole(config), gguf_of(config), head_dim(config)
    kind, alpha = rope.get("rope_type", "default"), rope.get("alpha")
    known = ("default", "linear", "yarn", *record.scalings)
    if kind == "longrope" and "llama3" in known and _is_divided(rope):
        kind = "llama3"
    if kind not in known and not (kind == "dynamic" and alpha):
        raise InputError(f"rope_type={kind}: there is no GGUF form of it here; use --format hf.")
    share = 1.0 if kind == "proportional" else rope.get("partial_rotary_factor") or 1.0
    if share != 1.0 and not record.partial:
        raise InputError(f"partial_rotary_factor={share:g}: there is no GGUF form of it here; use --format hf.")
    theta = rope["rope_theta"]
    if kind == "dynamic" and alpha:  # Hunyuan's name for a θ that is larger, whatever the length
        theta *= alpha ** (width / (width - 2))
    writer.add_rope_freq_base(theta)
    writer.add_rope_dimension_count(head_dim_of_whole(config) if kind == "proportional" else int(width * share))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        _add_yarn(writer, config, rope)
    elif kind == "longrope":
        writer.add_rope_scaling_attn_factors(ROPE_INIT_FUNCTIONS[kind](config, "cpu")[1])
    if config.model_type in BY_KIND:
        _add_windowed(writer, config, rope)
    if growth := rope.get("llama_4_scaling_beta"):
        writer.add_attn_temperature_scale(growth)
        if kind != "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config.model_type == "qwen3_5_text":  # of three axes, which are one and the same in a text
        writer.add_rope_dimension_sections([*rope.get("mrope_section", SECTIONS), 0])


def _add_windowed(writer: GGUFWriter, config: PreTrainedConfig, whole: Mapping[str, Any]) -> None:
    rope = config.rope_parameters["sliding_attention"]
    kind, theta = rope.get("rope_type", "default"), rope["rope_theta"]
    if kind != "default":
        raise InputError(f"rope_type={kind} within windows: llama.cpp scales no positions there; use --format hf.")
    if config.model_type == "gemma4_text":
        writer.add_rope_dimension_count_swa(head_dim(config))
    if gguf_of(config).architecture == "olmo2" and theta != whole["rope_theta"]:
        raise InputError(f"rope_theta={theta:g} within windows: llama.cpp has one for all blocks; use --format hf.")
    writer.add_rope_freq_base_swa(theta)


def _add_yarn(writer: GGUFWriter, config: PreTrainedConfig, rope: Mapping[str, Any]) -> None:
    original = rope["original_max_position_embeddings"]
    factor = rope["factor"] or config.max_position_embeddings / original
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    frequencies, attention = _yarn(config, rope)
    if not torch.equal(_yarn(config, {**rope, **usual})[0], frequencies):
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


def _yarn(config: PreTrainedConfig, rope: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    plain = copy.deepcopy(config)
    plain.rope_parameters = dict(rope)
    return ROPE_INIT_FUNCTIONS["yarn"](plain, "cpu")


def _of_whole(config: PreTrainedConfig) -> dict[str, Any]:
    """How positions go where a block attends to the whole text."""
    rope = config.rope_parameters
    return dict(rope["full_attention"] if config.model_type in BY_KIND else rope)


def _positions(reader: GGUFReader, tensors: dict[str, Any], config: PreTrainedConfig, file: Path) -> dict[str, Any]:
    """What the file says of positions, as rope_parameters."""
    record, width = gguf_of(config), head_dim(config)

    def field(name: str) -> Any:
        found = reader.fields.get(f"{record.architecture}.{name}")
        return None if found is None else found.contents()

    theta = field("rope.freq_base") or THETA
    whole = {"rope_theta": theta, "rope_type": "default"} | _scaling(reader, tensors, config, file)
    if record.partial:
        whole["partial_rotary_factor"] = (field("rope.dimension_count") or width) / width
    if growth := field("attention.temperature_scale"):
        whole["llama_4_scaling_beta"] = growth
    if sections := field("rope.dimension_sections"):
        whole |= {"mrope_section": [n for n in sections if n], "mrope_interleaved": True}
    if config.model_type not in BY_KIND:
        return whole
    own = theta if record.architecture == "olmo2" else THETA
    windowed = {"rope_theta": field("rope.freq_base_swa") or own, "rope_type": "default"}
    return {"full_attention": whole, "sliding_attention": windowed}


def _scaling(reader: GGUFReader, tensors: dict[str, Any], config: PreTrainedConfig, file: Path) -> dict[str, Any]:
    """What the file says of the scaling of positions, as rope_parameters."""
    record = gguf_of(config)

    def field(name: str) -> Any:
        found = reader.fields.get(f"{record.architecture}.rope.{name}")
        return None if found is None else found.contents()

    factor = field("scaling.factor") or field("scale_linear")
    kind = field("scaling.type") or ("linear" if factor and factor != 1 else "none")
    unscaled = kind == "none" or (kind == "linear" and factor in (None, 0, 1))
    attention, original = field("scaling.attn_factor"), field("scaling.original_context_length")
    if "longrope" in record.scalings and FACTORS["long_factor"] in tensors:
        return _longrope(tensors, original or config.max_position_embeddings, attention or 1.0)
    if attention not in (None, 1) and kind != "yarn":
        raise _unknown(file, f"{kind} with attn_factor {attention:g}")
    if FREQUENCIES in tensors and unscaled:
        divisors = np.array(tensors[FREQUENCIES].data)
        if "proportional" in record.scalings:
            return {"rope_type": "proportional", "partial_rotary_factor": float((divisors < UNROTATED).mean())}
        return _divided(divisors, config, field("freq_base") or THETA)
    if unscaled:
        return {}
    if kind == "linear" and FREQUENCIES not in tensors:
        return {"rope_type": "linear", "factor": float(factor)}
    if kind != "yarn" or not factor or FREQUENCIES in tensors:
        raise _unknown(file, kind)
    own = yarn_factor(factor)
    # Converters write them, and llama.cpp does not read them all; or transformers has no setting for them.
    usual = {"attn_factor": own, "ext_factor": 1.0, "log_multiplier": 0.0, "beta_fast": 32.0, "beta_slow": 1.0}
    if record.architecture == "mistral3" and (log := field("scaling.yarn_log_multiplier")):
        attention, usual["log_multiplier"] = (attention or 1.0) / (0.1 * log * math.log(factor) + 1.0), log
    for name, plain in ((f"yarn_{name}", value) for name, value in usual.items()):
        value = field(f"scaling.{name}")
        if value is not None and not math.isclose(value, plain, rel_tol=1e-4):
            raise _unknown(file, f"yarn with {name} {value:g}")
    found = {
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": int(original or config.max_position_embeddings),
    }
    return found | ({} if attention is None else {"attention_factor": attention * own})


def _longrope(tensors: Mapping[str, Any], original: int, attention: float) -> dict[str, Any]:
    factors = {name: np.array(tensors[tensor].data).tolist() for name, tensor in FACTORS.items()}
    return {
        "rope_type": "longrope",
        "attention_factor": attention,
        "original_max_position_embeddings": original,
        **factors,
    }


def _is_divided(rope: dict[str, object]) -> bool:
    """Whether frequencies are divided by constants, whatever the length of the text, and nothing else is scaled."""
    if rope.get("rope_type") == "longrope":
        return rope["short_factor"] == rope["long_factor"] and rope.get("attention_factor") == 1.0
    return rope.get("rope_type") == "llama3"


def _divided(divisors: np.ndarray, config: PreTrainedConfig, theta: float) -> dict[str, object]:
    """Llama 3.1's scaling where it has these divisors; else they themselves, for which transformers' name is
    longrope."""
    guess = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3}
    scaled = type(config)(**config.to_dict() | {"rope_parameters": {"rope_theta": theta} | guess})
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

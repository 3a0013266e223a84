"""The config of a GGUF file's model, with what transformers leaves out when it reads one: how positions are scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qalora.base.gguf_names import ARCHITECTURES, architecture
from qalora.base.gguf_reader import GGUFReader, fast_gguf
from qalora.errors import InputError

FREQUENCIES = "rope_freqs.weight"
# Of Llama 3.1, 3.2 and 3.3; a GGUF file has only what comes of them and of the factor.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def gguf_config(folder: str | Path, gguf_file: str) -> PreTrainedConfig:
    """
    Raises:
        InputError: biases or a scaling of positions that would be left out in silence.
        OSError, ValueError, KeyError: no GGUF file of a model that transformers knows.
    """
    with fast_gguf():
        config = AutoConfig.from_pretrained(str(folder), gguf_file=gguf_file)
    file = Path(folder) / gguf_file
    if config.model_type in ARCHITECTURES:  # the others are refused by whoever asked
        reader = GGUFReader(str(file))
        _check_biases(reader, config, file)
        config.rope_parameters = dict(config.rope_parameters) | _scaling(reader, config, file)
    return config


def head_dim(config: Any) -> int:
    """Of older configs, which do not say it, the share of the hidden size."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_divisors(config: Any) -> Any:
    """(head_dim / 2,) what Llama 3.1's scaling divides each frequency by (arXiv 2407.21783, §3.2; transformers' rope type
    llama3); None of another type."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    width = head_dim(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return (plain / scaled).float().numpy()


def _check_biases(reader: GGUFReader, config: PreTrainedConfig, file: Path) -> None:
    biases = [tensor.name for tensor in reader.tensors if tensor.name.endswith(".bias")]
    if biases and architecture(config) == "llama":
        raise InputError(
            f"{file}: has biases ({biases[0]}), which transformers leaves out of a llama model in GGUF; use the model's folder."
        )


def _scaling(reader: GGUFReader, config: PreTrainedConfig, file: Path) -> dict[str, Any]:
    """What the file says of the scaling of positions, as rope_parameters."""

    def field(name: str) -> Any:
        found = reader.fields.get(f"{architecture(config)}.rope.scaling.{name}")
        return None if found is None else found.contents()

    divisors = next((np.array(tensor.data) for tensor in reader.tensors if tensor.name == FREQUENCIES), None)
    kind = field("type")
    if divisors is not None:
        guess = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3}
        scaled = type(config)(**config.to_dict() | {"rope_parameters": dict(config.rope_parameters) | guess})
        if np.allclose(rope_divisors(scaled), divisors, rtol=1e-3):
            return guess
        kind = FREQUENCIES
    elif kind in (None, "none"):
        return {}
    elif kind == "linear":
        return {"rope_type": "linear", "factor": float(field("factor"))}
    elif kind == "yarn" and field("original_context_length"):
        original = int(field("original_context_length"))
        return {"rope_type": "yarn", "factor": float(field("factor")), "original_max_position_embeddings": original}
    raise InputError(
        f"{file}: scales positions in a way ({kind}) that is not read from GGUF here; use the model's folder."
    )

"""What a model is made of, by a model of transformers without weights: config.json says too little of some."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from qalora.base.families import WRAPPED, WRAPPERS, in_wrapper, refusal
from qalora.errors import InputError

BLOCKS = "model.layers."
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Structure:
    """
    Attributes:
        shapes: name → shape of every tensor that transformers saves for such a model; a tied head is none of them.
        linear: full name → (in, out) of every linear layer of the blocks, in the model's order.
        others: names of the linear layers elsewhere, which stay in 16 bits.
        architecture: the name of transformers' class.
        wrapped: whether it is the text part of a vision model, which has it under other names.
    """

    shapes: dict[str, tuple[int, ...]]
    linear: dict[str, tuple[int, int]]
    others: tuple[str, ...]
    architecture: str
    wrapped: bool = False

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """The same as `linear`, by the names that adapters have for them: the vision model's where there is one."""
        return {in_wrapper(name): io for name, io in self.linear.items()} if self.wrapped else self.linear

    def is_linear(self, tensor: str) -> bool:
        """Whether a tensor is the weight of a linear layer of a block."""
        return tensor.endswith(".weight") and tensor.removesuffix(".weight") in self.linear


UNKNOWN = Structure({}, {}, (), "")


def structure_of(config: PreTrainedConfig) -> Structure:
    model = without_weights(config)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return Structure(
        {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not (config.tie_word_embeddings and name == HEAD)
        },
        {name: (m.in_features, m.out_features) for name, m in linear.items() if name.startswith(BLOCKS)},
        tuple(name for name in linear if not name.startswith(BLOCKS)),
        type(model).__name__,
        wrapped=hasattr(config, WRAPPED),
    )


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a decoder: of a vision model, of its text part, with what holds for the whole."""
    if config.model_type not in WRAPPERS:
        return config
    text = copy.deepcopy(config.get_text_config())
    setattr(text, WRAPPED, config.model_type)
    text.tie_word_embeddings = config.tie_word_embeddings
    if stored := getattr(config, "quantization_config", None):
        text.quantization_config = stored
    return text


def config_of(fields: Mapping[str, Any], where: str) -> PreTrainedConfig:
    """The config that a config.json stands for.

    Raises:
        InputError: transformers knows no such model_type, or not with such fields.
    """
    model_type = str(fields.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        remote = " and its code lies beside its weights (auto_map), which is not run" if "auto_map" in fields else ""
        raise InputError(
            f"{where}: the model is of type {model_type}, which this transformers does not know{remote}; it would "
            "need a transformers that has it."
        )
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(dict(fields))
    except Exception as error:  # of dataclass validation, or of whatever the config computes
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: no config of a {model_type} model ({reason}).") from None
    return text_part(config)


def completed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json, with what transformers has for those that it leaves out.

    Raises:
        InputError: no config of a model that transformers knows.
    """
    return {**config_of(fields, "config.json").to_dict(), **fields}


def sizes_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `ModelShape` holds, of a model whose linear layers are not LLaMA's.

    Raises:
        InputError: no config of a model that transformers knows.
    """
    config: Any = config_of(fields, "config.json")
    found, said = structure_of(config), config.to_dict()
    sizes = {name: math.prod(shape) for name, shape in found.shapes.items()}
    tables = {name for name in sizes if ("embed" in name and "norm" not in name) or name == HEAD}
    weights = {f"{name}.weight" for name in found.linear}
    heads = config.num_attention_heads
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": max(fan_in for fan_in, fan_out in found.linear.values() if fan_out == config.hidden_size),
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": said.get("num_key_value_heads") or heads,
        "head_dim": said.get("head_dim") or config.hidden_size // heads,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "model_type": config.model_type,
        "sliding_window": said.get("sliding_window"),
        "use_qk_norm": bool(said.get("use_qk_norm")),
        "linear_key_head_dim": said.get("linear_key_head_dim"),
        "linear": tuple((name, *io) for name, io in found.adapted.items()),
        "tables": sum(sizes[name] for name in tables),
        "rest": sum(size for name, size in sizes.items() if name not in tables | weights),
    }


def check_plain(fields: Mapping[str, Any], where: str) -> None:
    """That a model_type without a record can go the plain path: a decoder whose blocks are linear layers.

    Raises:
        InputError: it cannot; with what it would need.
    """
    config = config_of(fields, where)
    kind = f"{where}: the model is of type {config.model_type}"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{kind}, which predicts no next token; it would need a causal language model of that family.")
    if found := refusal(config.to_dict()):
        raise InputError(f"{kind}, {found[0]}; it would need {found[1]}.")
    if why := _not_plain(without_weights(config)):
        raise InputError(f"{kind}, {why}.")


def _not_plain(model: Any) -> str | None:
    """What keeps a model from the plain path, and what it would need; None: nothing."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if (
        model.base_model is not getattr(model, "model", None)
        or not isinstance(layers, nn.ModuleList)
        or not len(layers)
    ):
        return "whose blocks are not at model.layers; it would need a record of where they are"
    if not all(isinstance(block, GradientCheckpointingLayer) for block in layers):
        return "whose blocks transformers cannot checkpoint; it would need a transformers that can"
    if model.get_output_embeddings() is not getattr(model, "lm_head", 0) or final_norm(model.model) is None:
        return "which does not end in one norm and lm_head; it would need a loss of its own"
    if not all(any(isinstance(module, nn.Linear) for module in block.modules()) for block in layers):
        return "with blocks that have no linear layers; it would need adapters on what they have instead"
    along = [name for name, module in layers.named_modules() if isinstance(module, nn.Conv1d)]
    if along:
        return (
            f"with convolutions along a row (model.layers.{along[0]}); it would need a record that says what carries a "
            "token's state on"
        )
    wide = [
        name
        for name, module in layers.named_modules()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1 and not isinstance(module, (nn.Linear, nn.Embedding))
    ]
    if wide:
        return (
            f"with weights that are no linear layers (model.layers.{wide[0]}); it would need adapters on such tensors"
        )
    if _alters_logits(model):
        return "which does to its logits what is not known here; it would need a record"
    return None


def _alters_logits(model: Any) -> bool:
    """Whether a causal LM, given what its decoder puts out, makes something else of it than its head and a soft cap
    do. The head is a small one in its place, and the decoder never runs.

    Args:
        model: without weights; it is of no use afterwards.
    """
    head = nn.Linear(model.lm_head.in_features, 8, bias=False, device="cpu")
    hidden = torch.linspace(-1, 1, 2 * head.in_features).view(1, 2, -1)
    model.model, model.lm_head = _PutsOut(hidden), head
    with torch.no_grad():
        try:
            found = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False).logits
        except Exception:  # its forward asks its decoder for more; the check on weights is left (kernels/loss.py)
            return False
        expected = head(hidden)
    if cap := getattr(model.config, "final_logit_softcapping", None):
        expected = (expected / cap).tanh() * cap
    return not torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


class _PutsOut(nn.Module):
    """In place of a decoder: the same last hidden states whatever it is given."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args: Any, **options: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.hidden)


def final_norm(decoder: Any) -> str | None:
    """The name of what is between the last block and the head."""
    names = [name for name, module in decoder.named_children() if "norm" in name and not name.startswith("per_layer")]
    return "norm" if "norm" in names else names[-1] if names else None


def without_weights(config: PreTrainedConfig) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)

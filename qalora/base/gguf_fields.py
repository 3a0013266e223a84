"""Metadata of a GGUF file ↔ the fields of a config.json, but for the scaling of positions (gguf_config.py). Torch-free.

One table serves both ways: a config has the fields of its own family only, and a file its keys.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qalora.base.families import FAMILIES, family_of
from qalora.errors import InputError

Said = dict[str, Any]  # key, without the architecture before it → value

KEYS = (
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("block_count", "num_hidden_layers"),
    ("feed_forward_length", "intermediate_size"),
    ("expert_shared_feed_forward_length", "shared_intermediate_size"),
    ("vocab_size", "vocab_size"),
    ("rope.scaling.original_context_length", "original_max_position_embeddings"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.key_length", "head_dim"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.layer_norm_rms_epsilon", "norm_eps"),
    ("attention.layer_norm_epsilon", "layer_norm_eps"),
    ("attention.sliding_window", "sliding_window"),
    ("attention.shared_kv_layers", "num_kv_shared_layers"),
    ("attention.scale", "attention_multiplier"),
    ("embedding_scale", "embedding_multiplier"),
    ("residual_scale", "residual_multiplier"),
    ("logit_scale", "logits_scaling"),
    ("logit_scale", "logit_scale"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("embedding_length_per_layer_input", "hidden_size_per_layer_input"),
    ("shortconv.l_cache", "conv_L_cache"),
    ("ssm.conv_kernel", "linear_conv_kernel_dim"),
    ("ssm.state_size", "linear_key_head_dim"),
    ("ssm.group_count", "linear_num_key_heads"),
    ("ssm.time_step_rank", "linear_num_value_heads"),
)
BY_KIND = ("gemma3_text", "gemma4_text", "olmo3")  # whose positions go by kinds of blocks
ROTATED = "rope.scaling.finetuned"  # whether there are positions at all, in llama.cpp's Granite
WINDOWED = "attention.sliding_window_pattern"
# Of the first block → whether the config says that there are such.
BIASES = {
    "attn_q.bias": ("attention_bias", "qkv_bias"),
    "attn_output.bias": ("attention_out_bias", "bias"),
    "ffn_up.bias": ("mlp_bias",),
}
TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


# ------------------------------------------------------------------------------------------------------- config → file


def metadata(config: Any) -> Said:
    """What a file says of a model, but for its positions."""
    said, width = vars(config), head_dim(config)
    found = {key: said[field] for key, field in KEYS if said.get(field) is not None}
    found |= {"attention.key_length": width, "attention.value_length": width}
    kinds = said.get("layer_types")
    record = family_of(config.model_type).gguf
    if record is not None and record.windows and kinds:
        found[WINDOWED] = [kind == "sliding_attention" for kind in kinds]
    special = {
        "lfm2": _of_lfm2, "qwen3_5_text": _of_qwen3_5, "gemma4_text": _of_gemma4, "granitemoehybrid": _of_granite4,
    }.get(config.model_type)  # fmt: skip
    return found | (special(config) if special else {})


def head_dim(config: Any) -> int:
    """Of older configs, which do not say it, the share of the hidden size; of Gemma 4, within windows."""
    return vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads


def _of_lfm2(config: Any) -> Said:
    """A block without attention is one without heads of keys."""
    heads = config.num_key_value_heads
    return {"attention.head_count_kv": [heads if kind == "full_attention" else 0 for kind in config.layer_types]}


def _of_qwen3_5(config: Any) -> Said:
    whole = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    return {
        "full_attention_interval": whole[0] + 1,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
    }


def _of_granite4(config: Any) -> Said:
    """Without experts the MLP is the one that all tokens share."""
    return {
        "feed_forward_length": config.shared_intermediate_size,
        ROTATED: config.position_embedding_type == "rope",
    }


def _of_gemma4(config: Any) -> Said:
    """The widths of whole attention go by the plain keys, those of windows by keys of their own."""
    windowed = [kind == "sliding_attention" for kind in config.layer_types]
    blocks = range(config.num_hidden_layers)
    shared = config.num_hidden_layers - config.num_kv_shared_layers
    wide = 2 if config.use_double_wide_mlp else 1
    whole, narrow = head_dim_of_whole(config), head_dim(config)
    return {
        "feed_forward_length": [config.intermediate_size * (wide if i >= shared else 1) for i in blocks],
        "attention.head_count_kv": [_of_block(config, i, "num_key_value_heads") for i in blocks],
        "attention.key_length": whole,
        "attention.value_length": whole,
        "attention.key_length_swa": narrow,
        "attention.value_length_swa": narrow,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
        WINDOWED: windowed,
    }


def head_dim_of_whole(config: Any) -> int:
    """Of Gemma 4, whose heads differ in width where they attend to the whole text, as the last block does."""
    return _of_block(config, config.num_hidden_layers - 1, "head_dim")


def _of_block(config: Any, block: int, field: str) -> int:
    own = config.to_dict().get("per_layer_config") or {}
    return int(own.get(str(block), {}).get(field, vars(config)[field]))


# ------------------------------------------------------------------------------------------------------- file → config


def read_fields(file: Path) -> dict[str, Any]:
    """The fields of the config of a model, its positions unscaled.

    Args:
        file: its first file.

    Raises:
        InputError: not a GGUF file, or not one of a model that is read here.
    """
    from qalora.base.gguf_reader import open_shards

    readers = open_shards(file)
    stored = readers[0].fields
    said = {key: field.contents() for key, field in stored.items() if not key.startswith("tokenizer.")}
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    try:
        architecture = said["general.architecture"]
        own = {key.removeprefix(f"{architecture}."): value for key, value in said.items()}
        rows = {"vocab_size": int(tensors["token_embd.weight"].shape[1])}
        fields = _fields(model_type_of(architecture, own, str(file)), own | rows, tensors)
    except (LookupError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not a GGUF file of a LLaMA-class model ({error}).") from None
    found = {ours: stored.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in TOKENS.items()}
    ids = {name: None if field is None else field.contents() for name, field in found.items()}
    return fields | {"tie_word_embeddings": "output.weight" not in tensors} | ids


def model_type_of(architecture: str, own: Mapping[str, Any], where: str) -> str:
    """The model_type of the models that a GGUF architecture is written of.

    Raises:
        InputError: none that is read from GGUF here.
    """
    records = {model_type: family.gguf for model_type, family in FAMILIES.items() if family.gguf}
    known = [model_type for model_type, record in records.items() if record.architecture == architecture]
    if not known:
        readable = ", ".join(dict.fromkeys(record.architecture for record in records.values()))
        raise InputError(
            f"{where}: a GGUF file of architecture {architecture}, which is not read here ({readable} are); use the "
            "model's folder."
        )
    second = {
        "olmo2": own.get("attention.sliding_window"),
        "granite": "expert_shared_feed_forward_length" in own or own.get(ROTATED) is False,
    }
    return known[bool(second.get(architecture))]


def _fields(model_type: str, own: Said, tensors: Collection[str]) -> dict[str, Any]:
    needed = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
    if missing := [key for key, field in KEYS if field in needed and key not in own]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    fields = {field: own[key] for key, field in KEYS if key in own}
    fields |= {"model_type": model_type, "head_dim": head_dim_of(own)}
    fields["num_key_value_heads"] = own.get("attention.head_count_kv", own["attention.head_count"])
    fields["sliding_window"] = None if model_type == "llama" else own.get("attention.sliding_window") or None
    if (factor := own.get("rope.scaling.factor")) and model_type not in BY_KIND:
        kind, original = own.get("rope.scaling.type", "linear"), own.get("rope.scaling.original_context_length")
        fields["rope_scaling"] = {"type": kind, "factor": factor, "original_max_position_embeddings": original}
    if any(name.startswith("blk.0.") for name in tensors):
        for tensor, named in BIASES.items():
            fields |= dict.fromkeys(named, f"blk.0.{tensor}" in tensors)
    if isinstance(pattern := own.get(WINDOWED), list):
        fields["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in pattern]
    special = {
        "gemma2": _to_gemma, "gemma3_text": _to_gemma, "gemma4_text": _to_gemma4, "lfm2": _to_lfm2,
        "qwen3_5_text": _to_qwen3_5, "granitemoehybrid": _to_granite4,
    }.get(model_type)  # fmt: skip
    return fields | (special(own, tensors) if special else {})


def head_dim_of(own: Mapping[str, Any]) -> int:
    return int(own.get("attention.key_length") or own["embedding_length"] // own["attention.head_count"])


def pre_attention_scalar(model_type: str, blocks: int, hidden: int, heads: int, width: int) -> int:
    """Whose root llama.cpp divides the logits of attention by in Gemma 2 and 3: there is no key for it."""
    largest = {"gemma2": 46, "gemma3_text": 62}[model_type]  # the blocks of the models of 27B
    return hidden // heads if blocks == largest else width


def _to_gemma(own: Said, tensors: Collection[str]) -> dict[str, Any]:
    sizes = (own["block_count"], own["embedding_length"], own["attention.head_count"], head_dim_of(own))
    scalar = pre_attention_scalar("gemma2" if "attn_logit_softcapping" in own else "gemma3_text", *sizes)
    # Without windows all blocks attend to the whole text.
    whole = {} if own.get("attention.sliding_window") else {"layer_types": ["full_attention"] * own["block_count"]}
    return {"query_pre_attn_scalar": scalar} | whole


def _to_lfm2(own: Said, tensors: Collection[str]) -> dict[str, Any]:
    heads = own["attention.head_count_kv"]
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if n else "conv" for n in heads],
        "block_auto_adjust_ff_dim": False,  # its width is the one that the file says
    }


def _to_qwen3_5(own: Said, tensors: Collection[str]) -> dict[str, Any]:
    whole = [f"blk.{i}.attn_q.weight" in tensors for i in range(own["block_count"])]
    return {
        "linear_value_head_dim": own["ssm.inner_size"] // own["ssm.time_step_rank"],
        "layer_types": ["full_attention" if attends else "linear_attention" for attends in whole],
    }


def _to_granite4(own: Said, tensors: Collection[str]) -> dict[str, Any]:
    """Of all kinds of blocks the one, and no experts."""
    return {
        "shared_intermediate_size": own["feed_forward_length"],
        "position_embedding_type": "rope" if own.get(ROTATED, True) else None,
        "layer_types": ["full_attention"] * own["block_count"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 1,  # which there are none of; the default need not divide the hidden size
    }


def _to_gemma4(own: Said, tensors: Any) -> dict[str, Any]:
    windowed, widths, heads = own[WINDOWED], own["feed_forward_length"], own["attention.head_count_kv"]
    widths = widths if isinstance(widths, list) else [widths]
    heads = heads if isinstance(heads, list) else [heads] * len(windowed)
    whole = windowed.index(False)
    inputs = own["embedding_length_per_layer_input"]
    return {
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "head_dim": own["attention.key_length_swa"],
        "global_head_dim": own["attention.key_length"],
        "num_key_value_heads": heads[windowed.index(True)] if True in windowed else heads[0],
        "num_global_key_value_heads": heads[whole],
        "attention_k_eq_v": f"blk.{whole}.attn_v.weight" not in tensors,
        "vocab_size_per_layer_input": int(tensors["per_layer_token_embd.weight"].shape[1]) if inputs else 0,
    }

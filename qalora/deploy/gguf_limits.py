"""What llama.cpp takes for granted of a model, with no key for it: a file of another would answer otherwise there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import isclose
from typing import Any

from qalora.base.gguf_fields import head_dim, pre_attention_scalar
from qalora.base.gguf_names import gguf_of
from qalora.errors import InputError

WITH_BIASES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "norm", "q_norm", "k_norm")


def check_written(config: Any, names: Iterable[str]) -> None:
    """
    Args:
        config: of the decoder.
        names: of its tensors.

    Raises:
        InputError: llama.cpp computes something else than the model; with what.
    """
    if (found := next(_limits(config, set(names)), None)) is not None:
        asked, given = found
        raise InputError(f"{config.model_type} with {asked}: llama.cpp {given}; use --format hf.")


def _limits(config: Any, names: set[str]) -> Iterator[tuple[str, str]]:
    """(What the model has, what llama.cpp has instead) for each thing that differs."""
    record = gguf_of(config)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", record.activation)
    if activation != record.activation:
        yield f"hidden_act={activation}", f"computes {record.activation} there"
    width = head_dim(config) * config.num_attention_heads
    if record.square and width != config.hidden_size:
        yield f"heads of {head_dim(config)}", f"has them {config.hidden_size // config.num_attention_heads} wide"
    tied = config.tie_word_embeddings
    if record.head is not None and tied != (record.head == "tied"):
        given = "takes the embeddings for the head" if record.head == "tied" else "needs a head of its own"
        yield f"tie_word_embeddings={str(tied).lower()}", given
    linear = {name.removesuffix(".bias").rpartition(".")[2] for name in names if name.endswith(".bias")}
    if beyond := sorted(linear - {*WITH_BIASES, *record.biases}):
        yield f"a bias of {beyond[0]}", "has none there"
    yield from SPECIAL.get(config.model_type, lambda config: iter(()))(config)


def _gemma1(config: Any) -> Iterator[tuple[str, str]]:
    if config.use_bidirectional_attention:
        yield f"use_bidirectional_attention={config.use_bidirectional_attention}", "attends to the past only"


def _gemma(config: Any) -> Iterator[tuple[str, str]]:
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, head_dim(config))
    scale = pre_attention_scalar(config.model_type, *sizes)
    if not isclose(config.query_pre_attn_scalar, scale):
        yield f"query_pre_attn_scalar={config.query_pre_attn_scalar}", f"divides by √{scale} there"
    yield from _gemma1(config)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.model_type == "gemma2" and getattr(config, name) is None:
            yield f"{name}=null", "caps them always"
    if config.model_type == "gemma3_text" and config.attn_logit_softcapping is not None:
        yield f"attn_logit_softcapping={config.attn_logit_softcapping:g}", "caps none there"


def _gemma4(config: Any) -> Iterator[tuple[str, str]]:
    inputs = config.hidden_size_per_layer_input and config.vocab_size_per_layer_input
    if inputs and inputs != config.vocab_size:
        yield f"vocab_size_per_layer_input={inputs}", f"has as many as there are embeddings ({config.vocab_size})"
    if config.layer_types[-1] != "full_attention":
        yield "a window in its last block", "has the whole text there"
    if config.use_bidirectional_attention == "all":
        yield "use_bidirectional_attention=all", "attends to the past only"


def _smollm3(config: Any) -> Iterator[tuple[str, str]]:
    if config.no_rope_layers != [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]:
        yield "no_rope_layers of another pattern", "rotates in all blocks but every 4th"


def _exaone4(config: Any) -> Iterator[tuple[str, str]]:
    if bool(config.sliding_window) != (config.num_hidden_layers == 64):
        windows = "" if config.sliding_window else "no "
        yield f"{windows}windows in {config.num_hidden_layers} blocks", "has windows where there are 64, and only there"


def _cohere(config: Any) -> Iterator[tuple[str, str]]:
    if config.use_qk_norm != (config.num_hidden_layers >= 64):
        has = f"use_qk_norm={str(config.use_qk_norm).lower()} and {config.num_hidden_layers} blocks"
        yield has, "has such norms from 64 blocks on, and only there"


def _cohere2(config: Any) -> Iterator[tuple[str, str]]:
    if not config.sliding_window:
        yield "no sliding_window", "needs one"


def _qwen3_5(config: Any) -> Iterator[tuple[str, str]]:
    kinds, every = config.layer_types, config.layer_types.index("full_attention") + 1
    if kinds != [("full_attention" if (i + 1) % every == 0 else "linear_attention") for i in range(len(kinds))]:
        yield "layer_types of no regular pattern", f"has whole attention in every {every}th block"
    if config.linear_key_head_dim != config.linear_value_head_dim:
        yield "keys and values of different widths", "has one width for both"


SPECIAL: dict[str, Any] = {
    "gemma": _gemma1,
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "gemma4_text": _gemma4,
    "smollm3": _smollm3,
    "exaone4": _exaone4,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "qwen3_5_text": _qwen3_5,
}

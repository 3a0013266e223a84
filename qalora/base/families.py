"""What a model family is: one record each, and the only place that knows. Torch-free.

A family is *fused* as far as its record names classes of transformers that our kernels stand in for, and *plain*
elsewhere: then its own forward runs, with our low-rank layers and our loss. A model_type without a record is plain
throughout, if its blocks are linear layers (structure.py looks). docs/adding-a-model-family.md says what a new one
needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

WRAPPED = "wrapped_in"  # a field of a text part's config: the model_type of the vision model around it
# The linear layers of a block of LLaMA's make.
BLOCK_MAPS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip

# How an RMSNorm weighs what it has normed, n, in 16 bits:
#   after     w · round(n)
#   before    round(w · n)
#   plus_one  round((1 + w) · n)
Weighing = Literal["after", "before", "plus_one"]


@dataclass(frozen=True)
class Gguf:
    """How GGUF files have a family, and what llama.cpp computes of it.

    Attributes:
        architecture: general.architecture.
        pairs: the rows of q and k are stored in neighbouring pairs, as llama.cpp rotates them there.
        partial: it rotates a share of each head, where that is asked.
        scalings: rope types that it has a tensor for, beside linear and yarn.
        windows: it has sliding windows; elsewhere it attends to the whole text.
        square: all heads together have to be as wide as the hidden size.
        head: the head is the embeddings ("tied"), or has a matrix of its own ("own"); None: either.
        activation: of the MLP.
        biases: linear layers that it adds a bias to, beside q, k and v.
    """

    architecture: str
    pairs: bool = False
    partial: bool = False
    scalings: tuple[str, ...] = ()
    windows: bool = False
    square: bool = False
    head: Literal["tied", "own"] | None = None
    activation: str = "silu"
    biases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kept:
    """What a block keeps for its backward otherwise than LLaMA's, where transformers' own forward runs.

    Attributes:
        norm: fp32 tensors as wide as what a norm reads, of a norm that is no kernel of ours.
        normed_v: values have a norm too.
        copied: attention's output is copied, for heads that were rotated in part lie otherwise.
        expanded: each block makes cosines and sines of its own.
        rotations: pairs of cosines and sines of the model, for blocks that rotate otherwise.
        gradients: of the hidden size, beside the one that goes into the MLP's backward.
        activation: tensors of the MLP's inner width that its activation keeps, or puts out.
        signs: bytes beside each element of them, of where the activation takes another form.
        inner_gradients: of that width at the worst moment of the activation's backward, beside the product's.
    """

    norm: int = 0
    normed_v: bool = False
    copied: bool = False
    expanded: bool = False
    rotations: int = 1
    gradients: int = 0
    activation: int = 1
    signs: int = 0
    inner_gradients: int = 1


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        norm: transformers' class of its RMSNorms; None: another norm, which stays as it is.
        weighing: of that norm.
        mlp: transformers' class of an MLP that is down(silu(gate x) ∘ up x), and nothing more.
        mlp_normed: whether a norm reads what the MLP puts out, so that a block's second run needs it.
        attention: transformers' class of an attention that rotates halves of whole heads and has nothing between the
            linear layers and the rotation.
        norms: of a block, (how many over the hidden size, and whether q and k have one over each head, or over their
            whole width).
        copies_qk: whether q and k are there twice, before and after something else than a norm.
        kept: of its blocks, what the plan of a step counts.
        eager: attention is more than torch's fused one computes.
        across_rows: what carries a token's state on otherwise than by attention, so that rows can neither be packed nor
            share prefixes.
        logits: field of config.json → whether logits are divided by it, or multiplied.
        gguf: how GGUF files have it; None: none is written or read.
        attention_bias: whether q, k and v have biases where config.json does not say.
        tied: whether the head is the embeddings where config.json does not say.
    """

    norm: str | None = None
    weighing: Weighing = "after"
    mlp: str | None = None
    mlp_normed: bool = False
    attention: str | None = None
    norms: tuple[int, Literal["", "head", "width"]] = (2, "")
    copies_qk: bool = False
    kept: Kept = Kept()
    eager: bool = False
    across_rows: str | None = None
    logits: tuple[str, Literal["divided", "multiplied"]] | None = None
    gguf: Gguf | None = None
    attention_bias: bool = False
    tied: bool = False


EVERY_BIAS = ("o_proj", "gate_proj", "up_proj", "down_proj")
GELU = "gelu_pytorch_tanh"
LLAMA = Gguf("llama", pairs=True, scalings=("llama3",), biases=EVERY_BIAS)
GRANITE = Gguf("granite", pairs=True, scalings=("llama3",), biases=EVERY_BIAS)

# model_type of config.json → its family.
FAMILIES = {
    "llama": Family("LlamaRMSNorm", mlp="LlamaMLP", attention="LlamaAttention", gguf=LLAMA),
    "mistral": Family("MistralRMSNorm", mlp="MistralMLP", attention="MistralAttention", gguf=LLAMA),
    "ministral": Family("MinistralRMSNorm", mlp="MinistralMLP", attention="MinistralAttention", gguf=LLAMA),
    "ministral3": Family(
        "Ministral3RMSNorm", mlp="Ministral3MLP", gguf=Gguf("mistral3", pairs=True, biases=EVERY_BIAS)
    ),
    "qwen2": Family(
        "Qwen2RMSNorm", mlp="Qwen2MLP", attention="Qwen2Attention", attention_bias=True,
        gguf=Gguf("qwen2", square=True),
    ),
    "qwen3": Family("Qwen3RMSNorm", mlp="Qwen3MLP", norms=(2, "head"), gguf=Gguf("qwen3")),
    "qwen3_5_text": Family(
        "Qwen3_5RMSNorm", "plus_one", mlp="Qwen3_5MLP", norms=(2, "head"),
        across_rows="gated delta nets, whose state runs along a row", gguf=Gguf("qwen35", partial=True),
    ),
    "smollm3": Family("SmolLM3RMSNorm", mlp="SmolLM3MLP", tied=True, gguf=Gguf("smollm3", pairs=True)),
    "granite": Family(
        "GraniteRMSNorm", mlp="GraniteMLP", attention="GraniteAttention", kept=Kept(gradients=1),
        logits=("logits_scaling", "divided"), gguf=GRANITE,
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridRMSNorm", kept=Kept(gradients=1), logits=("logits_scaling", "divided"), tied=True,
        across_rows="masks that tell no packed rows apart", gguf=GRANITE,
    ),
    "phi3": Family(
        "Phi3RMSNorm", copies_qk=True, kept=Kept(copied=True),
        gguf=Gguf("phi3", partial=True, scalings=("longrope",), square=True),
    ),
    "gemma": Family(
        "GemmaRMSNorm", "plus_one", attention="GemmaAttention", tied=True,
        gguf=Gguf("gemma", head="tied", activation=GELU),
    ),
    "gemma2": Family(
        "Gemma2RMSNorm", "plus_one", norms=(4, ""), eager=True, tied=True,
        gguf=Gguf("gemma2", windows=True, head="tied", activation=GELU),
    ),
    "gemma3_text": Family(
        "Gemma3RMSNorm", "plus_one", norms=(4, "head"), kept=Kept(rotations=2), tied=True,
        gguf=Gguf("gemma3", windows=True, activation=GELU)
    ),
    "gemma4_text": Family(
        "Gemma4RMSNorm", "before", norms=(4, "head"), kept=Kept(normed_v=True, rotations=2), tied=True,
        gguf=Gguf("gemma4", scalings=("proportional",), windows=True, activation=GELU),
    ),
    "olmo2": Family(
        "Olmo2RMSNorm", "before", mlp="Olmo2MLP", mlp_normed=True, norms=(2, "width"),
        gguf=Gguf("olmo2", square=True, head="own"),
    ),
    "olmo3": Family(
        "Olmo3RMSNorm", "before", mlp="Olmo3MLP", mlp_normed=True, norms=(2, "width"), kept=Kept(rotations=2),
        gguf=Gguf("olmo2", windows=True, square=True, head="own"),
    ),
    "glm4": Family(
        "Glm4RMSNorm", norms=(4, ""), kept=Kept(copied=True, expanded=True), attention_bias=True,
        gguf=Gguf("glm4", partial=True),
    ),
    "seed_oss": Family("SeedOssRMSNorm", attention_bias=True, gguf=Gguf("seed_oss")),
    "ernie4_5": Family(
        "Ernie4_5RMSNorm", mlp="Ernie4_5MLP", kept=Kept(expanded=True), tied=True, gguf=Gguf("ernie4_5")
    ),
    "exaone4": Family(
        "Exaone4RMSNorm", mlp="Exaone4MLP", mlp_normed=True, norms=(2, "head"),
        gguf=Gguf("exaone4", scalings=("llama3",), windows=True, square=True),
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1RMSNorm", mlp="HunYuanDenseV1MLP", norms=(2, "head"), gguf=Gguf("hunyuan-dense")
    ),
    "cohere": Family(
        None, mlp="CohereMLP", norms=(1, ""), kept=Kept(norm=2), logits=("logit_scale", "multiplied"), tied=True,
        gguf=Gguf("command-r", square=True, head="tied"),
    ),
    "cohere2": Family(
        None, mlp="Cohere2MLP", norms=(1, ""), kept=Kept(norm=2), logits=("logit_scale", "multiplied"), tied=True,
        gguf=Gguf("cohere2", windows=True, square=True, head="tied"),
    ),
    "lfm2": Family(
        "Lfm2RMSNorm", norms=(2, "head"), tied=True, across_rows="short convolutions, which run along a row",
        gguf=Gguf("lfm2", square=True),
    ),
    "apertus": Family(
        "ApertusRMSNorm", norms=(2, "head"), kept=Kept(activation=3, signs=1, inner_gradients=3),
        gguf=Gguf("apertus", scalings=("llama3",), head="own", activation="xielu", biases=("o_proj",)),
    ),
    "arcee": Family(
        "ArceeRMSNorm", attention="ArceeAttention", kept=Kept(inner_gradients=2),
        gguf=Gguf("arcee", pairs=True, scalings=("llama3",), activation="relu2"),
    ),
    "internlm3": Family("LlamaRMSNorm", mlp="LlamaMLP", attention="LlamaAttention", gguf=LLAMA),
}  # fmt: skip
PLAIN = Family()
# Architectures of GGUF files that transformers reads with all that makes the family.
GGUF_OF_TRANSFORMERS = ("llama", "qwen2", "qwen3", "qwen35", "lfm2")

# ------------------------------------------------------------------------------- vision models with a decoder inside

# model_type of a vision model → whether its head is the embeddings where config.json does not say.
WRAPPERS = {"gemma3": True, "gemma4": True, "mistral3": True, "qwen3_5": False}
TEXT = "language_model"  # what all of them call the decoder


def is_wrapper(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a vision model, of which the text part is trained."""
    return fields.get("model_type") in WRAPPERS and isinstance(fields.get("text_config"), Mapping)


def text_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json of a decoder: of a vision model, of its text part, whose head is tied as the whole says."""
    if not is_wrapper(fields):
        return fields
    tied = fields.get("tie_word_embeddings")
    tied = WRAPPERS[fields["model_type"]] if tied is None else tied
    return {**fields["text_config"], "tie_word_embeddings": tied, WRAPPED: fields["model_type"]}


def in_wrapper(name: str) -> str:
    """The name of a module or tensor of a decoder, as the vision model around it has it:
    model.norm → model.language_model.norm"""
    return f"model.{TEXT}.{name.removeprefix('model.')}" if name.startswith("model.") else name


# What names of a decoder begin with in a vision model and in its files, which older versions wrote otherwise → in the
# decoder's own.
NAMES = {rf"^(model\.{TEXT}|{TEXT}\.model)\.": "model.", rf"^{TEXT}\.lm_head\.": "lm_head."}


def in_decoder(name: str) -> str:
    """The inverse of `in_wrapper`, of names in files too. What is of no decoder stays as it is."""
    for pattern, own in NAMES.items():
        name = re.sub(pattern, own, name)
    return name


def family_of(model_type: str | None) -> Family:
    """The record of a model_type, or that of the plain path."""
    return FAMILIES.get(model_type or "", PLAIN)


# -------------------------------------------------------------------------------------- what cannot be trained, by name

EXPERTS = (
    "a mixture of experts, whose experts are one tensor of three dimensions and no linear layers",
    "adapters on such tensors, and 4-bit weights of them",
)
TWO_STACKS = ("an encoder-decoder", "a loss and batches for two stacks")
STATE_SPACE = (
    "a state-space model, whose kernels read weights past the linear layers",
    "kernels that add adapters there",
)
NOT_CAUSAL = ("a model that predicts no next token", "a causal language model of the same family")

REFUSED = {
    name: why
    for names, why in (
        (
            "mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_moe qwen3_5_moe_text gpt_oss llama4 llama4_text "
            "deepseek_v2 deepseek_v3 deepseek_v32 dbrx granitemoe granitemoeshared olmoe phimoe "
            "ernie4_5_moe glm4_moe hunyuan_v1_moe lfm2_moe jamba minimax cohere2_moe exaone_moe",
            EXPERTS,
        ),
        (
            "t5 mt5 umt5 longt5 t5gemma t5gemma2 bart mbart pegasus marian m2m_100 led prophetnet blenderbot whisper "
            "encoder_decoder switch_transformers nllb_moe",
            TWO_STACKS,
        ),
        ("mamba mamba2 falcon_mamba rwkv xlstm", STATE_SPACE),
        ("bert roberta xlm_roberta distilbert deberta deberta_v2 electra modernbert albert", NOT_CAUSAL),
    )
    for name in names.split()
}
# Fields of config.json that count experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def refusal(fields: Mapping[str, Any]) -> tuple[str, str] | None:
    """(What a model is that cannot be trained here, what it would need), by its config.json; None: it may be."""
    model_type = fields.get("model_type")
    if model_type in REFUSED:
        return REFUSED[str(model_type)]
    if any(isinstance(fields.get(name), int) and fields[name] > 1 for name in EXPERT_COUNTS):
        return EXPERTS
    kinds = fields.get("layer_types") or ()
    if "mamba" in kinds or (model_type == "granitemoehybrid" and (not kinds or "linear_attention" in kinds)):
        return STATE_SPACE
    if fields.get("is_encoder_decoder"):
        return TWO_STACKS
    return None

"""What a model family is: one record each, and the only place that knows. Torch-free.

Every family here is a decoder of LLaMA's arithmetic: the same linear layers per block, RMSNorm, SwiGLU, rotated halves
of heads. docs/adding-a-model-family.md says what another one needs.
"""

from __future__ import annotations

from dataclasses import dataclass

# The linear layers of a block.
BLOCK_MAPS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        attention: transformers' class of a block's attention, which rotates halves of whole heads and has nothing
            between the linear layers and the rotation.
        gguf: general.architecture of its GGUF files.
        gguf_pairs: whether these store the rows of q and k in neighbouring pairs, as llama.cpp rotates them.
        attention_bias: whether q, k and v have biases where config.json does not say.
    """

    attention: str
    gguf: str
    gguf_pairs: bool
    attention_bias: bool = False


# model_type of config.json → its family.
FAMILIES = {
    "llama": Family("LlamaAttention", "llama", gguf_pairs=True),
    "mistral": Family("MistralAttention", "llama", gguf_pairs=True),
    "qwen2": Family("Qwen2Attention", "qwen2", gguf_pairs=False, attention_bias=True),
}

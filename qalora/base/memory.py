"""Memory of a fine-tuning run, by term, as pure arithmetic over shapes. No torch.

Weights, quantization constants, adapter, gradients and moments are exact counts of the tensors' bytes; activations
are estimates of the tensors alive at the peak of one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from qalora.base.registry import ModelShape

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
QUANT_BLOCK = 64  # weights that share one absmax in NF4
STATE_BLOCK = 256  # absmax values, or 8-bit optimizer states, that share one fp32 constant
MIN_8BIT = 4096  # bitsandbytes keeps fp32 moments for smaller tensors
LOGITS_CHUNK = 64 * 2**20  # of fp32 logits; the loss holds three such buffers
CUDA_CONTEXT = 500 * 2**20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by term."""

    terms: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.terms.values())


def plan_memory(
    shape: ModelShape,
    *,
    ranks: int | Mapping[str, int] = 8,
    micro_batch_size: int = 1,
    seq_len: int = 512,
    load_in_4bit: bool = True,
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    optim: str = "adamw_torch",
    gradient_checkpointing: bool = True,
    device: str = "cuda",
) -> MemoryPlan:
    """Bytes by term of one training step.

    Args:
        shape: the base.
        ranks: of every module, or full module name → rank.
        micro_batch_size: rows a forward.
        seq_len: tokens a row.
        device: cuda adds the context's own memory.
    """
    size, maps = DTYPE_BYTES[compute_dtype], shape.linear_maps()
    rank_of = ranks if isinstance(ranks, Mapping) else dict.fromkeys(maps, ranks)
    adapters = [matrix for name, io in maps.items() for matrix in _matrices(rank_of.get(name, 0), *io)]
    tables = 1 if shape.tie_word_embeddings else 2
    q = shape.num_attention_heads * shape.head_dim
    kv = shape.num_key_value_heads * shape.head_dim
    biases = (q + 2 * kv) * shape.num_hidden_layers if shape.attention_bias else 0
    tokens = micro_batch_size * seq_len
    block_inputs = tokens * shape.hidden_size * size
    # Alive inside one block: normed inputs, q/k/v, attention output, gate, up, their product, and the residuals, in
    # the compute dtype, once for the forward and once as gradients of the widest; updates of the adapters are fp32.
    inside = tokens * size * (4 * shape.hidden_size + 2 * q + 2 * kv + 4 * shape.intermediate_size)
    update = tokens * 4 * (shape.intermediate_size + shape.hidden_size)
    widest = max(i * o for i, o in maps.values()) * size if load_in_4bit else 0
    blocks = shape.num_hidden_layers
    terms = {
        "4-bit weights" if load_in_4bit else "weights": sum(
            (i * o + 1) // 2 if load_in_4bit else i * o * size for i, o in maps.values()
        ),
        "quantization constants": sum(_constants(i * o, double_quant) for i, o in maps.values()) if load_in_4bit else 0,
        "embeddings and head": tables * shape.vocab_size * shape.hidden_size * size,
        "norms and biases": ((2 * blocks + 1) * shape.hidden_size + biases) * size,
        "adapter": 4 * sum(adapters),
        "gradients": 4 * sum(adapters),
        "optimizer moments": sum(_moments(n, optim) for n in adapters),
        "checkpoints": block_inputs * blocks if gradient_checkpointing else inside * (blocks - 1),
        "block working set": inside + update + widest,
        "logits chunk": 3 * min(LOGITS_CHUNK, 4 * tokens * shape.vocab_size),
        "CUDA context": CUDA_CONTEXT if device == "cuda" else 0,
    }
    return MemoryPlan({name: size for name, size in terms.items() if size})


def _matrices(rank: int, fan_in: int, fan_out: int) -> tuple[int, ...]:
    return (rank * fan_in, fan_out * rank) if rank else ()


def _constants(weights: int, double_quant: bool) -> int:
    """Of one 4-bit map: its absmax values in fp32, or in uint8 with fp32 constants and an offset, and its code tables."""
    blocks = ceil(weights / QUANT_BLOCK)
    nested = blocks + 4 * ceil(blocks / STATE_BLOCK) + 4 + 4 * 256
    return 4 * 16 + (nested if double_quant else 4 * blocks)


def _moments(elements: int, optim: str) -> int:
    """Both moments of one tensor."""
    if optim.endswith("8bit") and elements >= MIN_8BIT:
        return 2 * (elements + 4 * ceil(elements / STATE_BLOCK))
    return 2 * 4 * elements

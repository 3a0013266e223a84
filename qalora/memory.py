"""Memory of a fine-tuning run, by term, as pure arithmetic over shapes. No torch.

Weights, quantization constants, adapter, gradients and moments are exact counts of the tensors' bytes. Activations are
the tensors alive at the worst moment of a step: while the last block's MLP, its first map or its attention goes
backward, or while the loss is formed, whichever is more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from qalora.base.registry import ModelShape
from qalora.block_memory import FP32, MicroBatch, beside_blocks, blocks_of, layers_of
from qalora.sizes import LOGITS_CHUNK, OVERSAMPLING, QUANT_BLOCK

# What a step keeps of its blocks: all; block inputs and what maps put out; block inputs; those, in host memory.
Checkpointing = bool | Literal["selective", "offload"]

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
STATE_BLOCK = 256  # absmax values, or 8-bit optimizer states, that share one fp32 constant
MIN_8BIT = 4096  # bitsandbytes keeps fp32 moments for smaller tensors
CUDA_CONTEXT = 500 * 2**20
KEPT = "checkpoints", "kept by the blocks"  # the terms of what blocks keep, with and without checkpointing
GONE = "gone before gradients are whole"  # of that: a term below zero


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by term, on the device, and of host memory that a step takes beside it: block inputs that wait there."""

    terms: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        return sum(self.terms.values())


def plan_memory(
    shape: ModelShape,
    *,
    ranks: int | Mapping[str, int] = 8,
    micro_batch_size: int = 1,
    gradient_accumulation_steps: int = 1,
    seq_len: int = 512,
    load_in_4bit: bool = True,
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    optim: str = "adamw_torch",
    gradient_checkpointing: Checkpointing = True,
    mlp_tile: int | None = None,
    dropout: float = 0.0,
    directions: int = 0,
    packed: bool = False,
    device: str = "cuda",
    processes: int = 1,
) -> MemoryPlan:
    """Bytes by term of one training step, and what a start along the gradient takes beyond them.

    Args:
        shape: the base.
        ranks: of every module, or full module name → rank.
        micro_batch_size: rows a forward.
        gradient_accumulation_steps: forwards an optimizer step; from the second on there are earlier gradients to add
            to.
        seq_len: tokens a row.
        gradient_checkpointing: "selective" keeps the outputs of maps beside the block inputs; "offload" keeps the
            inputs in host memory, all but two.
        mlp_tile: tokens of a row that an MLP works on at a time; None: all, and so it is with dropout.
        dropout: of the adapters' inputs.
        directions: of ∂L/∂W that are looked for in every module before the first step.
        packed: a row holds several texts, which attention tells apart by a mask over all pairs of tokens.
        device: cuda adds the context's own memory.
        processes: that share the rows of an optimizer step; the plan is of each.
    """
    step_rows = ceil(micro_batch_size * gradient_accumulation_steps / processes)
    micro_batch_size = min(micro_batch_size, step_rows)
    size, maps = DTYPE_BYTES[compute_dtype], shape.linear_maps()
    rank_of = ranks if isinstance(ranks, Mapping) else dict.fromkeys(maps, ranks)
    matrices = [matrix for name, io in maps.items() for matrix in _matrices(rank_of.get(name, 0), *io)]
    adapters = [rows * columns for rows, columns in matrices]

    batch = MicroBatch(
        micro_batch_size,
        seq_len,
        tile=seq_len if dropout or mlp_tile is None else min(seq_len, mlp_tile),
        size=size,
        # A mask of what is dropped: on CUDA of bytes, on a CPU in the dtype of what it multiplies.
        mask=0 if not dropout else 1 if device == "cuda" else size,
        packed=packed,
        load_in_4bit=load_in_4bit,
        device=device,
    )
    step = _activations(shape, rank_of, batch, gradient_checkpointing)
    kept, *_ = step.values()
    offloads = gradient_checkpointing == "offload"
    of_one = kept // (min(2, shape.num_hidden_layers) if offloads else shape.num_hidden_layers)
    accumulates, gradients = step_rows > micro_batch_size, 4 * sum(adapters)
    # Gradients grow while what the blocks kept goes: where they are whole, at the first block's backward, its own is
    # left. Of what is offloaded two inputs are there until the last two blocks.
    until = 2 * gradients // shape.num_hidden_layers if offloads else gradients
    gone = 0 if accumulates else min(until, kept - of_one)
    terms = {
        "4-bit weights" if load_in_4bit else "weights": sum(
            (i * o + 1) // 2 if load_in_4bit else i * o * size for i, o in maps.values()
        ),
        "quantization constants": sum(_constants(i * o, double_quant) for i, o in maps.values()) if load_in_4bit else 0,
        "embeddings and head": shape.embeddings_and_head() * size,
        "norms and biases": shape.norms_and_biases() * size,
        "adapter": 4 * sum(adapters),
        "gradients": gradients,
        "optimizer moments": sum(_moments(*matrix, optim) for matrix in matrices),
        **step,
        GONE: -gone,
        "earlier gradients beyond it": max(0, gradients - kept) if accumulates else 0,
        "gradients to sum over processes": 4 * sum(adapters) if processes > 1 else 0,
        "CUDA context": CUDA_CONTEXT if device == "cuda" else 0,
    }
    if directions:
        longer = {name: rank and rank + min(directions + OVERSAMPLING, *maps[name]) for name, rank in rank_of.items()}
        trained = sum(terms[name] for name in ("adapter", "gradients", "optimizer moments", *step)) - gone
        start = terms["adapter"] + _sketch(
            maps, rank_of, longer, _activations(shape, longer, batch, gradient_checkpointing)
        )
        terms["gradient start beyond it"] = max(0, start - trained)
    inputs = micro_batch_size * seq_len * shape.hidden_size * size * shape.num_hidden_layers
    return MemoryPlan(
        {name: size for name, size in terms.items() if size}, host=inputs if offloads and device == "cuda" else 0
    )


def _activations(
    shape: ModelShape, ranks: Mapping[str, int], batch: MicroBatch, checkpointing: Checkpointing
) -> dict[str, int]:
    """What is alive at the worst moment of a step, beside weights and adapters."""
    layers, tokens, size = layers_of(shape, ranks), batch.tokens, batch.size
    blocks = blocks_of(shape, layers, batch)
    hidden = tokens * shape.hidden_size * size
    kept = [hidden if checkpointing else block.inside for block in blocks]
    if checkpointing == "selective":
        kept = [hidden + block.outputs for block in blocks]
    elif not checkpointing:
        kept[0] -= blocks[0].unread + blocks[0].copied
    beside = beside_blocks(shape, layers, batch)

    def until(block: int) -> int:
        """What is kept while a block goes backward, of those before it, and its input."""
        return hidden * min(2, len(blocks)) if checkpointing == "offload" else sum(kept[:block]) + hidden

    def alive(block: int) -> int:
        """At the worst moment of a block's backward."""
        missing = 0 if block else blocks[0].copied
        return until(block) + blocks[block].working - missing + beside.gradients[block]

    last = len(blocks) - 1
    working = max(map(alive, range(len(blocks)))) - until(last)
    mixing = max(until(i) + block.mixing for i, block in enumerate(blocks)) - until(last)
    logits = min(LOGITS_CHUNK, FP32 * tokens * shape.vocab_size)
    loss = kept[last] + 3 * hidden + (logits if size == FP32 else logits * 3 // 2)
    return {
        KEPT[0 if checkpointing else 1]: until(last),
        "block working set": beside.all_along + (beside.keys if checkpointing else 0) + working,
        "attention's backward beyond it": max(0, mixing - working),
        "loss beyond it": max(0, loss - max(working, mixing)),
    }


def _sketch(
    maps: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], longer: Mapping[str, int], step: dict[str, int]
) -> int:
    """What the second pass of the gradient's sketch holds beside the adapter (adapter/start/gradient.py): longer A and
    B in its place, the span and the rows made of it, sums of the gradients, and, where the first block goes backward,
    the gradients to add."""
    matrices = spans = of_A = of_B = 0
    for name, count in longer.items():
        fan_in, fan_out = maps[name]
        matrices += count * (fan_in + fan_out)
        spans += 2 * (count - ranks[name]) * fan_in
        of_A, of_B = of_A + count * fan_in, of_B + count * fan_out
    gradients = 4 * max(of_A, of_B)
    block = step["block working set"]
    return 4 * (matrices + spans) + gradients + block + max(sum(step.values()) - block, gradients)


def _matrices(rank: int, fan_in: int, fan_out: int) -> tuple[tuple[int, int], ...]:
    return ((rank, fan_in), (fan_out, rank)) if rank else ()


def _constants(weights: int, double_quant: bool) -> int:
    """Of one 4-bit map: its absmax values in fp32, or in uint8 with fp32 constants and an offset, and its code
    tables."""
    blocks = ceil(weights / QUANT_BLOCK)
    nested = blocks + 4 * ceil(blocks / STATE_BLOCK) + 4 + 4 * 256
    return 4 * 16 + (nested if double_quant else 4 * blocks)


def _moments(rows: int, columns: int, optim: str) -> int:
    """What the optimizer keeps of one matrix: two moments of each element, Lion one, Adafactor a row and a column of
    means and the size of the weights."""
    if optim == "adafactor":
        return 4 * (rows + columns + 1)
    elements, kinds = rows * columns, 1 if "lion" in optim else 2
    if optim.endswith("8bit") and elements >= MIN_8BIT:
        return kinds * (elements + 4 * ceil(elements / STATE_BLOCK))
    return kinds * 4 * elements

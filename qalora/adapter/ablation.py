"""The loss of the adapted model with gates closed: what AB-LoRA's scores are made of.

A batch here is a list of micro-batches (dicts of input_ids, attention_mask, labels …) whose rows are all scored
together; losses are means over all their supervised tokens, summed in fp64, so they do not depend on the split.

`ablate` closes one gate after another. Closing a gate in block ℓ leaves every block before it unchanged, so a variant
of the model starts at its own block, from an input that one forward kept; variants of one block share a forward:

    embeddings → block 0 → … → block ℓ ─ kept input ─┬─ rank (ℓ, q_proj, 0) closed → blocks ℓ … → norm → head
                                                      ├─ rank (ℓ, q_proj, 1) closed → …    (where labels are)
                                                      └─ …                                 one batch of N copies
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qalora import processes
from qalora.adapter.layer import GatedLinear, closed, gated
from qalora.adapter.model import gated_layers
from qalora.base.structure import final_norm
from qalora.data.rows import supervised_tokens, targets
from qalora.kernels.loss import Head, label_only_loss, row_losses
from qalora.kernels.low_rank import frozen_forward
from qalora.kernels.prefixes import causal_lm
from qalora.progress import Bar, track

MicroBatch = Mapping[str, Tensor]
Rank = tuple[str, int]  # full module name, row of A


@dataclass(frozen=True)
class Ablation:
    """Exact scores of some ranks, in nats a supervised token.

    Attributes:
        drop: L(M∖r) − L(M); alone: L(base) − L(M_r).
        forward_equivalents: blocks run, over the blocks of the model.
    """

    loss: float
    base_loss: float
    drop: dict[Rank, float]
    alone: dict[Rank, float]
    forward_equivalents: float


def ablate(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    ranks: Sequence[Rank],
    *,
    dtype: torch.dtype | None = None,
    memory: int = 0,
    gate: float = 0.0,
) -> Ablation:
    """Closes the gate of each rank in turn, and opens it alone; several processes share the ranks.

    Args:
        dtype: what activations are computed in, from the embeddings on; None: the base's own. Weights keep the values
            that they have in the base's dtype.
        memory: bytes that the kept block inputs and the variants of one forward may hold on the device. Inputs that do
            not fit are kept in host memory, and a forward has at least one variant.
        gate: what "closed" sets the probed gate to: L(M∖r) with part of r left.
    """
    tokens = supervised_tokens(micro["labels"] for micro in batch)

    def losses(ranks: Sequence[Rank]) -> tuple[float, dict[Rank, float], float, dict[Rank, float]]:
        with _in_dtype_of_input(model), Bar("ablating", 2 * len(ranks) * len(batch)) as bar:
            adapted, without = _losses(model, batch, ranks, 1.0, gate, dtype, memory, bar)
            return adapted, without, *_losses(model, batch, ranks, 0.0, 1.0 - gate, dtype, memory, bar)

    shared = processes.together([ranks[start :: processes.size()] for start in range(processes.size())], losses)
    adapted, _, base, _ = shared[0]
    without = {rank: value for _, found, _, _ in shared for rank, value in found.items()}
    alone = {rank: value for _, _, _, found in shared for rank, value in found.items()}
    blocks = len(_decoder(model).layers)
    suffixes = sum((blocks - _block_of(name)) / blocks for name, _ in ranks)
    return Ablation(
        loss=adapted / tokens,
        base_loss=base / tokens,
        drop={rank: (without[rank] - adapted) / tokens for rank in ranks},
        alone={rank: (base - alone[rank]) / tokens for rank in ranks},
        forward_equivalents=2 + 2 * suffixes,
    )


def _losses(
    model: PeftModel,
    batch: Sequence[MicroBatch],
    ranks: Sequence[Rank],
    others: float,
    probed: float,
    dtype: torch.dtype | None,
    memory: int,
    bar: Bar,
) -> tuple[float, dict[Rank, float]]:
    """Summed loss with every gate at `others` (0 or 1), and with one rank's gate at `probed` instead, for each rank."""
    layers, decoder = gated_layers(model), _decoder(model)
    by_block: dict[int, list[Rank]] = {}
    for rank in ranks:
        by_block.setdefault(_block_of(rank[0]), []).append(rank)
    total, sums = 0.0, dict.fromkeys(ranks, 0.0)
    with torch.no_grad():
        for micro in batch:
            with closed(layers.values() if others == 0.0 else ()):
                kept, hidden = _run_and_keep(decoder, micro, by_block, dtype, memory)
            total += float(_row_losses(model, hidden, micro["labels"]).double().sum())
            stack = max(1, (memory - kept.bytes_on_device) // _variant_bytes(model, hidden))
            for block, members in by_block.items():
                for start in range(0, len(members), stack):
                    variants = members[start : start + stack]
                    gates = _stacked_gates(layers, variants, others, probed, rows=len(hidden))
                    unprobed = (layer for name, layer in layers.items() if name not in gates)
                    with closed(unprobed if others == 0.0 else ()), gated(layers, gates):
                        out = _resume(decoder, kept, block, len(variants))
                    labels = micro["labels"].repeat(len(variants), 1)
                    losses = _row_losses(model, out, labels).double().view(len(variants), -1).sum(1)
                    for rank, loss in zip(variants, losses.tolist(), strict=True):
                        sums[rank] += loss
                    bar.advance(len(variants))
    return total, sums


@contextmanager
def _in_dtype_of_input(model: PeftModel) -> Iterator[None]:
    """Linear layers without an adapter compute in the dtype of their input, as those with one do; inside the blocks and
    before them."""
    adapted = {id(layer.base_layer) for layer in gated_layers(model).values()}
    modules: Any = _decoder(model).modules()
    bare: list[Any] = [
        module
        for module in modules
        if isinstance(module, nn.Linear) and id(module) not in adapted and not isinstance(module, GatedLinear)
    ]
    own = [module.__dict__.get("forward") for module in bare]
    try:
        for module in bare:
            module.forward = partial(frozen_forward, module)
        yield
    finally:
        for module, forward in zip(bare, own, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


@dataclass
class _Kept:
    """Of one forward: the input of the blocks that variants start from, and the other arguments of every block."""

    inputs: dict[int, Tensor]
    others: list[tuple[tuple[Any, ...], dict[str, Any]]]
    bytes_on_device: int = 0


def _run_and_keep(
    decoder: Decoder, micro: MicroBatch, wanted: Container[int], dtype: torch.dtype | None, memory: int
) -> tuple[_Kept, Tensor]:
    """One forward of the decoder; (what it kept, final hidden states before the last norm).

    Inputs are kept on the device as far as `memory` allows, the rest in host memory.
    """
    kept = _Kept({}, [])
    last: list[Tensor] = []

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            hidden, *others = args
            if index in wanted:
                fits = kept.bytes_on_device + hidden.nbytes <= memory
                kept.inputs[index] = hidden if fits else hidden.cpu()
                kept.bytes_on_device += hidden.nbytes if fits else 0
            kept.others.append((tuple(others), kwargs))

        return hook

    def cast(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(dtype or output.dtype)

    handles = [
        block.register_forward_pre_hook(keep(index), with_kwargs=True) for index, block in enumerate(decoder.layers)
    ]
    handles += [module.register_forward_hook(cast) for module in decoder.modules() if isinstance(module, nn.Embedding)]
    handles.append(decoder.layers[-1].register_forward_hook(lambda module, args, output: last.append(output)))
    try:
        decoder(use_cache=False, **{key: value for key, value in micro.items() if key != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    return kept, last[0]


def _resume(decoder: Decoder, kept: _Kept, block: int, copies: int) -> Tensor:
    """The final hidden states of `copies` variants, from the kept input of a block on."""
    rows, device = len(kept.inputs[block]), decoder.get_input_embeddings().weight.device
    hidden = kept.inputs[block].to(device).repeat(copies, 1, 1)
    repeated = _Repeated(rows, copies)
    for module, (others, options) in zip(decoder.layers[block:], kept.others[block:], strict=True):
        hidden = module(hidden, *map(repeated, others), **{name: repeated(value) for name, value in options.items()})
    return hidden


class _Repeated:
    """Arguments of blocks for `copies` times as many rows; what has one row for all of them broadcasts.

    A dict in which blocks leave keys and values for later ones is one dict for them again.
    """

    def __init__(self, rows: int, copies: int):
        self.rows, self.copies = rows, copies
        self.shared: dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._of_rows(value) if value.ndim > 0 and len(value) == self.rows > 1 else value
        if isinstance(value, (tuple, list)):
            return type(value)(map(self, value))
        if isinstance(value, MutableMapping):
            if id(value) not in self.shared:
                self.shared[id(value)] = again = copy.copy(value)
                again.update({key: tuple(map(self._of_rows, states)) for key, states in value.items()})
            return self.shared[id(value)]
        return value

    def _of_rows(self, states: Tensor) -> Tensor:
        return states.repeat(self.copies, *[1] * (states.ndim - 1))


def _stacked_gates(
    layers: Mapping[str, GatedLinear], variants: Sequence[Rank], others: float, probed: float, rows: int
) -> dict[str, Tensor]:
    """Module → (variants · rows, 1, r): each variant's rows have one gate at `probed`, all others at `others`."""
    gates: dict[str, Tensor] = {}
    for index, (name, rank) in enumerate(variants):
        A = layers[name].A
        gate = gates.setdefault(name, torch.full((len(variants) * rows, 1, len(A)), others, device=A.device))
        gate[index * rows : (index + 1) * rows, :, rank] = probed
    return gates


def _row_losses(model: PeftModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """(rows,) summed cross-entropy from the last block's output."""
    base: Any = model.get_base_model()
    return label_only_loss(getattr(_decoder(model), str(final_norm(_decoder(model))))(hidden), labels, Head.of(base))


def _variant_bytes(model: PeftModel, hidden: Tensor) -> int:
    """Alive at once in a block's forward without autograd: hidden states, their norm, the MLP's three products and the
    fp32 update of one."""
    config: Any = model.get_base_model().config
    return hidden[..., 0].numel() * (
        hidden.element_size() * (3 * config.hidden_size + 3 * config.intermediate_size) + 4 * config.intermediate_size
    )


class Decoder(Protocol):
    """The decoder of a causal LM of transformers."""

    layers: nn.ModuleList

    def modules(self) -> Iterator[nn.Module]: ...

    def get_input_embeddings(self) -> nn.Embedding: ...

    def __call__(self, **inputs: object) -> object: ...


def _decoder(model: PeftModel) -> Decoder:
    return cast(Decoder, causal_lm(model).base_model)


def _block_of(name: str) -> int:
    """model.layers.3.mlp.up_proj → 3"""
    return int(name.split(".layers.")[1].split(".")[0])


def gate_gradients(
    model: PeftModel, batch: Sequence[MicroBatch], value: float | Mapping[str, Tensor], *, by_row: bool = True
) -> tuple[float, dict[str, Tensor], Tensor]:
    """L with all gates at `value`, and ∂/∂α of every row's loss: one forward and backward of each micro-batch, which
    several processes share.

    A gate a row gives every row's own gradient from the same backward. It costs less than ⟨∂L/∂A_k, A_k⟩ (the same
    number at α = 1): the product with A x that it needs is there already, and ∂L/∂A is not formed.

    Args:
        value: of every gate, or module → (r,).
        by_row: without, one gate for all rows: only sums, but what rows begin with alike is computed once.

    Returns:
        (loss, module → (rows, or micro-batches, r) fp64 gradients of their summed losses, (rows,) supervised tokens).
    """
    layers = gated_layers(model)
    open_gates = (
        value
        if isinstance(value, Mapping)
        else {name: torch.full((len(layer.A),), value, device=layer.A.device) for name, layer in layers.items()}
    )

    def gradients_of(micro: MicroBatch) -> tuple[float, dict[str, Tensor], Tensor]:
        shape = (len(micro["labels"]), 1) if by_row else ()
        gates = {name: open_gates[name].expand(*shape, -1).clone().requires_grad_() for name in layers}
        with gated(layers, gates), torch.enable_grad():
            loss = row_losses(model, micro).sum()
            found = dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))
        own = {name: gradient.view(-1, gradient.shape[-1]).double().cpu() for name, gradient in found.items()}
        return float(loss.detach().double()), own, targets(micro["labels"]).sum(1).cpu()

    losses, gradients, counts = zip(
        *processes.together(batch, gradients_of, partial(track, what="scoring")), strict=True
    )
    tokens = torch.cat(counts)
    joined = {name: torch.cat([found[name] for found in gradients]) for name in layers}
    return sum(losses) / int(tokens.sum()), joined, tokens


@contextmanager
def scoring_mode(model: PeftModel) -> Iterator[None]:
    """Dropout off, adapters frozen, everything else as in a training step, and all of it restored at the end.

    The blocks alone stay in train mode: transformers checkpoints activations only there, so scoring needs no more
    memory than a step does. What is inside them does not, for attention drops out by its own mode.
    """
    modes = {module: module.training for module in model.modules()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for module in model.modules():
            module.training = isinstance(module, GradientCheckpointingLayer)
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter in parameters:
            parameter.requires_grad_(True)

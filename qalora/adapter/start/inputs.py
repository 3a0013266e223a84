"""What the maps of a model read on some rows: what both starts decide by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from qalora.adapter.ablation import MicroBatch, scoring_mode
from qalora.kernels.prefixes import causal_lm, final_hidden


def visit_inputs(
    model: PeftModel, batch: Sequence[MicroBatch], layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> None:
    """Forwards every micro-batch and calls `see(name, inputs)` whenever one of the layers is.

    `inputs` is (n, in) without padding: each distinct token of a micro-batch once, or in pieces where the MLP goes by
    tiles. Maps that read the same tensor are given the same `inputs`.
    """
    mask = torch.empty(0)
    read: dict[str, int] = {}  # positions of a row that a layer has seen of this micro-batch
    last: Tensor | None = None
    tokens = torch.empty(0)

    def look(name: str, x: Tensor) -> None:
        nonlocal last, tokens
        if x is not last:
            part = mask[:, read[name] : read[name] + x.shape[1]]
            # Where rows share prefixes there is one sequence, and no padding in it.
            last, tokens = x, x[part.bool()] if x.shape[:2] == part.shape else x.flatten(0, 1)
        read[name] += x.shape[1]
        see(name, tokens)

    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        with scoring_mode(model), torch.no_grad():
            for micro in batch:
                mask, last, read = token_mask(micro), None, dict.fromkeys(layers, 0)
                final_hidden(causal_lm(model), micro["input_ids"], mask)
    finally:
        for hook in hooks:
            hook.remove()


def token_mask(micro: MicroBatch) -> Tensor:
    """(rows, width), one where a token is."""
    return micro["attention_mask"] if "attention_mask" in micro else torch.ones_like(micro["input_ids"])

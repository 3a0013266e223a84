"""The blocks of a decoder that no formula here knows: those of transformers' own model, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qalora.base.blocks import Block


def measured_blocks(config: Mapping[str, Any]) -> tuple[tuple[Block, ...], int]:
    """The blocks, and the parameters beside them, embeddings and head.

    Args:
        config: the fields of a config.json, with its model_type.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    blocks = []
    for block in model.get_decoder().layers:
        linear = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        sizes = tuple((name, module.in_features, module.out_features) for name, module in linear.items())
        every = sum(parameter.numel() for parameter in block.parameters())
        blocks.append(Block(sizes, every - sum(fan_in * fan_out for _, fan_in, fan_out in sizes)))
    ends = {id(p): p for end in (model.get_input_embeddings(), model.get_output_embeddings()) for p in end.parameters()}
    in_blocks = sum(parameter.numel() for parameter in model.get_decoder().layers.parameters())
    last_norm = model.config.hidden_size
    beside = sum(p.numel() for p in model.parameters()) - in_blocks - sum(p.numel() for p in ends.values()) - last_norm
    return tuple(blocks), beside

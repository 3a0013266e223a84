"""A model, or some blocks of it, by the very loader that loads the whole: what is read piece by piece is what a reader
of all has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from qalora.base.families import family_of
from qalora.base.tensor_files import Checkpoint
from qalora.progress import track


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        blocks: indices of the blocks that are loaded, under the names that they have in the whole.
        ends: what is before and after the blocks too, such as embeddings, last norm and head.
    """

    blocks: tuple[int, ...]
    ends: bool

    def of(self, config: PreTrainedConfig) -> type[PreTrainedModel]:
        """A class like that of the model, without the rest: `from_pretrained` reads only what its modules name."""
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        part = self

        def __init__(self: Any, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
            model_class.__init__(self, config, *args, **options)
            for i in set(range(config.num_hidden_layers)) - set(part.blocks):
                del self.model.layers._modules[str(i)]
            if not part.ends:
                for name, child in list(self.model.named_children()):
                    if name != "layers" and next(child.parameters(), None) is not None:
                        setattr(self.model, name, nn.Identity())
                self.lm_head = nn.Identity()
                self.all_tied_weights_keys = {}

        there = {"__init__": __init__, "__module__": model_class.__module__, "_keys_to_ignore_on_load_unexpected": [""]}
        return type(model_class.__name__, (model_class,), there)


def whole(config: PreTrainedConfig) -> Part:
    return Part(tuple(range(config.num_hidden_layers)), ends=True)


def attention_of(config: PreTrainedConfig, asked: str) -> str:
    """transformers' name of the attention that a model computes with: its own where torch's fused one cannot."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    fused = model_class is None or model_class._supports_sdpa
    return "eager" if family_of(config.model_type).eager or not fused else asked


def from_checkpoint(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    part: Part,
    *,
    dtype: torch.dtype,
    device: str,
    attention: str,
    convert: Callable[[nn.Linear], nn.Module] | None = None,
    progress: str | None = None,
) -> PreTrainedModel:
    """A part of a model whose files transformers does not load: GGUF in several files, with biases, or with scaled
    positions.

    Args:
        dtype: of the weights.
        convert: makes of each linear layer of the blocks, once it is read, what takes its place.
        progress: the word before a progress bar; None: there is none.
    """
    with torch.device("meta"):
        model: Any = part.of(config)._from_config(
            config, dtype=dtype, attn_implementation=attention_of(config, attention)
        )
    _compute_buffers(model)
    if (rotation := model.model.rotary_emb) is not None:  # Granite 4 may be without
        model.model.rotary_emb = type(rotation)(config)
    tied = config.tie_word_embeddings
    modules = list(model.named_modules())
    for name, module in modules if progress is None else track(modules, progress):
        if tied and name == "lm_head":
            continue
        for child in dict(module.named_parameters(recurse=False)):
            value = torch.cat([piece.to(dtype) for piece in checkpoint.pieces(f"{name}.{child}")])
            setattr(module, child, nn.Parameter(value.to(device), requires_grad=False))
        for child, buffer in module.named_buffers(recurse=False):
            if f"{name}.{child}" in checkpoint.structure.shapes:
                buffer.copy_(checkpoint.tensor(f"{name}.{child}"))
        if convert is not None and isinstance(module, nn.Linear) and ".layers." in name:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, convert(module))
    if part.ends:
        model.tie_weights()
    return model.eval()


def _compute_buffers(model: Any) -> None:
    """Gives a model on the meta device what it computes from its config, such as the scale of embeddings."""
    for module in model.modules():
        own = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in own:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if own:
            model._init_weights(module)

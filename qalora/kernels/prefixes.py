"""What rows of a batch begin with alike is worked through once, and padding not at all.

In a causal model a token's hidden state depends on the tokens before it and on nothing else, so two rows with one
prompt, or one template, have the same states as far as they agree. The maps of a block see each distinct state once, in
one sequence without padding; attention alone sees rows, whose queries, keys and values it gathers:

    rows      A b c d        tokens    A b c d   e f   x y z        places    0 1 2 3
              A b e f                  (1, 9)                                 0 1 4 5
              x y z ·                                                         6 7 8 0

A place says where in `tokens` a position of a row is; of padding, anywhere.

Gradients of the rows add up in what they share, as they do in a padded batch.

What attention has to know goes to it as its mask: of four dimensions, transformers hands that on as it is, where some
models drop keywords. Masks of integers are ours, and none is added to anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qalora.base.families import family_of

ATTENTION = "sdpa_over_rows"  # transformers' name for attention that can gather rows
OWN = "sdpa"  # the attention whose place it takes
WORTH_IT = 0.97  # of the positions of a padded batch: where more than that would be left, gathering costs what it saves
OWN_STATES = {"position_ids", "inputs_embeds", "past_key_values"}  # with these, equal tokens need not have equal states
DROPOUTS = ("attention_dropout", "residual_dropout")  # what modules call the share that they drop themselves
MOST_COMPARED = 2**27  # tokens, each row with each other: a byte or two of memory for each


@dataclass(frozen=True)
class Shared:
    """Of a padded batch (rows, width).

    Attributes:
        tokens: (T,) positions in the flattened batch, the first of each distinct state.
        places: (rows, width) indices into `tokens`.
    """

    tokens: Tensor
    places: Tensor

    def as_mask(self) -> Tensor:
        """(2, 1, rows, width): places, and tokens with zeros after them."""
        tokens = F.pad(self.tokens, (0, self.places.numel() - len(self.tokens)))
        return torch.stack([self.places, tokens.view_as(self.places)])[:, None]


@dataclass(frozen=True)
class Places:
    """What final_hidden would else read off a batch, (rows, width).

    Attributes:
        shared: None: too little is shared.
        padding: where it stands in the rows.
        packed: a row holds several texts.
    """

    shared: Shared | None
    padding: Literal["none", "right", "elsewhere"]
    packed: bool


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside of a PeftModel, or the model itself."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def final_hidden(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    layout: Places | None = None,
    **options: Any,
) -> Tensor:
    """Final hidden states of a causal LM, as `model.base_model` gives them, computed once for each distinct prefix
    where that pays.

    Args:
        model: with the attention `ATTENTION` (install.py); every other one computes row by row.
        input_ids, attention_mask: (rows, width), as the model takes them; only rows padded on the right, at the
            positions 0, 1, 2 …, share their prefixes.
        layout: what was found of the batch before; None: it is looked for here, and on CUDA waited for.

    Returns:
        (rows, width, d); what stands at padding means nothing.
    """
    shared = None
    if (
        (layout is None or layout.shared is not None)
        and input_ids is not None
        and attention_mask is not None
        and attention_mask.ndim == 2
        and OWN_STATES.isdisjoint(name for name, value in options.items() if value is not None)
        and can_share(model, input_ids.shape[1])
    ):
        shared = share(input_ids, attention_mask) if layout is None else layout.shared
    if shared is None or input_ids is None:
        if layout is not None and input_ids is not None and is_causal_alone(model, input_ids.shape[1]):
            attention_mask = _known_mask(input_ids, attention_mask, layout, options)
        return model.base_model(input_ids, attention_mask=attention_mask, **options).last_hidden_state
    hidden = model.base_model(
        input_ids.flatten()[shared.tokens][None],
        attention_mask=shared.as_mask(),
        position_ids=(shared.tokens % input_ids.shape[1])[None],
        **options,
    ).last_hidden_state
    return F.embedding(shared.places, hidden[0])


def share(input_ids: Tensor, attention_mask: Tensor) -> Shared | None:
    """Finds the distinct prefixes of a batch; None where there is too little to save, or padding elsewhere than on the
    right."""
    rows, width = input_ids.shape
    if rows**2 * width > MOST_COMPARED:
        return None
    alive = attention_mask.bool()
    if (alive[:, 1:] & ~alive[:, :-1]).any():
        return None
    same = (input_ids[:, None] == input_ids) & alive[:, None] & alive
    same = same.cumprod(-1, dtype=torch.uint8)  # (rows, rows, width): whether two rows agree up to here
    first = same.argmax(1)  # the first row that begins like this one
    own = alive & (first == torch.arange(rows, device=first.device)[:, None])
    tokens = own.flatten().nonzero().squeeze(1)
    if len(tokens) > WORTH_IT * rows * width:
        return None
    numbers = own.flatten().cumsum(0).view(rows, width) - 1
    return Shared(tokens, numbers.gather(0, first).masked_fill(~alive, 0))


def can_share(model: PreTrainedModel, width: int) -> bool:
    """Whether equal prefixes have equal states: nothing drops out, every row meets the same gates, and attention alone
    carries them on, and reaches back to a row's first token."""
    return is_causal_alone(model, width) and not any(_differs_by_row(module) for module in model.modules())


def is_causal_alone(model: PreTrainedModel, width: int) -> bool:
    """Whether attention alone carries states on, is ours, and reaches back to a row's first token."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if family_of(config.model_type).across_rows is not None:
        return False
    return config._attn_implementation == ATTENTION and (window is None or width <= window)


def _known_mask(
    input_ids: Tensor, attention_mask: Tensor | None, layout: Places, options: Mapping[str, Any]
) -> Tensor | None:
    """The mask for transformers, which reads the values of one of fewer than four dimensions: the host waits for
    them. A single integer stands for causal attention without a mask."""
    if layout.packed:
        texts = (options["position_ids"] == 0).cumsum(-1)
        order = torch.arange(input_ids.shape[1], device=input_ids.device)
        return ((texts[:, :, None] == texts[:, None]) & (order[:, None] >= order))[:, None]
    # Padding on the right comes after every token of its row. On a CPU a mask is kept, and the order of its sums
    # with it.
    if layout.padding == "none" or (layout.padding == "right" and input_ids.device.type != "cpu"):
        return input_ids.new_empty(1, 1, 1, 1, dtype=torch.long)
    return attention_mask


def _differs_by_row(module: nn.Module) -> bool:
    if getattr(module, "differs_by_row", False):
        return True
    dropout = module.p if isinstance(module, nn.Dropout) else any(getattr(module, name, 0.0) for name in DROPOUTS)
    # NEFTune's noise is drawn for every position of every row.
    return bool(module.training and (dropout or getattr(module, "neftune_noise_alpha", None)))


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """(1, heads, T, head_dim) queries, keys and values of distinct states → (1, T, heads, head_dim)."""
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask.numel() == 1:
        return sdpa_attention_forward(module, query, key, value, None, **options)
    places, tokens = attention_mask[0, 0], attention_mask[1].flatten()[: query.shape[2]]

    def of_rows(states: Tensor) -> Tensor:
        """→ (rows, heads, width, head_dim)"""
        _, heads, count, size = states.shape
        flat = states.transpose(1, 2).reshape(count, heads * size)
        return F.embedding(places, flat).unflatten(-1, (heads, size)).transpose(1, 2)

    # Causal without a mask: padding comes after every token of its row.
    out, _ = sdpa_attention_forward(module, of_rows(query), of_rows(key), of_rows(value), None, **options)
    return F.embedding(tokens, out.flatten(2).flatten(0, 1)).unflatten(-1, out.shape[2:])[None], None


def register() -> None:
    """Makes `ATTENTION` known to transformers."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)

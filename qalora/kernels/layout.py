"""What a forward and its loss ask of a batch's values, answered where these are at hand: on the host, before a step
goes to the device, which then need not be waited for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qalora.data.rows import targets as supervised
from qalora.kernels.prefixes import Places, Shared, share

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout(Places):
    """Of a batch (rows, width).

    Attributes:
        rows, positions: (n,) of the tokens before supervised ones, whose states predict them.
        targets: (n,) those.
    """

    rows: Tensor
    positions: Tensor
    targets: Tensor


def layout_of(batch: Inputs) -> Layout:
    """Of input_ids and labels, with an attention_mask where rows are padded, or position_ids where they are packed."""
    ids, labels, mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
    rows, positions = supervised(labels).nonzero(as_tuple=True)
    starts = batch.get("position_ids")
    return Layout(
        shared=None if mask is None or starts is not None else share(ids, mask),
        padding=_padding(mask),
        packed=starts is not None and mask is None and bool((starts[:, 1:] == 0).any()),
        rows=rows,
        positions=positions,
        targets=labels[rows, positions + 1],
    )


def _padding(mask: Tensor | None) -> Literal["none", "right", "elsewhere"]:
    if mask is None or bool(mask.all()):
        return "none"
    return "elsewhere" if bool((mask[:, 1:] > mask[:, :-1]).any()) else "right"


def prepared(batch: Inputs, device: torch.device) -> dict[str, Tensor | Layout]:
    """A micro-batch on the device, with its layout."""
    layout = layout_of(batch)

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    shared = layout.shared
    found = Layout(
        shared=None if shared is None else Shared(there(shared.tokens), there(shared.places)),
        padding=layout.padding,
        packed=layout.packed,
        rows=there(layout.rows),
        positions=there(layout.positions),
        targets=there(layout.targets),
    )
    return {**{name: there(tensor) for name, tensor in batch.items()}, "layout": found}

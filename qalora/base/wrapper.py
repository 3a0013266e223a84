"""The text part of a vision model, under the names that the whole has for it."""

from __future__ import annotations

from typing import Any

from torch import nn

from qalora.base.families import TEXT, WRAPPED


class Holder(nn.Module):
    """What stands between a head and a decoder in a vision model, without the vision: PEFT's names are then those of
    the whole.

    It computes what the decoder computes, and has whatever the decoder has.
    """

    def __init__(self, decoder: nn.Module):
        super().__init__()
        setattr(self, TEXT, decoder)

    def forward(self, *args: Any, **options: Any) -> Any:
        return getattr(self, TEXT)(*args, **options)

    def __getattr__(self, name: str) -> Any:
        inside = self.__dict__.get("_modules") or {}  # none yet in a copy that is being made
        if name in inside or TEXT not in inside:
            return super().__getattr__(name)
        return getattr(inside[TEXT], name)


def name_as_in_wrapper(model: Any) -> None:
    """Gives the decoder of a causal LM the name that it has in the vision model whose text part it is.

    Nothing happens to other models.
    """
    if hasattr(model.config, WRAPPED):
        model.model = Holder(model.model)

"""What an autograd function has between its forward and its backward, for type checkers. The functions here add what is
their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """
    Attributes:
        saved_tensors: as `save_for_backward` took them, None where it took None.
        needs_input_grad: of every argument of the forward.
    """

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    if TYPE_CHECKING:

        def save_for_backward(self, *tensors: Tensor | None) -> None: ...

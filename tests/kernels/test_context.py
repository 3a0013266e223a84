"""What an autograd function of torch has, as the types of our kernels say."""

from __future__ import annotations

import torch

from qalora.kernels.context import Context


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, unused: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, unused)
        return 2 * x

    @staticmethod
    def backward(ctx: Context, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, nothing = ctx.saved_tensors
        assert nothing is None and ctx.needs_input_grad == (True, False)
        return 2 * grad + 0 * x, None


def test_what_is_saved_comes_back_none_included():
    x = torch.ones(3, requires_grad=True)
    Twice.apply(x, None).sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]

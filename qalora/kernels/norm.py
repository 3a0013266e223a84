"""RMSNorm that keeps its input alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qalora.base.families import FAMILIES, Weighing
from qalora.kernels import fused
from qalora.kernels.context import Context
from qalora.kernels.stretches import Stretch, assembled

KNOWN: dict[str, Weighing] = {family.norm: family.weighing for family in FAMILIES.values() if family.norm}


class _Kept(Context):
    weighing: Weighing


class _FrozenRMSNorm(torch.autograd.Function):
    """w · x / √(mean x² + ε), computed in fp32, and weighed as the model's own does it (arXiv 1910.07467, eq. 4).

    transformers' own keeps x and its product in fp32, four times the bytes of a bf16 x that the residual keeps anyway,
    and its backward holds five more. w is frozen.
    """

    @staticmethod
    def forward(ctx: _Kept, x: Tensor, weight: Tensor, eps: float, weighing: Weighing) -> Tensor:
        def of_stretch(part: Stretch) -> tuple[Tensor, Tensor]:
            wide = x[part].float()
            scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            normed = wide * scale
            if weighing == "after":
                return weight * normed.to(x.dtype), scale
            return normed.mul_(_factor(weight, weighing)).to(x.dtype), scale

        out, scale = assembled(x, x.shape[-1], of_stretch)
        ctx.weighing = weighing
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: _Kept, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight, scale = ctx.saved_tensors
        factor = _factor(weight, ctx.weighing)

        def of_stretch(part: Stretch) -> tuple[Tensor]:
            normed = x[part].float() * scale[part]
            weighted = grad_out[part].float() * factor
            along = (weighted * normed).mean(-1, keepdim=True)
            return (weighted.addcmul_(normed, along, value=-1).mul_(scale[part]).to(x.dtype),)

        (grad,) = assembled(x, x.shape[-1], of_stretch)
        return grad, None, None, None


def _factor(weight: Tensor, weighing: Weighing) -> Tensor:
    return 1.0 + weight.float() if weighing == "plus_one" else weight.float()


def replaceable(model: nn.Module) -> Iterator[nn.Module]:
    """Every frozen RMSNorm of a known kind, over hidden states or heads; the forward stays transformers' to the bit."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__ in KNOWN and weight is not None and not weight.requires_grad:
            yield module


def forward(self: Any, hidden_states: Tensor) -> Tensor:
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    weighing = KNOWN[type(self).__name__]
    if fused.norms(hidden_states, self.weight, weighing):
        return fused.rms_norm(hidden_states, self.weight, eps, weighing)
    return _FrozenRMSNorm.apply(hidden_states, self.weight, eps, weighing)

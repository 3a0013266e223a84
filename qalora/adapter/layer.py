"""The gated low-rank layer over a frozen linear map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from qalora.base.quantized import is_4bit


class GatedLinear(nn.Module, LoraLayer):
    """ALoRA's layer: z = W x + s · B diag(α) A x (arXiv 2403.16187, §3.2).

    W is frozen, in 4 or 16 bit; A (r, in) and B (out, r) are trained in fp32; s is the scaling. The gate α is no
    parameter and never reaches the disk: it is absent, which means open, except inside `gated` and `closed`.

    Registered as PEFT's module for `Linear4bit` and `nn.Linear`, so configuration, saving and loading stay PEFT's.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.gate: Tensor | None = None
        self.closed = False
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    @property
    def A(self) -> nn.Parameter:
        """(r, in), fp32."""
        return cast(nn.Parameter, self.lora_A[self.active_adapters[0]].weight)

    @property
    def B(self) -> nn.Parameter:
        """(out, r), fp32."""
        return cast(nn.Parameter, self.lora_B[self.active_adapters[0]].weight)

    @property
    def s(self) -> float:
        return self.scaling[self.active_adapters[0]]

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, in) → (batch, tokens, out), in the dtype of x."""
        if self.disable_adapters or self.closed:
            return self._frozen(x)
        dropout = self.lora_dropout[self.active_adapters[0]]
        x_low = dropout(x) if self.training and isinstance(dropout, nn.Dropout) else None
        if torch.is_grad_enabled():
            return _GatedLinear.apply(x, x_low, self.A, self.B, self.gate, self.s, self.base_layer)
        update, _ = _low_rank(x, self.A, self.B, self.gate, self.s)
        return _add_update(self._frozen(x), update, self.base_layer)

    def _frozen(self, x: Tensor) -> Tensor:
        """W x, in the dtype of x: bitsandbytes' own forward would compute in the base's dtype also where x is fp32."""
        base: Any = self.base_layer
        if x.dtype == (base.compute_dtype if is_4bit(base) else base.weight.dtype) or torch.is_autocast_enabled(
            x.device.type
        ):
            return base(x)
        return F.linear(x, _weight(base, x.dtype).to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))


class _GatedLinear(torch.autograd.Function):
    """Base and update in one node: x is kept once, in its own dtype, with the (…, r) product A x; the 4-bit weight is
    dequantized for the forward and again for the backward, and never kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_low: Tensor | None, A: Tensor, B: Tensor, gate: Tensor | None, s: float, base: nn.Linear
    ) -> Tensor:
        z = F.linear(x, _weight(base, x.dtype), base.bias)
        update, low = _low_rank(x if x_low is None else x_low, A, B, gate, s)
        ctx.s, ctx.base = s, base
        ctx.save_for_backward(x, x_low, A, B, gate, low)
        return _add_update(z, update, base)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        x, x_low, A, B, gate, low = ctx.saved_tensors
        need_x, need_x_low, need_A, need_B, need_gate, _, _ = ctx.needs_input_grad
        grad_x: Any = None
        grad_x_low = grad_A = grad_B = grad_gate = None
        with torch.autocast(x.device.type, enabled=False):
            grad_out = grad_z.to(B.dtype)
            grad_gated = (grad_out @ B).mul_(ctx.s)
            if need_gate:
                grad_gate = (grad_gated * low).sum_to_size(gate.shape)
            if need_B:
                gated = low if gate is None else low * gate
                grad_B = (grad_out.flatten(0, -2).T @ gated.flatten(0, -2)).mul_(ctx.s)
            grad_low = grad_gated if gate is None else grad_gated * gate
            if need_A:
                inputs = x if x_low is None else x_low
                grad_A = grad_low.flatten(0, -2).T @ inputs.flatten(0, -2).to(A.dtype)
            if need_x:
                grad_x = grad_z @ _weight(ctx.base, grad_z.dtype)
            if need_x and x_low is None:
                grad_x += (grad_low @ A).to(grad_x.dtype)
            elif need_x_low:
                grad_x_low = (grad_low @ A).to(x_low.dtype)
        return grad_x, grad_x_low, grad_A, grad_B, grad_gate, None, None


def _low_rank(x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, s: float) -> tuple[Tensor, Tensor]:
    """(s · B diag(α) A x, A x), both fp32: one rank's share of the output is below bf16's rounding of it."""
    with torch.autocast(x.device.type, enabled=False):
        low = F.linear(x.to(A.dtype), A)
        return F.linear(low if gate is None else low * gate, B).mul_(s), low


def _add_update(z: Tensor, update: Tensor, base: nn.Module) -> Tensor:
    # PEFT rounds the update before it adds over a 4-bit map and after it over a plain one; the last bit follows it,
    # so that the saved adapter is the function that was trained.
    return z.add_(update.to(z.dtype)) if is_4bit(base) else z.add_(update)


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """The frozen (out, in) weight in `dtype`; a 4-bit one is dequantized, which costs its 16- or 32-bit size for a moment."""
    if not is_4bit(base):
        return base.weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, base.weight.quant_state).to(dtype)


@contextmanager
def gated(layers: Mapping[str, GatedLinear], gates: Mapping[str, Tensor]) -> Iterator[None]:
    """Sets the gates of the named layers, and opens them again at the end, also after an error.

    A gate is (r,) for the whole batch or (rows, 1, r) for a gate a row; it may require grad.
    """
    try:
        for name, gate in gates.items():
            layers[name].gate = gate
        yield
    finally:
        for name in gates:
            layers[name].gate = None


@contextmanager
def closed(layers: Iterable[GatedLinear]) -> Iterator[None]:
    """Closes every gate of the layers, at no cost: the base alone is computed."""
    layers = list(layers)
    try:
        for layer in layers:
            layer.closed = True
        yield
    finally:
        for layer in layers:
            layer.closed = False

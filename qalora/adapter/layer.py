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
from qalora.base.stretches import stretches


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
        z = self._frozen(x)
        _add_low_rank(z, x, self.A, self.B, self.gate, self.s, self.base_layer)
        return z

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
    dequantized for the forward and again for the backward, and never kept. fp32 copies of a 16-bit x or grad_z are as
    wide as the map, so they exist for a stretch of tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_low: Tensor | None, A: Tensor, B: Tensor, gate: Tensor | None, s: float, base: nn.Linear
    ) -> Tensor:
        z = F.linear(x, _weight(base, x.dtype), base.bias)
        low = _add_low_rank(z, x if x_low is None else x_low, A, B, gate, s, base)
        ctx.s, ctx.base = s, base
        ctx.save_for_backward(x, x_low, A, B, gate, low)
        return z

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, ...]:
        x, x_low, A, B, gate, low = ctx.saved_tensors
        need_x, need_x_low, need_A, need_B, need_gate, _, _ = ctx.needs_input_grad
        inputs = x if x_low is None else x_low
        grad_A = torch.zeros_like(A) if need_A else None
        grad_B = torch.zeros_like(B) if need_B else None
        grad_gate = torch.zeros_like(gate) if need_gate else None
        with torch.autocast(x.device.type, enabled=False):
            grad_x = grad_z @ _weight(ctx.base, grad_z.dtype) if need_x else None
            grad_inputs = grad_x if x_low is None else torch.zeros_like(x_low) if need_x_low else None
            for part in stretches(x, max(A.shape[1], B.shape[0])):
                grad_out = grad_z[part].to(B.dtype)
                grad_gated = (grad_out @ B).mul_(ctx.s)
                if grad_gate is not None:
                    grad_gate += (grad_gated * low[part]).sum_to_size(gate.shape)
                if grad_B is not None:
                    gated = low[part] if gate is None else low[part] * gate
                    grad_B.addmm_(grad_out.flatten(0, -2).T, gated.flatten(0, -2), alpha=ctx.s)
                grad_low = grad_gated if gate is None else grad_gated * gate
                if grad_A is not None:
                    grad_A.addmm_(grad_low.flatten(0, -2).T, inputs[part].flatten(0, -2).to(A.dtype))
                if grad_inputs is not None:
                    grad_inputs[part] += grad_low @ A
        return grad_x, None if x_low is None else grad_inputs, grad_A, grad_B, grad_gate, None, None


def _add_low_rank(z: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Tensor | None, s: float, base: nn.Module) -> Tensor:
    """z += s · B diag(α) A x, in fp32: one rank's share of the output is below bf16's rounding of it. Returns A x."""
    low = torch.empty(*x.shape[:-1], len(A), dtype=A.dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for part in stretches(x, max(A.shape[1], B.shape[0])):
            low[part] = F.linear(x[part].to(A.dtype), A)
            update = F.linear(low[part] if gate is None else low[part] * gate, B).mul_(s)
            # PEFT rounds the update before it adds over a 4-bit map and after it over a plain one; the last bit
            # follows it, so that the saved adapter is the function that was trained.
            z[part] += update.to(z.dtype) if is_4bit(base) else update
    return low


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

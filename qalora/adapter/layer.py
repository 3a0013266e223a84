"""The gated low-rank layer over a frozen linear map."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from qalora.base.quantized import is_4bit
from qalora.errors import InputError
from qalora.kernels.low_rank import LowRank, LowRankLinear, add_low_rank, frozen_forward

Factors = Mapping[str, tuple[Tensor, Tensor]]  # module → its A (r, in) and B (out, r)


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
    def adapters(self) -> list[str]:
        """The active adapters that have ranks here: with several in a model, not each targets every layer."""
        return [name for name in self.active_adapters if name in self.lora_A]

    @property
    def A(self) -> nn.Parameter:
        """(r, in), fp32, of the first active adapter."""
        return cast(nn.Parameter, self.lora_A[self.adapters[0]].weight)

    @property
    def B(self) -> nn.Parameter:
        """(out, r), fp32, of the first active adapter."""
        return cast(nn.Parameter, self.lora_B[self.adapters[0]].weight)

    @property
    def s(self) -> float:
        return self.scaling[self.adapters[0]]

    @property
    def drops(self) -> bool:
        """Whether a forward now would drop some of the adapter's input."""
        return self.training and any(isinstance(self.lora_dropout[name], nn.Dropout) for name in self.adapters[:1])

    @property
    def differs_by_row(self) -> bool:
        """Whether equal inputs of two rows have different outputs now (kernels/prefixes.py)."""
        return self.gate is not None and self.gate.ndim > 1

    def low_rank(self) -> LowRank:
        """What the layer computes now; several active adapters as one, whose ranks are those of all."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.closed or self.merged or not self.adapters:
            return LowRank(self.base_layer)
        if len(self.adapters) == 1:
            return LowRank(self.base_layer, self.s, self.A, self.B, self.gate)
        A = torch.cat([cast(Tensor, self.lora_A[name].weight) for name in self.adapters])
        B = torch.cat([self.scaling[name] * cast(Tensor, self.lora_B[name].weight) for name in self.adapters], dim=1)
        gate = None if self.gate is None else F.pad(self.gate, (0, len(A) - len(self.A)), value=1.0)
        return LowRank(self.base_layer, 1.0, A, B, gate)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, in) → (batch, tokens, out), in the dtype of x."""
        low_rank = self.low_rank()
        if low_rank.A is None:
            return self._frozen(x)
        x_low = self.lora_dropout[self.adapters[0]](x) if self.drops else None
        if torch.is_grad_enabled():
            return LowRankLinear.apply(x, x_low, low_rank, low_rank.A, low_rank.B, low_rank.gate)
        z = self._frozen(x)
        add_low_rank(z, x, low_rank)
        return z

    def get_delta_weight(self, adapter: str) -> Tensor:
        """(out, in) s · B A, fp32."""
        A, B = (cast(Tensor, pair[adapter].weight) for pair in (self.lora_A, self.lora_B))
        return self.scaling[adapter] * (B @ A)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds s · B A to the weight, as PEFT's `merge_and_unload` asks for, where that is not in 4 bits.

        Raises:
            InputError: a 4-bit weight, whose rounding would take most of the adapter away; or a sum that is not finite,
                with safe_merge.
        """
        base: Any = self.base_layer
        if is_4bit(base):
            raise InputError(
                "merge_and_unload: the base is in 4 bits, which would round most of the adapter away; "
                "qalora.merge(model, adapter, output_dir) merges into its dequantized weights, and verifies them."
            )
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            total = base.weight.data + self.get_delta_weight(adapter).to(base.weight.dtype)
            if safe_merge and not torch.isfinite(total).all():
                raise InputError(f"merge_and_unload: with the adapter {adapter!r} a weight is not finite.")
            base.weight.data = total
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Takes back what `merge` added, to rounding."""
        base: Any = self.base_layer
        while self.merged_adapters:
            base.weight.data -= self.get_delta_weight(self.merged_adapters.pop()).to(base.weight.dtype)

    def _frozen(self, x: Tensor) -> Tensor:
        """W x, in the dtype of x: bitsandbytes' own forward would compute in the base's dtype also where x is fp32."""
        base: Any = self.base_layer
        if x.dtype == (base.compute_dtype if is_4bit(base) else base.weight.dtype) or torch.is_autocast_enabled(
            x.device.type
        ):
            return base(x)
        return frozen_forward(base, x)


def factors_of(layers: Mapping[str, GatedLinear]) -> Factors:
    """The factors that the layers have now, not copied."""
    return {name: (layer.A.data, layer.B.data) for name, layer in layers.items()}


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
def having(layers: Mapping[str, GatedLinear], factors: Factors) -> Iterator[None]:
    """The layers compute with these factors, of any rank, and with their own again at the end, also after an error."""
    own = {name: (layers[name].A, layers[name].B) for name in factors}
    try:
        for name, (A, B) in factors.items():
            # Parameters of their own: autograd keeps the shapes that a parameter had in an earlier graph.
            _take(layers[name], nn.Parameter(A, requires_grad=False), nn.Parameter(B, requires_grad=False))
        yield
    finally:
        for name, (A, B) in own.items():
            _take(layers[name], A, B)


def _take(layer: GatedLinear, A: nn.Parameter, B: nn.Parameter) -> None:
    """Makes these the factors of the layer's first active adapter."""
    layer.lora_A[layer.adapters[0]].weight, layer.lora_B[layer.adapters[0]].weight = A, B


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

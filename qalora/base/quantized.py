"""Everything that touches bitsandbytes' insides: which maps are 4-bit, quantize, dequantize, and a guard."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from qalora.errors import InputError

if TYPE_CHECKING:

    class Weight4bit(Params4bit):
        quant_state: QuantState

    class Map4bit(Linear4bit):
        """bitsandbytes' 4-bit layer, whose own annotations leave out what it holds."""

        weight: Weight4bit


def is_4bit(module: nn.Module) -> TypeGuard[Map4bit]:
    return isinstance(module, Linear4bit)


def linear_maps(model: nn.Module) -> dict[str, nn.Linear]:
    """Full name, as PEFT's rank_pattern writes it → every linear map of the decoder blocks, in the model's order.

    The head is none of them. Adapters are looked through: the maps are the frozen ones, the names those without.
    """
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and "lora_" not in name
    }


def quantize_(
    model: nn.Module,
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype,
    device: str | torch.device | None = None,
) -> None:
    """Replaces every linear map of the blocks by its 4-bit form, one at a time, on the device, or where it is.

    The weights are quantized from `compute_dtype`, so that dequantizing gives that dtype without a cast.
    """
    for name, linear in linear_maps(model).items():
        parent, _, child = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            child,
            quantized(
                linear, quant_type=quant_type, double_quant=double_quant, compute_dtype=compute_dtype, device=device
            ),
        )
        linear.weight.data = torch.empty(0)
    guard_cpu_packing(model)


def quantized(
    linear: nn.Linear,
    *,
    quant_type: str,
    double_quant: bool,
    compute_dtype: torch.dtype,
    device: str | torch.device | None = None,
) -> Linear4bit:
    """The 4-bit form of one map, on the device, or where it is."""
    device = device or linear.weight.device
    module = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=double_quant,
        quant_type=quant_type,
        device="meta",
    )
    weight: Any = Params4bit(
        linear.weight.data.to(compute_dtype),
        requires_grad=False,
        compress_statistics=double_quant,
        quant_type=quant_type,
        module=module,
    )
    module.weight = weight.to(device)  # quantizes
    if linear.bias is not None:
        module.bias = nn.Parameter(linear.bias.data.to(device, compute_dtype), requires_grad=False)
    return module


def dequantize(module: nn.Linear, dtype: torch.dtype = torch.float32) -> Tensor:
    """The (out, in) weight: the exact values of a 4-bit map, or those of a plain one, in `dtype`."""
    if not is_4bit(module):
        return module.weight.detach().to(dtype)
    _refuse_packed(module)
    state = copy.copy(module.weight.quant_state)
    # As one row: bitsandbytes on a CPU lays blocks along rows, but quantizes the flattened matrix.
    state.dtype, state.shape = dtype, torch.Size((1, state.shape.numel()))
    return dequantize_4bit(module.weight.data, state).view(module.out_features, module.in_features)


def guard_cpu_packing(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for CPU decoding, which it does in the first evaluation.

    Repacked weights give the right loss and wrong gradients (cosine 0.3 with the true ones), and cannot be
    dequantized or merged; there is no lossless way back. See `Linear4bit.forward` of bitsandbytes 0.50.

    Raises:
        InputError: a weight is packed already.
    """
    module: Any
    for module in model.modules():
        if is_4bit(module):
            module.support_avx512bf16_for_cpu = False
            _refuse_packed(module)


def _refuse_packed(module: Map4bit) -> None:
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise InputError(
            "the 4-bit weights were repacked for CPU decoding by an evaluation before qalora had them, which ruins "
            "gradients and merging: load the base again, through qalora.load_base."
        )

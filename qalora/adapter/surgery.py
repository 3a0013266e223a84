"""Apply an allocation plan to weights and optimizer state: ranks really leave and enter the tensors.

Parameters keep their identity: a new `nn.Parameter` would leave the optimizer holding the old one, and the layer would
stop training in silence. So `.data` is replaced, and the optimizer's moments are cut and extended alongside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from qalora.adapter.allocation import AllocationPlan
from qalora.adapter.layer import GatedLinear
from qalora.adapter.model import ADAPTER, add_layer, gated_layers, remove_layer, sync_config
from qalora.adapter.saved import read_adapter, scaling_of
from qalora.base.quantized import linear_maps

PAGED = 100_000  # elements of a parameter from which on bitsandbytes pages its moments


def apply_plan(
    model: PeftModel,
    plan: AllocationPlan,
    optimizer: Optimizer | None = None,
    *,
    generator: torch.Generator | None = None,
    new_rows: Mapping[str, Tensor] | None = None,
) -> None:
    """Prunes and grows the layers, their moments, and the LoraConfig.

    A new rank has a random row of A, or one of `new_rows`, and a zero column of B, so growing leaves the function
    unchanged, but for the order in which a processor sums. A module that loses all its ranks leaves the model and the
    optimizer; one that had lost them comes back with new parameters, which the optimizer takes as it takes those of a
    first step.

    Args:
        model: the adapter model.
        plan: what leaves and what enters.
        optimizer: torch's or bitsandbytes' AdamW, bitsandbytes' Lion, transformers' Adafactor, or accelerate's wrapper
            of one.
        generator: CPU generator for the random rows of A, for runs that can be repeated.
        new_rows: module → (n, in), the first rows of A of its new ranks.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    layers = gated_layers(model)
    for name in {**plan.pruned, **plan.grown}:
        layer = layers[name] if name in layers else add_layer(model, name)
        pruned = set(plan.pruned.get(name, ()))
        keep = [rank for rank in range(len(layer.A)) if rank not in pruned]
        grow = plan.grown.get(name, 0)
        if not keep and not grow:
            _forget(optimizer, layer.A, layer.B)
            remove_layer(model, name)
        else:
            rows = _random_rows(grow, layer.A.shape[1], generator)
            given = (new_rows or {}).get(name, rows[:0])[:grow]
            rows[: len(given)] = given
            _resize(layer, optimizer, keep, rows)
            if name not in layers:
                _admit(optimizer, model, layer)
    sync_config(model)


def restore(model: PeftModel, path: str | Path) -> None:
    """Gives the model's adapter the ranks and the weights of a saved one, whatever ranks it has; layers come and go as
    they must.

    Args:
        model: made for the same base.
        path: of a plain PEFT LoRA, such as a checkpoint of the same run.

    Raises:
        InputError: not an adapter for this model.
    """
    saved = read_adapter(path).fitted({name: (m.in_features, m.out_features) for name, m in linear_maps(model).items()})
    config = cast(LoraConfig, model.peft_config[ADAPTER])
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "exclude_modules", "target_modules"):
        setattr(config, name, getattr(saved.config, name))
    layers = gated_layers(model)
    for name in layers.keys() - saved.pairs.keys():
        remove_layer(model, name)
    for name, (A, B) in saved.pairs.items():
        layer = layers[name] if name in layers else add_layer(model, name)
        layer.A.data, layer.B.data = A.to(layer.A, copy=True), B.to(layer.B, copy=True)  # mapped memory is not aligned
        layer.A.grad = layer.B.grad = None
        _note_rank(layer, scaling_of(saved.config, name))


def replace_ranks(layer: GatedLinear, A: Tensor, B: Tensor, scaling: float | None = None) -> None:
    """Gives a layer other ranks.

    Args:
        A: (r, in).
        B: (out, r).
        scaling: None: the one that it has.
    """
    scaling = layer.s if scaling is None else scaling
    layer.A.data, layer.B.data = A.to(layer.A).contiguous(), B.to(layer.B).contiguous()
    layer.A.grad = layer.B.grad = None
    _note_rank(layer, scaling)


def _note_rank(layer: GatedLinear, scaling: float) -> None:
    """What PEFT keeps of a layer besides its tensors."""
    adapter, rank = layer.active_adapters[0], len(layer.A)
    layer.r[adapter], layer.lora_alpha[adapter], layer.scaling[adapter] = rank, scaling * rank, scaling
    A: Any = layer.lora_A[adapter]
    B: Any = layer.lora_B[adapter]
    A.out_features = B.in_features = rank


def _random_rows(count: int, fan_in: int, generator: torch.Generator | None) -> Tensor:
    """PEFT's start of A: Kaiming-uniform with a = √5, which is uniform in ± 1 / √in."""
    return (torch.rand(count, fan_in, generator=generator) * 2 - 1) / math.sqrt(fan_in)


def _resize(layer: GatedLinear, optimizer: Optimizer | None, keep: Sequence[int], new_rows: Tensor) -> None:
    """Keeps some ranks and adds one for each of the new rows of A."""
    scaling, grow = layer.s, len(new_rows)
    for parameter, rank_dim, new in (
        (layer.A, 0, new_rows.to(layer.A)),
        (layer.B, 1, layer.B.new_zeros(layer.B.shape[0], grow)),
    ):
        shape = parameter.shape
        index = torch.tensor(keep, device=parameter.device, dtype=torch.long)
        parameter.data = torch.cat([parameter.data.index_select(rank_dim, index), new], dim=rank_dim).contiguous()
        parameter.grad = None
        _resize_moments(optimizer, parameter, shape, rank_dim, index, grow)

    _note_rank(layer, scaling)


# --------------------------------------------------------------------------------------------------------- moments


def _resize_moments(
    optimizer: Optimizer | None, parameter: nn.Parameter, shape: torch.Size, rank_dim: int, keep: Tensor, grow: int
) -> None:
    """Cuts and extends whatever moments the optimizer holds for a parameter that had `shape`.

    First moments of new ranks start at 0, second moments at the mean of the module's live ranks: Adam's step count is
    the tensor's, so zero second moments would make the first updates of a new rank many times too large.
    """
    state: dict[str, Any] = {} if optimizer is None else optimizer.state.get(parameter, {})
    for key in ("exp_avg", "exp_avg_sq", "state1", "state2"):
        if key not in state:
            continue
        old = _to_fp32(state, key).view(shape)
        live = old.index_select(rank_dim, keep.to(old.device))
        new = live.mean(rank_dim, keepdim=True).repeat_interleave(grow, rank_dim)
        if key in ("exp_avg", "state1"):
            new = torch.zeros_like(new)
        _store(optimizer, parameter, state, key, torch.cat([live, new], dim=rank_dim).contiguous())
    if "exp_avg_sq_row" in state:
        _resize_factors(state, rank_dim, keep, grow)


def _resize_factors(state: dict[str, Tensor], rank_dim: int, keep: Tensor, grow: int) -> None:
    """Adafactor's second moments, row_i · col_j / mean(row), where row and col are means over each other's axis: those
    of the ranks that stay do not change, and those of new ranks are their mean."""
    of_ranks, beside = ("exp_avg_sq_row", "exp_avg_sq_col")[:: 1 if rank_dim == 0 else -1]
    old = state[of_ranks]
    live = old.index_select(0, keep.to(old.device))
    mean = (live if len(live) else old).mean()
    state[of_ranks] = torch.cat([live, mean.expand(grow)])
    state[beside] = state[beside] * (mean / old.mean())


def _to_fp32(state: dict[str, Tensor], key: str) -> Tensor:
    """A moment in fp32. bitsandbytes' 8-bit moments are uint8 codes with one absmax per 256 *flattened* elements:
    cut by shape, codes would part from their scales."""
    if state[key].dtype != torch.uint8:
        return state[key]
    absmax, code = state[f"absmax{key[-1]}"], state[f"qmap{key[-1]}"]
    return dequantize_blockwise(state[key].to(absmax.device), absmax=absmax, code=code, blocksize=256)


def _store(optimizer: object, parameter: nn.Parameter, state: dict[str, Tensor], key: str, value: Tensor) -> None:
    """Puts a moment back in the form it had: torch's fp32, or bitsandbytes' 32- or 8-bit, paged or not."""
    old = state[key]
    if old.dtype == torch.uint8:
        value, quantized = quantize_blockwise(value, code=state[f"qmap{key[-1]}"], blocksize=256)
        state[f"absmax{key[-1]}"] = quantized.absmax
    if hasattr(optimizer, "get_state_buffer") and hasattr(optimizer, "page_mng"):
        _give_up(optimizer, [old])
        state[key] = _buffer(optimizer, parameter, old.dtype)
        state[key].copy_(value)
    else:
        state[key] = value


# Managed memory that no moment is in any more. bitsandbytes never frees what it takes of it, so it is used again.
_spare: list[Tensor] = []


def _give_up(optimizer: Any, moments: Iterable[Tensor]) -> None:
    """Takes moments out of those that bitsandbytes pages."""
    gone = [moment for moment in moments if getattr(moment, "is_paged", False)]
    pages = optimizer.page_mng.paged_tensors
    pages[:] = [page for page in pages if not any(page is moment for moment in gone)]
    _spare.extend(gone)


def _buffer(optimizer: Any, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """Room for a moment of the parameter, as bitsandbytes places it: on the device, or paged."""
    needed = parameter.numel() * dtype.itemsize
    fitting = [spare for spare in _spare if spare.untyped_storage().nbytes() >= needed]
    if not (optimizer.is_paged and parameter.numel() >= PAGED and parameter.device.type != "cpu" and fitting):
        return optimizer.get_state_buffer(parameter, dtype=dtype)  # type: ignore[no-any-return]
    spare = min(fitting, key=lambda spare: spare.untyped_storage().nbytes())
    _spare[:] = [other for other in _spare if other is not spare]
    again: Any = torch.empty(0, dtype=dtype).set_(spare.untyped_storage(), 0, parameter.shape)  # type: ignore[call-overload]
    again.is_paged, again.page_deviceid = True, spare.page_deviceid  # type: ignore[attr-defined]
    optimizer.page_mng.paged_tensors.append(again)
    return again  # type: ignore[no-any-return]


def page_again(optimizer: Any) -> None:
    """Moments that bitsandbytes would page go back into managed memory: loading a checkpoint has put them on the
    device."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            loaded = state.get(key)
            if loaded is not None and loaded.device.type != "cpu" and parameter.numel() >= PAGED:
                state[key] = _buffer(optimizer, parameter, loaded.dtype).copy_(loaded)


def _forget(optimizer: Optimizer | None, *parameters: nn.Parameter) -> None:
    if optimizer is None:
        return
    gone = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    for parameter in parameters:
        state = optimizer.state.pop(parameter, {})
        if hasattr(optimizer, "page_mng"):
            _give_up(optimizer, state.values())


def _admit(optimizer: Optimizer | None, model: PeftModel, layer: GatedLinear) -> None:
    """Has a new layer trained with the settings of the others, each matrix with those of its kind.

    Parameters stand in the model's order: a checkpoint numbers them by their place, and a resumed run lists them so.
    """
    if optimizer is None:
        return
    place = {id(parameter): index for index, parameter in enumerate(model.parameters())}
    others = [other for other in gated_layers(model).values() if other is not layer]
    for parameter, kind in ((layer.A, {id(other.A) for other in others}), (layer.B, {id(other.B) for other in others})):
        groups = [group for group in optimizer.param_groups if any(id(member) in kind for member in group["params"])]
        group = (groups or optimizer.param_groups)[0]
        group["params"] = sorted([*group["params"], parameter], key=lambda member: place[id(member)])

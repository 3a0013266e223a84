"""What torch and bitsandbytes are told, so that they take the device of fake_cuda.py for one of CUDA."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from fake_cuda import CUDA, SPECIAL, aten, is_cuda
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only


def give_torch(device):
    """From here on torch, in this process, has the device."""
    import transformers.utils.import_utils as import_utils

    class Stream(MagicMock):
        device = CUDA

    save, stream, state, F = torch.save, Stream(), torch.zeros(16, dtype=torch.uint8), nn.functional
    facts = SimpleNamespace(name="no GPU", total_memory=device.total, major=9, minor=0, multi_processor_count=132)

    def host(x):
        real = device.real(x.detach()) if is_cuda(x) else x
        return torch.empty(x.shape, dtype=x.dtype) if real is None else real.clone() if is_cuda(x) else x

    nothing = "_lazy_init init set_device synchronize manual_seed manual_seed_all set_rng_state set_rng_state_all"
    cuda = dict(
        mem_get_info=lambda *_: (device.total - device.allocated, device.total), empty_cache=gc.collect,
        memory_stats=lambda *_: {"active_bytes.all.peak": device.peak}, reset_peak_memory_stats=device.reset_peak,
        **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *_: device.allocated),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda *_: device.peak),
        set_per_process_memory_fraction=device.set_fraction,
        get_per_process_memory_fraction=lambda *_: device.fraction,
        **dict.fromkeys(("is_available", "_is_compiled", "is_initialized", "is_bf16_supported"), always(True)),
        device_count=always(1), current_device=always(0), is_current_stream_capturing=always(False),
        get_device_capability=always((9, 0)), get_device_name=always(facts.name), get_device_properties=always(facts),
        get_rng_state=always(state), get_rng_state_all=always([state]), Stream=Stream, Event=Stream,
        current_stream=always(stream), default_stream=always(stream), stream=always(nullcontext()),
        cudart=always(MagicMock()), **dict.fromkeys(nothing.split(), always(None)),
    )  # fmt: skip
    put(torch.cuda, torch.cuda.memory, torch.cuda.random, **cuda)
    put(Tensor, pin_memory=lambda self, *_: self, is_pinned=always(False), record_stream=always(None))
    put(torch, save=lambda value, *args, **kwargs: save(tree_map_only(Tensor, host, value), *args, **kwargs))
    FusedNorm.device = device
    put(F, scaled_dot_product_attention=attention(device, F.scaled_dot_product_attention), rms_norm=rms_norm)
    put(torch.backends.cuda, is_built=always(True))
    put(nn.Module, _apply=moved)
    put(import_utils, is_fake_tensor=always(False))  # else masks are made as for an export
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the host first
    give_bitsandbytes(device)
    device.__enter__()


class FusedNorm(torch.autograd.Function):
    """torch's RMSNorm as CUDA has it, a kernel forward and a kernel backward; its CPU build composes it of others."""

    on_a_cpu = staticmethod(nn.functional.rms_norm)
    device = None

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        ctx.compute = lambda x, *weight: FusedNorm.on_a_cpu(x, shape, *(weight or [None]), eps)
        return FusedNorm.device.launched("rms_norm", ctx.compute, x, *([] if weight is None else [weight]))

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors

        def of(grad, *given):
            return torch.func.vjp(lambda x: ctx.compute(x, *given[1:]), given[0])[1](grad)[0]

        return (
            FusedNorm.device.launched("rms_norm_backward", of, grad, x, *([] if weight is None else [weight])),
            None,
            None,
            None,
        )


def rms_norm(x, shape, weight=None, eps=None):
    return (FusedNorm.apply if is_cuda(x) else FusedNorm.on_a_cpu)(x, shape, weight, eps)


def attention(device, on_a_cpu):
    """scaled_dot_product_attention by the kernel that an Ampere card takes (sdp_utils.cpp)."""

    def attend(*states, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        query, key, value = states
        if not is_cuda(query):
            return on_a_cpu(*states, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if device.values:
            math, more = aten._scaled_dot_product_attention_math, {"scale": scale, "enable_gqa": enable_gqa}
            return math(*states, attn_mask, dropout_p, is_causal, None, **more)[0]
        if attn_mask is None and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(*states, dropout_p, is_causal, False, scale=scale)[0]
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        sums, efficient = query.requires_grad, aten._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, sums, dropout_p, is_causal, scale=scale)[0]

    return attend


def moved(module, fn, recurse=True):
    """Module.to and the like: what moves becomes another object, the same for tied ones, for it cannot take the other's
    data."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for tensors in (module._parameters, module._buffers):
        for name, x in [(name, x) for name, x in tensors.items() if x is not None]:
            with torch.no_grad():
                value = fn(x)
            if value is x:
                continue
            if isinstance(x, nn.Parameter) and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=x.requires_grad)
            last = x.__dict__.get("last")
            same = last is not None and (last.device, last.dtype) == (value.device, value.dtype)
            tensors[name] = x.last = last if same else value
    return module


def put(*places, **values):
    for place in places:
        for name in values.keys() & set(dir(place)):
            setattr(place, name, values[name])


def always(value):
    return lambda *_, **__: value


def _update(device, func, *args, **kwargs):
    """An optimizer of bitsandbytes. Its kernels take what pointers they get, so what they read is checked here."""
    grad, parameter, *moments = args[1:5]
    for moment in filter(lambda moment: moment is not None, moments):
        assert is_cuda(moment) or getattr(moment, "is_paged", False), "a moment neither on the card nor paged"
        assert moment.numel() == parameter.numel()
    assert grad.shape == parameter.shape and grad.dtype == parameter.dtype
    assert grad.is_contiguous() and parameter.is_contiguous()
    return device.computed(func, args, kwargs) if device.values else None


def give_bitsandbytes(of):
    """Params4bit is made with _make_subclass, which FakeTensors do not allow; managed memory comes through ctypes."""
    import bitsandbytes.functional as F
    from bitsandbytes.nn import Params4bit

    class FakeParams4bit(FakeTensor, Params4bit): ...

    new, quantize = Params4bit.__new__, Params4bit._quantize
    defaults = dict(quant_state=None, blocksize=64, compress_statistics=True, quant_type="fp4",
                    quant_storage=torch.uint8, module=None, bnb_quantized=False)  # fmt: skip

    def make(cls, data=None, requires_grad=False, *args, **kwargs):
        if not is_cuda(data):
            return new(cls, data, requires_grad, *args, **kwargs)
        parameter = data.detach()
        parameter.__class__, parameter._is_param = FakeParams4bit, True
        given = {**dict(zip(defaults, args, strict=False)), **kwargs}
        parameter.__dict__.update({name: given.get(name) or default for name, default in defaults.items()})
        return parameter.requires_grad_(requires_grad)

    def on_the_device(self, target):
        if torch.device(target).type != "cuda":
            return quantize(self, target)
        form = self.blocksize, self.compress_statistics, self.quant_type, self.quant_storage
        data, state = F.quantize_4bit(self.data.contiguous().to(target), None, None, *form)
        if self.module is not None:
            self.module.quant_state = state
        return Params4bit(data, False, state, *form, self.module, True)

    def paged(*shape, dtype=torch.float32, device=None):
        out = torch.zeros(*shape, dtype=dtype)
        out.is_paged, out.page_deviceid = True, 0
        of.paged += out.nbytes
        return out

    for name in ("optimizer_update_32bit", "optimizer_update_8bit_blockwise"):
        SPECIAL[getattr(torch.ops.bitsandbytes, name).default] = _update
    F.name2qmap.clear()  # tables that were made before there was a device
    put(Params4bit, __new__=staticmethod(make), _quantize=on_the_device)
    put(F, get_paged=paged, prefetch_tensor=always(None), fill=lambda tensor, value, **_: tensor.fill_(value))

"""A CUDA device without hardware, as a plugin of pytest: `pytest -p fake_cuda`, with the built shim.cpp in
FAKE_CUDA_SHIM.

Tensors of cuda:0 are FakeTensors: shapes, dtypes, devices, autograd. A dispatch mode sees every operation on them, and

counts       bytes that are allocated, as torch's allocator rounds them; kernels; and where the host waits for the
             device
computes     with `values`, in host memory behind every storage; else integers alone, which shapes depend on

It sees no speed, no races of streams, no numerics of CUDA kernels, and of their scratch only what SCRATCH models.
"""

from __future__ import annotations

import ctypes
import gc
import os
import traceback
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

ctypes.CDLL(os.environ["FAKE_CUDA_SHIM"], mode=ctypes.RTLD_GLOBAL)  # before torch
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a dispatch mode is one thread's

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only  # noqa: E402

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
INTEGERS = 1 << 26  # bytes of a tensor of integers that is computed without `values`


def is_cuda(x):
    return isinstance(x, FakeTensor)


class Device(TorchDispatchMode):
    """The device, and what it has seen.

    Attributes:
        values: whether floating-point tensors are computed too.
        limit, allocated, peak: bytes; paged: bytes of managed memory ever taken.
        syncs: place in the code → how often the host waited there.
        kernels: operation → how often it was launched.
    """

    def __init__(self, total=80 * 2**30):
        super().__init__()
        self.values, self.total, self.limit, self.fraction = True, total, total, 1.0
        self.shapes = FakeTensorMode(allow_non_fake_inputs=True)
        self.sizes, self.memory = {}, {}  # of each storage: bytes allocated, and the host memory behind it
        self.allocated = self.peak = self.paged = 0
        self.syncs, self.kernels = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default and is_cuda(args[0]):
            return CUDA
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(map(is_cuda, tensors)) and torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return func(*args, **kwargs)
        if func in SPECIAL and (out := SPECIAL[func](self, func, *args, **kwargs)) is not NotImplemented:
            return out
        if any(not is_cuda(x) and x.ndim for x in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        known = all(x.untyped_storage()._cdata in self.memory for x in tensors if is_cuda(x))
        assert known or not self.values, f"fake CUDA: {func} of values that are not known"
        masked = func is aten.index.Tensor and any(x.dtype == torch.bool for x in tensors[1:])
        if masked or func in WAITS:
            self.wait(func)
            assert known or tensors[0].dtype.is_floating_point or tensors[0].dtype == torch.bool, f"{func}: not known"
            return tree_map_only(Tensor, self.like, self.computed(func, args, kwargs)) if known else 1
        if not func.is_view and func not in NO_KERNEL:
            self.kernels[str(func)] += 1
        if func._schema.is_mutable:
            return self.written(func, args, kwargs, known)
        if known and self.values and not func.is_view:
            return tree_map_only(Tensor, self.like, self.computed(func, args, kwargs))
        with self.shapes:
            out = func(*tree_map(self.faked, args), **tree_map(self.faked, kwargs))
        fresh = [x for x in tree_leaves(out) if is_cuda(x) and x.untyped_storage()._cdata not in self.sizes]
        scratch = self.allocate(SCRATCH[func](*args)) if func in SCRATCH else 0
        try:
            for x in fresh:
                self.track(x)
        finally:
            self.allocated -= scratch
        if known and any(map(self.computes, fresh)):
            for x, value in zip(tree_leaves(out), tree_leaves(self.computed(func, args, kwargs)), strict=True):
                self.fill(x, value)
        return out

    def launched(self, name, compute, x, *others):
        """The output, in the shape of x, of a kernel that no operation of torch's CPU build stands for."""
        self.kernels[name] += 1
        out = torch.empty_like(x)
        if self.values:
            self.fill(out, compute(*map(self.real, (x, *others))))
        return out

    def computed(self, func, args, kwargs):
        """What an operation gives on the host, of the memory behind its arguments."""

        def behind(x):
            return self.real(x) if is_cuda(x) else torch.device("cpu") if isinstance(x, torch.device) else x

        return func(*tree_map(behind, args), **tree_map(behind, kwargs))

    def written(self, func, args, kwargs, known):
        """What an operation returns that writes into its arguments: those."""
        named = func._schema.arguments
        given = dict(zip((argument.name for argument in named), args, strict=False)) | kwargs
        writes = [a.name for a in named if a.alias_info is not None and a.alias_info.is_write]
        into = [given[name] for name in writes if name in given]
        if known:
            self.computed(func, args, kwargs)
        for x in () if known else filter(is_cuda, tree_leaves(into)):
            self.memory.pop(x.untyped_storage()._cdata, None)
        returned = len(func._schema.returns)
        return None if not returned else into[0] if returned == 1 else tuple(into)

    # ------------------------------------------------------------ storages, and the memory behind them

    def allocate(self, nbytes):
        size = (nbytes + 511) // 512 * 512
        if self.allocated + size > self.limit:
            gc.collect()
        if self.allocated + size > self.limit:
            raise torch.OutOfMemoryError(f"fake CUDA: {size} bytes beside {self.allocated} of {self.limit}")
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        return size

    def track(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = self.allocate(storage.nbytes())
            weakref.finalize(storage, self.release, storage._cdata)

    def release(self, key):
        self.allocated -= self.sizes.pop(key)
        self.memory.pop(key, None)

    def computes(self, tensor):
        return self.values or (not tensor.dtype.is_floating_point and tensor.untyped_storage().nbytes() <= INTEGERS)

    def real(self, tensor):
        """The CPU tensor over the memory behind a fake one; None where its values are not known."""
        memory = self.memory.get(tensor.untyped_storage()._cdata)
        if memory is None:
            return None
        with torch._C._DisableTorchDispatch():
            empty = torch.empty(0, dtype=tensor.dtype)
            return empty.set_(memory, tensor.storage_offset(), tensor.size(), tensor.stride())

    def fill(self, tensor, value):
        storage = tensor.untyped_storage()
        self.memory.pop(storage._cdata, None)
        if value is not None and self.computes(tensor):
            with torch._C._DisableTorchDispatch():
                self.memory[storage._cdata] = torch.UntypedStorage(storage.nbytes())
                self.real(tensor).copy_(value.detach())

    def like(self, value):
        """A tensor on the device with the shape and the values of one on the host."""
        with torch._C._DisableTorchDispatch():
            shape = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
            out = FakeTensor(self.shapes, shape, CUDA)
        self.track(out)
        self.fill(out, value)
        return out

    def faked(self, x):
        real = isinstance(x, Tensor) and not is_cuda(x)
        return self.shapes.fake_tensor_converter.from_real_tensor(self.shapes, x) if real else x

    # ------------------------------------------------------------ what tests ask

    def wait(self, func):
        """Counts a host that waits, by the line that asked."""
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and "fake_cuda" not in f.filename]
        self.syncs[f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno} {func}"] += 1

    @contextmanager
    def counted(self):
        """(syncs, kernels) of the code within."""
        self.syncs, self.kernels = found = Counter(), Counter()
        yield found

    def reset_peak(self, *_):
        self.peak = self.allocated

    def set_fraction(self, fraction, *_):
        self.fraction, self.limit = fraction, int(fraction * self.total)


# ------------------------------------------------------------ operations that are not as on a CPU


def _to_copy(device, func, x, /, *, non_blocking=False, **options):
    """Between host and device, as empty_like and its kind."""
    if is_cuda(x) == (torch.device(options.get("device") or x.device).type == "cuda"):
        return NotImplemented
    copies = func is aten._to_copy.default
    if copies and not non_blocking and (is_cuda(x) or x.numel() > 1):  # one number goes with the command
        device.wait(func)
    with torch._C._DisableTorchDispatch():
        here = None if not copies else device.real(x) if is_cuda(x) else x
        here = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype) if here is None else here
        value = func(here, **{**options, "device": None, "pin_memory": None})
        return value.clone() if is_cuda(x) else device.like(value)


def _copy_(device, func, to, source, non_blocking=False):
    if is_cuda(to) == is_cuda(source):
        return NotImplemented
    if not non_blocking and source.numel() > 1:
        device.wait(func)
    there, here = (device.real(x) if is_cuda(x) else x for x in (to, source))
    if there is not None and here is not None:
        there.copy_(here)
    elif there is None and to.is_contiguous() and to.nbytes == to.untyped_storage().nbytes():
        device.fill(to, here)
    return to


def _update(device, func, *args, **kwargs):
    """An optimizer of bitsandbytes. Its kernels take what pointers they get, so what they read is checked here."""
    grad, parameter, *moments = args[1:5]
    for moment in filter(lambda moment: moment is not None, moments):
        assert is_cuda(moment) or getattr(moment, "is_paged", False), "a moment neither on the card nor paged"
        assert moment.numel() == parameter.numel()
    assert grad.shape == parameter.shape and grad.dtype == parameter.dtype
    assert grad.is_contiguous() and parameter.is_contiguous()
    return device.computed(func, args, kwargs) if device.values else None


def _flash_scratch(grad, query, key, *_):
    """FlashAttention-2's backward (flash_api.cpp): dq in fp32, the softmax's sums, and under grouped queries dk and
    dv of all of them."""
    rows, heads, tokens, size = query.shape
    whole = (tokens + 127) // 128 * 128
    expanded = 2 * query.element_size() * rows * heads * key.shape[2] * size if key.shape[1] != heads else 0
    return 4 * rows * heads * whole * (-(-size // 32) * 32 + 1) + expanded


def _efficient_scratch(grad, query, *_):
    """The memory-efficient backward: sums, and dq in fp32."""
    return query.shape[0] * query.shape[1] * query.shape[2] * 4 * (1 + query.shape[3] * (query.dtype != torch.float32))


SPECIAL = {
    aten.copy_.default: _copy_,
    **dict.fromkeys((aten._to_copy.default, aten.empty_like.default, aten.zeros_like.default), _to_copy),
}
SCRATCH = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_scratch,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_scratch,
}
WAITS = {
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.bincount.default,
}  # fmt: skip
NO_KERNEL = {
    aten.detach.default, aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default,
    aten.new_empty.default, aten.new_empty_strided.default, aten._unsafe_view.default, aten._reshape_alias.default,
}  # fmt: skip


class FusedNorm(torch.autograd.Function):
    """torch's RMSNorm as CUDA has it, a kernel forward and a kernel backward; its CPU build composes it of others."""

    on_a_cpu = staticmethod(nn.functional.rms_norm)

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        ctx.compute = lambda x, *weight: FusedNorm.on_a_cpu(x, shape, *(weight or [None]), eps)
        return DEVICE.launched("rms_norm", ctx.compute, x, *([] if weight is None else [weight]))

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors

        def of(grad, *given):
            return torch.func.vjp(lambda x: ctx.compute(x, *given[1:]), given[0])[1](grad)[0]

        return (
            DEVICE.launched("rms_norm_backward", of, grad, x, *([] if weight is None else [weight])),
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


# ------------------------------------------------------------ torch.cuda and bitsandbytes


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
    put(F, scaled_dot_product_attention=attention(device, F.scaled_dot_product_attention), rms_norm=rms_norm)
    put(torch.backends.cuda, is_built=always(True))
    put(nn.Module, _apply=moved)
    put(import_utils, is_fake_tensor=always(False))  # else masks are made as for an export
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the host first
    give_bitsandbytes(device)
    device.__enter__()


# ------------------------------------------------------------ the plugin

DEVICE = Device()


def pytest_sessionstart(session):
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401  what looks for devices at import has looked

    give_torch(DEVICE)
    gc.freeze()  # all of it stays: no collection need look at it again


@pytest.fixture
def device():
    """The device, empty, with values."""
    gc.collect()
    DEVICE.set_fraction(1.0)
    DEVICE.reset_peak()
    return DEVICE


@pytest.fixture
def shapes_only(device):
    """The device, which computes integers alone."""
    device.values = False
    yield device
    device.values = True

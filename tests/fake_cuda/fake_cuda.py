"""A CUDA device without hardware, as a plugin of pytest: `pytest -p fake_cuda`, with the built shim.cpp in
FAKE_CUDA_SHIM.

Tensors of cuda:0 are FakeTensors: shapes, dtypes, devices, autograd. A dispatch mode sees every operation on them, and

counts       bytes that are allocated, as torch's allocator rounds them; kernels; and where the host waits for the
device
computes     with `values`, in host memory behind every storage; else integers alone, which shapes depend on

It sees no speed, no races of streams, no numerics of CUDA kernels, and of their scratch only what is modelled in
SCRATCH.
"""

from __future__ import annotations

import ctypes
import gc
import os
import traceback
import types
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

ctypes.CDLL(os.environ["FAKE_CUDA_SHIM"], mode=ctypes.RTLD_GLOBAL)  # before torch
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a dispatch mode is one thread's

import pytest  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.weak import WeakTensorKeyDictionary  # noqa: E402

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
REPOSITORY = Path(__file__).resolve().parents[2]
INTEGERS = 1 << 26  # bytes of a tensor of integers that is computed without `values`


def is_cuda(x):
    return isinstance(x, FakeTensor)


def mapped(function, x):
    if isinstance(x, (list, tuple)):
        return type(x)(mapped(function, one) for one in x)
    return {name: mapped(function, one) for name, one in x.items()} if isinstance(x, dict) else function(x)


def leaves(x):
    if isinstance(x, (list, tuple, dict)):
        return [leaf for one in (x.values() if isinstance(x, dict) else x) for leaf in leaves(one)]
    return [x]


class Device(TorchDispatchMode):
    """The device, and what it has seen.

    Attributes:
        values: whether floating-point tensors are computed too.
        limit, allocated, peak: bytes.
        syncs: place in the code → how often the host waited there.
        kernels: operation → how often it was launched.
    """

    def __init__(self, values=True, total=80 * 2**30):
        super().__init__()
        self.values, self.total, self.limit = values, total, total
        self.shapes = FakeTensorMode(allow_non_fake_inputs=True)
        self.shapes.shape_env = None
        self.sizes, self.memory = {}, {}  # of each storage: bytes allocated, and the host memory behind it
        self.allocated = self.peak = self.fraction = 0
        self.syncs, self.kernels = Counter(), Counter()
        self.paged = 0  # bytes of managed memory ever taken

    # ---------------------------------------------------------------------------------------------- storages

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
        nbytes = tensor.untyped_storage().nbytes()
        return self.values or (not tensor.dtype.is_floating_point and nbytes <= INTEGERS)

    def real(self, tensor):
        """The CPU tensor over the memory behind a fake one; None where its values are not known."""
        memory = self.memory.get(tensor.untyped_storage()._cdata)
        if memory is None:
            return None
        with torch._C._DisableTorchDispatch():
            return torch.empty(0, dtype=tensor.dtype).set_(
                memory, tensor.storage_offset(), tensor.size(), tensor.stride()
            )

    def fill(self, tensor, value):
        storage = tensor.untyped_storage()
        self.memory.pop(storage._cdata, None)
        if value is None or not self.computes(tensor):
            return
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

    # ---------------------------------------------------------------------------------------------- operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and is_cuda(args[0]):
            return CUDA
        tensors = [x for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(map(is_cuda, tensors)) and torch.device(kwargs.get("device") or "cpu").type != "cuda":
            kwargs = {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs
            return args[0] if func in PINNING else func(*args, **kwargs)
        if func in SPECIAL:
            out = SPECIAL[func](self, func, *args, **kwargs)
            if out is not NotImplemented:
                return out
        if any(not is_cuda(x) and x.ndim for x in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        known, real_args, real_kwargs = self.behind(args, kwargs)
        assert known or not self.values, f"fake CUDA: {func} of values that are not known"
        if func in DEPENDS_ON_VALUES:
            self.wait(func)
            return mapped(lambda x: self.like(x) if isinstance(x, torch.Tensor) else x, func(*real_args, **real_kwargs))
        if not func.is_view and func not in NO_KERNEL:
            self.kernels[str(func)] += 1
        if func._schema.is_mutable:
            return self.written(func, args, kwargs, lambda: func(*real_args, **real_kwargs) if known else None, known)
        if known and self.values and not func.is_view and func not in SCRATCH:
            found = func(*real_args, **real_kwargs)
            return mapped(lambda x: self.like(x) if isinstance(x, torch.Tensor) else x, found)
        with self.shapes:
            out = func(*mapped(self.faked, args), **mapped(self.faked, kwargs))
        fresh = [x for x in leaves(out) if is_cuda(x) and x.untyped_storage()._cdata not in self.sizes]
        scratch = self.allocate(SCRATCH[func](*args)) if func in SCRATCH else 0
        try:
            for x in fresh:
                self.track(x)
        finally:
            self.allocated -= scratch
        if known and any(self.computes(x) for x in fresh):
            for x, value in zip(leaves(out), leaves(func(*real_args, **real_kwargs)), strict=True):
                self.fill(x, value)
        return out

    def behind(self, args, kwargs):
        """(whether all values are known, the arguments as an operation on the host takes them)."""
        known = True

        def one(x):
            nonlocal known
            if is_cuda(x):
                x = self.real(x)
                known &= x is not None
            return torch.device("cpu") if isinstance(x, torch.device) else x

        real = mapped(one, args), mapped(one, kwargs)
        return known, *real

    def written(self, func, args, kwargs, compute, known):
        """What an operation returns that writes into its arguments: those."""
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        into = [
            given[a.name]
            for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write and a.name in given
        ]
        compute()
        for x in leaves(into) if not known else ():
            if is_cuda(x):
                self.memory.pop(x.untyped_storage()._cdata, None)
        returned = len(func._schema.returns)
        return None if not returned else into[0] if returned == 1 else tuple(into)

    def faked(self, x):
        if isinstance(x, torch.Tensor) and not is_cuda(x):
            return self.shapes.fake_tensor_converter.from_real_tensor(self.shapes, x)
        return x

    def wait(self, func):
        """Counts a host that waits, by the line that asked."""
        ours = [
            f
            for f in traceback.extract_stack()
            if "site-packages/torch" not in f.filename and "fake_cuda" not in f.filename
        ]
        at = ours[-1]
        self.syncs[f"{'/'.join(Path(at.filename).parts[-2:])}:{at.lineno} {func}"] += 1

    # ------------------------------------------------------------ what torch.cuda says

    def reset_peak(self, *_):
        self.peak = self.allocated

    def set_fraction(self, fraction, *_):
        self.fraction, self.limit = fraction, int(fraction * self.total)

    @contextmanager
    def counted(self):
        """(syncs, kernels) of the code within."""
        self.syncs, self.kernels = found = Counter(), Counter()
        yield found


# ------------------------------------------------------------ operations that are not as on a CPU


def _item(device, func, x):
    device.wait(func)
    real = device.real(x)
    if real is None and not x.dtype.is_floating_point and x.dtype != torch.bool:
        raise RuntimeError("fake CUDA: an integer that is not known was asked for")
    return func(real) if real is not None else True if x.dtype == torch.bool else 0.0


def _to_copy(device, func, x, /, **options):
    target = options.get("device")
    if is_cuda(x) and (target is None or torch.device(target).type == "cuda"):
        return NotImplemented
    # One number goes to the driver with the command, and needs no wait.
    if not options.pop("non_blocking", False) and (is_cuda(x) or x.numel() > 1):
        device.wait(func)
    options = {**options, "device": None, "pin_memory": None}
    with torch._C._DisableTorchDispatch():
        if not is_cuda(x):
            value = func(x, **options)
        else:
            real = device.real(x)
            if real is None:
                return torch.empty_strided(x.size(), x.stride(), dtype=options.get("dtype") or x.dtype)
            return func(real, **options).clone()
    return device.like(value)


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


def _like(device, func, x, /, **options):
    """empty_like and its kind, of a tensor on the other side."""
    if torch.device(options.get("device") or x.device).type == x.device.type:
        return NotImplemented
    with torch._C._DisableTorchDispatch():
        out = func(
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype), **{**options, "device": None, "pin_memory": False}
        )
    return out if is_cuda(x) else device.like(out)


def _equal(device, func, a, b):
    device.wait(func)
    return torch.equal(device.real(a), device.real(b))


def _index(device, func, x, indices):
    """Masks become positions first, as CUDA's own index does it; their number is the host's to know."""
    if not any(index is not None and index.dtype == torch.bool for index in indices):
        return NotImplemented
    device.wait(func)
    found = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool
        found += [device.like(p) for p in device.real(index).nonzero(as_tuple=True)] if mask else [index]
    return device.__torch_dispatch__(func, (), (x, found))


def _update(device, func, grad, parameter, state1, state2, *args, **kwargs):
    """An optimizer of bitsandbytes. Its kernels take what pointers they get, so what they would read is checked
    here."""

    def moments():
        return (s for s in (state1, state2) if s is not None)

    assert all(is_cuda(s) or getattr(s, "is_paged", False) for s in moments()), (
        "a moment is neither on the card nor paged"
    )
    assert all(s.numel() == parameter.numel() for s in moments()) and grad.shape == parameter.shape
    assert grad.is_contiguous() and parameter.is_contiguous() and grad.dtype == parameter.dtype
    real = mapped(lambda x: device.real(x) if is_cuda(x) else x, (grad, parameter, state1, state2, *args))
    if device.values:
        func(*real, **kwargs)


def _of_update(device, func, name, grad, *args, **kwargs):
    return _update(device, lambda *real, **more: func(name, *real, **more), grad, *args, **kwargs)


SPECIAL = {
    aten._local_scalar_dense.default: _item,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.equal.default: _equal,
    aten.index.Tensor: _index,
    **dict.fromkeys((aten.empty_like.default, aten.zeros_like.default), _like),
}
PINNING = {aten.pin_memory.default, aten._pin_memory.default}
DEPENDS_ON_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.bincount.default}
NO_KERNEL = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
aten.detach.default,
             aten._unsafe_view.default, aten._reshape_alias.default, aten.new_empty_strided.default}  # fmt: skip


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


SCRATCH = {
    aten._scaled_dot_product_flash_attention_backward.default: _flash_scratch,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_scratch,
}


def attention(device, on_a_cpu):
    """scaled_dot_product_attention by the kernel that an Ampere card takes (sdp_utils.cpp)."""

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not is_cuda(query):
            return on_a_cpu(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if device.values:
            return aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0]
        if attn_mask is None and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        log_sums = torch.is_grad_enabled() and query.requires_grad
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, log_sums, dropout_p, is_causal, scale=scale
        )[0]

    return attend


# ------------------------------------------------------------ torch.cuda and bitsandbytes


class Stream:
    device, stream_id, cuda_stream = CUDA, 0, 0

    def __init__(self, *_, **__): ...
    def __enter__(self):
        return self

    def __exit__(self, *_): ...
    def wait_stream(self, other): ...
    def record(self, *_): ...
    def synchronize(self): ...


_moved = WeakTensorKeyDictionary()  # parameter → what it became last: tied ones stay tied


def moved(module, fn, recurse=True):
    """Module.to and the like. A parameter cannot take the data of another kind of tensor, so one that moves becomes
    another object."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in module._parameters.items():
        with torch.no_grad():
            value = None if parameter is None else fn(parameter)
        if value is None or value is parameter:
            continue
        if not isinstance(value, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=parameter.requires_grad)
        last = _moved.get(parameter)
        same = last is not None and (last.device, last.dtype) == (value.device, value.dtype)
        _moved[parameter] = module._parameters[name] = last if same else value
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else fn(buffer)
    return module


@contextmanager
def bitsandbytes(device):
    """Params4bit is made with _make_subclass, which FakeTensors do not allow; managed memory comes through ctypes."""
    import bitsandbytes.functional as F
    from bitsandbytes.nn import Params4bit

    class FakeParams4bit(FakeTensor, Params4bit): ...

    new, quantize = Params4bit.__new__, Params4bit._quantize
    names = (
        "quant_state",
        "blocksize",
        "compress_statistics",
        "quant_type",
        "quant_storage",
        "module",
        "bnb_quantized",
    )
    defaults = dict(
        blocksize=64, compress_statistics=True, quant_type="fp4", quant_storage=torch.uint8, bnb_quantized=False
    )

    def make(cls, data=None, requires_grad=False, *args, **kwargs):
        if not is_cuda(data):
            return new(cls, data, requires_grad, *args, **kwargs)
        parameter = data.detach()
        parameter.__class__, parameter._is_param = FakeParams4bit, True
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        parameter.__dict__.update({name: given.get(name) or defaults.get(name) for name in names})
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

    of = device
    SPECIAL[torch.ops.bitsandbytes.optimizer_update_32bit.default] = _of_update
    SPECIAL[torch.ops.bitsandbytes.optimizer_update_8bit_blockwise.default] = _of_update
    tables = dict(F.name2qmap)
    F.name2qmap.clear()
    with (
        patch.object(Params4bit, "__new__", staticmethod(make)), patch.object(Params4bit, "_quantize", on_the_device),
        patch.multiple(F, get_paged=paged, prefetch_tensor=lambda *_, **__: None, fill=lambda tensor, value,
        **_: tensor.fill_(value)),
    ):  # fmt: skip
        yield
    F.name2qmap.clear()
    F.name2qmap.update(tables)


@contextmanager
def cuda(device):
    """Within it torch has the device."""
    import transformers.utils.import_utils as import_utils

    save, stream = torch.save, Stream()
    facts = types.SimpleNamespace(
        name="no GPU", total_memory=device.total, major=9, minor=0, multi_processor_count=132, warp_size=32
    )

    def host(x):
        real = device.real(x.detach()) if is_cuda(x) else None
        return x if not is_cuda(x) else torch.empty(x.shape, dtype=x.dtype) if real is None else real.clone()

    def always(value):
        return lambda *_, **__: value

    memory = dict(
        mem_get_info=lambda *_: (device.total - device.allocated, device.total), empty_cache=gc.collect,
        memory_allocated=lambda *_: device.allocated, memory_reserved=lambda *_: device.allocated,
        max_memory_allocated=lambda *_: device.peak, max_memory_reserved=lambda *_: device.peak,
        reset_peak_memory_stats=device.reset_peak,
        memory_stats=lambda *_: {"active_bytes.all.peak": device.peak},
        set_per_process_memory_fraction=device.set_fraction,
        get_per_process_memory_fraction=lambda *_: device.fraction or 1.0,
    )  # fmt: skip
    state = torch.zeros(16, dtype=torch.uint8)
    nothing = (
        "_lazy_init",
        "init",
        "set_device",
        "synchronize",
        "manual_seed",
        "manual_seed_all",
        "set_rng_state",
        "set_rng_state_all",
        "ipc_collect",
    )
    others = dict(
        is_available=always(True), _is_compiled=always(True), device_count=always(1), current_device=always(0),
        is_initialized=always(True),
        get_device_capability=always((9, 0)), get_device_name=always(facts.name), get_device_properties=always(facts),
        is_bf16_supported=always(True), get_rng_state=always(state), get_rng_state_all=always([state]),
        Stream=Stream, Event=Stream,
        current_stream=always(stream), default_stream=always(stream), stream=lambda s: s or nullcontext(),
        is_current_stream_capturing=always(False), cudart=always(types.SimpleNamespace(cudaHostRegister=always(0),
        cudaHostUnregister=always(0))), **dict.fromkeys(nothing, always(None)),
    )  # fmt: skip
    functional, tensor = torch.nn.functional, torch.Tensor
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # torch.tensor(…, device="cuda") is made on the host, and comes through the mode
    with (
        bitsandbytes(device), patch.multiple(torch.cuda, **memory, **others), patch.multiple(torch.cuda.memory,
        **memory),
        patch.multiple(torch.cuda.random, **{name: others[name] for name in others if hasattr(torch.cuda.random,
        name)}),
        patch.multiple(tensor, pin_memory=lambda self, *_: self, is_pinned=always(False), record_stream=always(None)),
        patch.object(torch, "save", lambda value, *args, **kwargs: save(mapped(host, value), *args, **kwargs)),
        patch.object(functional, "scaled_dot_product_attention", attention(device,
        functional.scaled_dot_product_attention)),
        patch.object(torch.backends.cuda, "is_built", always(True)), patch.object(torch.nn.Module, "_apply", moved),
        patch.object(import_utils, "is_fake_tensor", always(False)),  # else masks are made as for an export
        device,
    ):  # fmt: skip
        yield device


# ------------------------------------------------------------ the plugin

DEVICE = Device()
_on = cuda(DEVICE)


def pytest_sessionstart(session):
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401  what looks for devices at import has looked

    _on.__enter__()


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

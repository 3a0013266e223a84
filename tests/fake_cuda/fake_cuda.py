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
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ctypes.CDLL(os.environ["FAKE_CUDA_SHIM"], mode=ctypes.RTLD_GLOBAL)  # before torch
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a dispatch mode is one thread's

import pytest  # noqa: E402
import torch  # noqa: E402
from bitsandbytes.functional import name2qmap  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_impls import has_meta, op_implementations_checks  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
INTEGERS = 1 << 26  # bytes of a tensor of integers that is computed without `values`


def is_cuda(x):
    return isinstance(x, FakeTensor)


def found_in(values):
    """The tensors among the arguments of an operation, or what it puts out, in order."""
    found = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, list | tuple):
            found += found_in(x)
    return found


def each(change, x):
    """The same, with every tensor changed."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, dict):
        return {name: each(change, value) for name, value in x.items()}
    return type(x)([each(change, value) for value in x]) if isinstance(x, list | tuple) else x


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
        tensors = found_in(args) + found_in(kwargs.values())
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
            if known:
                return each(self.like, self.computed(func, args, kwargs))
            return not tensors[0].dtype.is_floating_point  # all is well, and no number is not finite
        if not func.is_view and func not in NO_KERNEL:
            self.kernels[func] += 1
        if func._schema.is_mutable:
            return self.written(func, args, kwargs, known)
        if known and self.values and not func.is_view:
            return each(self.like, self.computed(func, args, kwargs))
        out = self.shaped(func, args, kwargs, tensors)
        fresh = [x for x in found_in([out]) if is_cuda(x) and x.untyped_storage()._cdata not in self.sizes]
        scratch = self.allocate(SCRATCH[func](*args)) if func in SCRATCH else 0
        try:
            for x in fresh:
                self.track(x)
        finally:
            self.allocated -= scratch
        if known and any(map(self.computes, fresh)):
            for x, value in zip(found_in([out]), found_in([self.computed(func, args, kwargs)]), strict=True):
                self.fill(x, value)
        return out

    def shaped(self, func, args, kwargs, tensors):
        """What an operation puts out, without values. FakeTensorMode knows that of all, at a cost; for most of them
        it would do no more than this."""
        if kwargs.get("device") is None and meta_says_all(func) and all(map(is_cuda, tensors)):
            with in_kernel_invocation_manager(self.shapes):
                out = func(*args, **kwargs)
            return each(lambda x: FakeTensor(self.shapes, x, CUDA), out)
        with self.shapes:
            return func(*each(self.faked, args), **each(self.faked, kwargs))

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
            return self.real(x) if is_cuda(x) else x

        on_host = {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
        return func(*each(behind, args), **each(behind, kwargs | on_host))

    def written(self, func, args, kwargs, known):
        """What an operation returns that writes into its arguments: those."""
        named = func._schema.arguments
        given = dict(zip((argument.name for argument in named), args, strict=False)) | kwargs
        writes = [a.name for a in named if a.alias_info is not None and a.alias_info.is_write]
        into = [given[name] for name in writes if name in given]
        if known:
            self.computed(func, args, kwargs)
        for x in () if known else filter(is_cuda, found_in(into)):
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
        return x if is_cuda(x) else self.shapes.fake_tensor_converter.from_real_tensor(self.shapes, x)

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


@cache
def meta_says_all(func):
    """Whether FakeTensorMode runs an operation's kernel for shapes as it is."""
    has_rule = any(applies(func) for applies, _ in op_implementations_checks)
    return func.is_view or func is aten._unsafe_view.default or (has_meta(func) and not has_rule)


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


# ------------------------------------------------------------ the plugin

DEVICE = Device()


def switch_on():
    """From here on torch, in this process, has the device."""
    from torch_with_device import give_torch

    give_torch(DEVICE)
    return DEVICE


def pytest_sessionstart(session):
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401  what looks for devices at import has looked

    switch_on()
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
    name2qmap.clear()  # made without values

"""CuPy: device memory only, any strides; knows bfloat16, no float8; cannot hold read-only memory or host arrays.

Memory of torch and of others is taken by its address: `UnownedMemory` holds an owner that is released exactly with
CuPy's last view, which a DLPack import does not offer, and asks the driver nothing when the device is given. CuPy's own
transfers wait for nothing that is pinned, and pin what is not: bytes go by `_staging`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from tensorbridge import _dtypes
from tensorbridge._adapters import as_it_is
from tensorbridge._array import (
    CPU,
    ArrayInfo,
    Device,
    Traits,
    by_stride,
    c_strides,
    layout,
    order_text,
    reach,
    shape_text,
    size_class,
)
from tensorbridge._cuda import _lease, _staging, _stream_order, _streams
from tensorbridge._refuse import Obstacle, askew
from tensorbridge._roads import CAPTURED, PINNED
from tensorbridge._step import Op, Step, Want


def open(x: Any, want: Want) -> tuple[Any, Traits, Want]:
    found = traits(x)
    return x, found, want.settled(found.dtype)


def traits(x: Any) -> Traits:
    name = _dtypes.of_numpy(np.dtype(x.dtype))
    if not name or not _dtypes.DTYPES[name.lstrip(">")].cupy:
        raise Obstacle("unknown dtype", f"cupy {x.dtype} {shape_text(x.shape)}")
    lay = layout(x.shape, x.strides, x.itemsize)
    device = Device(f"cuda:{x.data.device_id}")
    aligned = not x.size or x.data.ptr % x.itemsize == 0
    size = size_class(x.size * x.itemsize)
    return Traits("cupy", device, name, *lay, aligned, size=size)


def describe(x: Any, traits: Traits) -> ArrayInfo:
    return ArrayInfo(
        traits.framework,
        traits.device,
        traits.dtype,
        x.shape,
        x.strides,
        x.size * x.itemsize,
        order_text(traits.order, traits.spacing),
        True,
        False,
        None,
        "",
        None,
        _streams.current("cupy", traits.device.index),
        int(x.data.ptr),
        traits.overlap,
    )


def performer(step: Step, before: Traits, want: Want) -> Callable[..., Any]:
    op, after = step.op, step.after
    order = "C" if before.overlap else "K"
    source, target = before.device.index, after.device.index
    if op == Op.CAST:
        dtype = _dtypes.DTYPES[after.dtype].numpy
        return _on(source, lambda x: x.astype(dtype, order=order))
    if op in (Op.COPY, Op.PACK):
        if askew(before):
            return _on(source, lambda x: _copied_by_bytes(x, order))
        return _on(source, lambda x: x.copy(order=order))
    if op == Op.STACK:
        return _on(source, lambda parts: parts.stacked(cupy.stack))
    if op == Op.TO_HOST:
        return _on(source, lambda x: downloaded(x, source))
    if op == Op.TO_DEVICE:
        if before.device != CPU:
            return _on(target, lambda x: _peer_copied(x, source, target))
        return _on(target, lambda a: uploaded(a, target, pinned=step.by == PINNED, non_blocking=want.non_blocking))
    if op == Op.FILL:
        return _on(source if want.framework == "numpy" else target, _filler(before, want))
    if op == Op.SHARE:
        return from_torch(before, capturing=step.by == CAPTURED) if before.framework == "torch" else as_it_is
    if op == Op.ORDER:
        return _stream_order.ordered(before, "torch")
    return {Op.RESTRIDE: as_it_is}[op]


def _on(index: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Run on a device, and leave the current one as it was."""

    def run(*arrays: Any) -> Any:
        with cupy.cuda.Device(index):
            return function(*arrays)

    return run


def _copied_by_bytes(x: Any, order: str) -> Any:
    """A dense copy that reads no element whole."""
    axes, back = by_stride(x.strides if order == "K" else c_strides(x.shape, x.itemsize))
    source = x.transpose(axes)
    one_byte = (*source.shape, x.itemsize), np.uint8, source.data, (*source.strides, 1)
    out = cupy.ndarray(source.shape, x.dtype, cupy.ndarray(*one_byte).copy().data)
    return out.transpose(back)


# -- Memory of others


def from_torch(before: Traits, *, capturing: bool) -> Callable[[Any], Any]:
    """The memory of a tensor (an alias of the caller's), which torch does not reuse before CuPy's stream is done."""
    index, itemsize = before.device.index, _dtypes.itemsize(before.dtype)
    dtype = _dtypes.DTYPES[before.dtype].numpy
    plain = before.order == "C" and before.spacing == "dense"

    def share(t: Any) -> Any:
        _lease.settle()
        stream = cupy.cuda.get_current_stream(index)
        number = int(stream.ptr) or _streams.LEGACY_DEFAULT
        owner = _lease.lend_tensor(t, number, index, stream, capturing=capturing)
        shape = tuple(t.shape)
        strides = None if plain else tuple([s * itemsize for s in t.stride()])
        return _at(t.data_ptr(), shape, strides, dtype, owner, index)

    return share


def imported(x: Any) -> Any:
    """Device memory of another library, ordered here by an event (`cupy.asarray` would make the host wait).

    A capsule is not consumed: it frees itself when the lease lets go of it.
    """
    index = x.device.index
    _lease.settle()
    x.wait_in("cupy")
    stream = cupy.cuda.get_current_stream(index)
    number = int(stream.ptr) or _streams.LEGACY_DEFAULT
    _streams.hold(number, index, stream)  # the lease records on it when the last view is gone
    owner = _lease.lend_array((x.capsule, x.producer), number, index)
    return _at(x.address, x.shape, x.strides, _dtypes.DTYPES[x.dtype].numpy, owner, index)


def device_at(address: int) -> int:
    """The device that has memory there, as the driver says; negative if none has. (`UnownedMemory` would take the
    current one for none.)
    """
    found = cupy.cuda.runtime.pointerGetAttributes(address)
    return -1 if found.type == cupy.cuda.runtime.memoryTypeUnregistered else int(found.device)


def _at(address: int, shape: Any, strides: Any, dtype: Any, owner: object, index: int) -> Any:
    """A CuPy array over this memory. With the device given, the driver is asked nothing."""
    low, high = (0, math.prod(shape) * dtype.itemsize) if strides is None else reach(shape, strides, dtype.itemsize)
    memory = cupy.cuda.UnownedMemory(address + low, high - low, owner, index)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, -low), strides)


def plain_from_torch(t: Any) -> Any:
    """The lane of `to_cupy`: a plain tensor, of exactly torch's type, on one stream with CuPy; None for others."""
    dtype = _SHARED.get(t.dtype)
    if dtype is None or _streams.in_child or t.requires_grad or t.is_neg() or t.is_nested:
        return None
    try:
        dense, address, index = t.is_contiguous(), t.data_ptr(), t.get_device()
        held = t.storage_offset() * t.element_size() + t.nbytes <= t.untyped_storage().nbytes()
    except RuntimeError:  # of torch.func, functional or sparse: it has no memory of its own
        return None
    if not (dense and held):  # after a `resize_` that failed, a tensor claims more than there is
        return None
    stream = cupy.cuda.get_current_stream(index)
    number = int(stream.ptr) or _streams.LEGACY_DEFAULT
    if not address or number == _streams.PER_THREAD_DEFAULT or number != _streams.current("torch", index):
        return None
    if _streams.capturing():
        return None
    _lease.settle()
    owner = _lease.lend_tensor(t.detach(), number, index, stream)
    memory = cupy.cuda.UnownedMemory(address, t.nbytes, owner, index)
    return cupy.ndarray(tuple(t.shape), dtype, cupy.cuda.MemoryPointer(memory, 0))


# torch's dtypes that CuPy has as themselves; complex tensors may be conjugate only by name, and are looked at in full.
_SHARED: dict[Any, Any] = {}


Array = cupy.ndarray


def open_lane(dtypes: dict[str, Any]) -> None:
    """`dtypes`: torch's, by name."""
    _SHARED.update(
        {
            dtype: _dtypes.DTYPES[name].numpy
            for name, dtype in dtypes.items()
            if _dtypes.DTYPES[name].cupy and not _dtypes.is_complex(name)
        }
    )


# -- Over the bus


def _bytes(a: Any) -> Any:
    """The memory of a dense host array, in whatever order its axes lie."""
    return a.transpose(by_stride(a.strides)[0]).reshape(-1).view(np.uint8)


def uploaded(a: Any, index: int, *, pinned: bool, non_blocking: bool) -> Any:
    """A dense host array, in its own memory order, on the current device."""
    axes, back = by_stride(a.strides)
    block = a.transpose(axes)
    out = cupy.empty(block.shape, dtype=block.dtype)
    if block.size:
        options = {"pinned": pinned, "non_blocking": non_blocking}
        _staging.upload(_bytes(a), framework="cupy", index=index, into=out, **options)
    return out.transpose(back)


def downloaded(x: Any, index: int) -> Any:
    """A dense device array, in its own memory order, as an ordinary NumPy array."""
    axes, back = by_stride(x.strides)
    out = np.empty([x.shape[axis] for axis in axes], np.dtype(x.dtype))
    if x.size:
        _staging.download(x, framework="cupy", index=index, out=out.reshape(-1).view(np.uint8))
    return out.transpose(back)


def _peer_copied(x: Any, source: int, target: int) -> Any:
    """A dense array on another device, the current one. Between two devices CuPy orders nothing, before or
    after the copy, and keeps no source.
    """
    there, here = _streams.current("cupy", source), _streams.current("cupy", target)
    _stream_order.link(there, here, source, target)
    axes, back = by_stride(x.strides)
    out = x.transpose(axes).copy()
    _lease.keep(x, here, target)
    _stream_order.link(here, there, target, source)
    return out.transpose(back)


def _filler(before: Traits, want: Want) -> Callable[..., Any]:
    index = before.device.index

    def into_numpy(x: Any, out: Any) -> Any:
        if x.strides == out.strides and x.size:
            _staging.download(x, framework="cupy", index=index, out=_bytes(out), pinned=_is_pinned(out))
        else:
            np.copyto(out, downloaded(x, index))
        return out

    def into_cupy(x: Any, out: Any) -> Any:
        source, target = x.data.device_id, out.data.device_id
        if source != target:
            if before.spacing != "dense":
                with cupy.cuda.Device(source):
                    x = x.copy(order="K")
            x = _peer_copied(x, source, target)
        cupy.copyto(out, x, casting="unsafe")
        return out

    return into_numpy if want.framework == "numpy" else into_cupy


def _is_pinned(a: Any) -> bool:
    runtime = cupy.cuda.runtime
    return bool(runtime.pointerGetAttributes(a.__array_interface__["data"][0]).type == runtime.memoryTypeHost)

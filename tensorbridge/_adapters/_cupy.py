"""CuPy: device memory only, any strides; knows bfloat16, no float8; cannot hold read-only memory or host arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from tensorbridge import _dtypes, _streams
from tensorbridge._array import ArrayInfo, Device, Traits, layout, order_text, shape_text, size_class
from tensorbridge._plan import Op, Step, Want
from tensorbridge._refuse import Obstacle


def open(x: Any, want: Want) -> tuple[Any, Traits]:
    return x, traits(x)


def traits(x: Any) -> Traits:
    name = _dtypes.of_numpy(np.dtype(x.dtype))
    if not name or not _dtypes.DTYPES[name.lstrip(">")].cupy:
        raise Obstacle("unknown dtype", f"cupy {x.dtype} {shape_text(x.shape)}")
    lay = layout(x.shape, x.strides, x.itemsize)
    device = Device(f"cuda:{x.device.id}")
    size = size_class(x.size * x.itemsize)
    return Traits("cupy", device, name, lay.order, lay.spacing, lay.overlap, lay.loose, size=size)


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
        return _on(source, lambda x: x.copy(order=order))
    if op == Op.STACK:
        return _on(source, lambda parts: parts.stacked(cupy.stack))
    if op == Op.TO_HOST:
        return _on(source, _downloaded)
    if op == Op.TO_DEVICE:
        return _on(target, _uploaded if before.framework == "numpy" else _peer_copied)
    if op == Op.FILL:
        return _on(source, _filler(before, want))
    if op == Op.SHARE:
        return _on(source, _from_torch) if before.framework == "torch" else _same
    return {Op.RESTRIDE: _same, Op.ORDER: _same}[op]


def _on(index: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Run on a device, and leave the current one as it was."""

    def run(*arrays: Any) -> Any:
        with cupy.cuda.Device(index):
            return function(*arrays)

    return run


def _same(x: Any) -> Any:
    return x


def _from_torch(t: Any) -> Any:
    """By DLPack: torch makes the current CuPy stream wait for its own."""
    return cupy.from_dlpack(t)


def imported(x: Any) -> Any:
    """Device memory of another library; CuPy itself waits for the stream that an array interface names."""
    with cupy.cuda.Device(x.device.index):
        return cupy.from_dlpack(x) if x.capsule is not None else cupy.asarray(x.producer)


def _axes_by_stride(x: Any) -> list[int]:
    return sorted(range(x.ndim), key=lambda i: (-abs(x.strides[i]), i))


def _uploaded(a: Any) -> Any:
    """One dense host block, in its own memory order, to the current device; returns when the source may change."""
    axes = _axes_by_stride(a)
    block = a.transpose(axes)
    out = cupy.empty(block.shape, dtype=block.dtype)
    if block.size:
        stream = cupy.cuda.get_current_stream()
        out.set(np.ascontiguousarray(block), stream=stream)
        stream.synchronize()
    return out.transpose(np.argsort(axes)) if a.ndim else out


def _downloaded(x: Any) -> Any:
    """A dense device block, in its own memory order, as an ordinary NumPy array; waits for the copy."""
    axes = _axes_by_stride(x)
    block = x.transpose(axes).get(blocking=True)
    return block.transpose(np.argsort(axes)) if x.ndim else block


def _peer_copied(x: Any) -> Any:
    return x.copy(order="K")


def _filler(before: Traits, want: Want) -> Callable[..., Any]:
    def into_numpy(x: Any, out: Any) -> Any:
        x.get(out=out, blocking=True)
        return out

    def into_cupy(x: Any, out: Any) -> Any:
        cupy.copyto(out, x, casting="unsafe")
        return out

    return into_numpy if want.framework == "numpy" else into_cupy

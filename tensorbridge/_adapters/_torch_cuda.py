"""torch on CUDA: memory of CuPy and of others under a lease, and blocks over the bus by the roads of `_staging`.

torch's import keeps the exporter alive until the storage dies, which says nothing about work still queued on a stream:
`_lease` does. Streams are ordered before (Op.ORDER), so the exporter is told -1, "order nothing": it would do it again,
through streams of whatever device is current. `.to` and `.cpu` keep a graph, lazy bits and odd layouts, and wait for
the stream; whole blocks of plain bytes go through the ring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorbridge import _dtypes
from tensorbridge._adapters import _dlpack, _numpy
from tensorbridge._array import CPU, FROM_LARGE, Traits
from tensorbridge._cuda import _lease, _staging, _stream_order, _streams
from tensorbridge._errors import ProducerError
from tensorbridge._roads import PINNED, RING
from tensorbridge._step import Step, Want


def from_cupy(before: Traits) -> Callable[[Any], Tensor]:
    """A CuPy array as a tensor over the same memory, which CuPy's pool gets back when torch's stream is done."""
    index = before.device.index
    dtype = getattr(torch, before.dtype)
    carrier = _dtypes.DTYPES[before.dtype].carrier

    def share(x: Any) -> Tensor:
        _lease.settle()
        if not x.size:  # CuPy's null pointers have no place in a capsule
            return torch.empty(x.shape, dtype=dtype, device=f"cuda:{index}")
        number = _streams.current("torch", index)
        _lease.hold_if_current(number, index)
        capsule = (x.view(carrier) if carrier else x).__dlpack__(stream=-1, max_version=(1, 0))
        t = _imported(capsule, index)
        _lease.lend_storage(t, x, number, index)
        return t.view(dtype) if carrier else t

    return share


def plain_from_cupy(x: Any) -> Tensor | None:
    """The lane of `to_torch`: a plain array, of exactly CuPy's type, on one stream with torch; None for others."""
    if x.dtype not in _SHARED or not x.size or not x.flags.c_contiguous or _streams.in_child:
        return None
    data = x.data
    if data.ptr % x.itemsize:
        return None
    index = data.device_id
    if not _streams.usable("torch"):
        return None
    number = _streams.current("torch", index)
    if number != _streams.current("cupy", index) or _streams.capturing():
        return None
    _lease.settle()
    _lease.hold_if_current(number, index)
    t = _imported(x.__dlpack__(stream=-1, max_version=(1, 0)), index)
    _lease.lend_storage(t, x, number, index)
    return t


_SHARED = frozenset(row.numpy for row in _dtypes.DTYPES.values() if row.cupy and row.torch and not row.carrier)


def _imported(capsule: Any, index: int) -> Tensor:
    if torch.cuda.current_device() == index:
        return _read(capsule)
    with torch.cuda.device(index):
        return _read(capsule)


def _read(capsule: Any) -> Tensor:
    try:
        return torch.utils.dlpack.from_dlpack(capsule)
    except BufferError:  # torch knows managed memory by no name; it is CUDA's, at an address as any other
        if not _dlpack.name_as_plain(capsule):
            raise
        return torch.utils.dlpack.from_dlpack(capsule)


def _seen_again(t: Tensor) -> Tensor:
    """A tensor over the same memory with a storage of its own, which holds `t`."""
    return _imported(torch._C._to_dlpack(t), t.get_device())


class _Interface:
    """The array interface of a producer as it was read, so that torch sees the same facts."""

    def __init__(self, address: int, shape: Any, strides: Any, typestr: str, producer: Any) -> None:
        self.producer = producer
        self.__cuda_array_interface__ = {
            "version": 2,  # torch orders by no stream, whatever the version
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
            "data": (address, False),
        }


def device_at(address: int) -> int:
    """The device that has memory there; negative if none has. Given a device, torch asks nobody, or copies."""
    try:
        with torch._C.DisableTorchFunction():  # a default device would be given
            t = torch.as_tensor(_Interface(address, (1,), None, "|u1", None))
    except RuntimeError:
        return -1
    return t.get_device() if t.data_ptr() == address else -1


def imported(x: Any) -> Tensor:
    """Device memory of another library, ordered here, and kept until torch's stream is done with it.

    What only its capsule holds is freed with the storage that torch makes of it. That one is the lease's: the caller
    gets another, over the same memory, whose end is not yet the end of the work on it.
    """
    index, owner = x.device.index, x.producer
    _lease.settle()
    number = _streams.current("torch", index)
    _lease.hold_if_current(number, index)
    x.wait_in("torch")
    if x.capsule is not None:
        held = _imported(x.capsule, index)
        t, owner = _seen_again(held), (held, x.producer)
    else:
        dtype: Any = _dtypes.DTYPES[x.dtype].numpy
        shown = _Interface(x.address, x.shape, x.strides, dtype.str, x.producer)
        with torch.cuda.device(index):
            t = torch.as_tensor(shown, device=f"cuda:{index}")
    if t.numel() and t.data_ptr() != x.address:
        raise ProducerError(f"{type(x.producer).__name__} is a malformed producer: torch finds other memory.")
    _lease.lend_storage(t, owner, number, index)
    return t


# -- Over the bus


def flat(t: Tensor) -> Tensor:
    """The memory of a dense tensor, in whatever order its axes lie, as bytes; with its version counter."""
    return t.detach().as_strided((t.numel(),), (1,)).view(torch.uint8)


def bytes_of(t: Tensor) -> Any:
    """The memory of a dense host tensor as a NumPy array of bytes. `Tensor.numpy` would freeze its storage for good."""
    return np.asarray(_numpy.Memory(t.data_ptr(), (t.nbytes,), (1,), "|u1", False, t))


def _mark(index: int) -> _stream_order.Mark:
    return _stream_order.mark(_streams.current("torch", index), index)


def to_host(before: Traits, step: Step) -> Callable[[Tensor], Tensor]:
    index = before.device.index

    def through_ring(t: Tensor) -> Tensor:
        host = _staging.download(flat(t), framework="torch", index=index)
        return torch.from_numpy(host).view(t.dtype).as_strided(t.shape, t.stride())

    def into_pinned(t: Tensor) -> Tensor:
        out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu", pin_memory=True)
        out.copy_(t, non_blocking=True)
        _mark(index).synchronize()
        return out

    return _settling({RING: through_ring, PINNED: into_pinned}.get(step.by, lambda t: t.cpu()))


def to_device(before: Traits, step: Step, want: Want) -> Callable[[Tensor], Tensor]:
    device, index = str(step.after.device), step.after.device.index

    def through_ring(t: Tensor) -> Tensor:
        out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        _staging.upload(bytes_of(t), framework="torch", index=index, into=flat(out))
        return out

    def from_pinned(t: Tensor) -> Tensor:
        out = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
        out.copy_(t, non_blocking=True)
        _done_with(t, index, want)
        return out

    def plain(t: Tensor) -> Tensor:
        out = t.to(device, non_blocking=want.non_blocking)
        if want.non_blocking and before.device == CPU:
            _done_with(t, index, want)  # it may be pinned without anybody knowing
        return out

    return _settling({RING: through_ring, PINNED: from_pinned}.get(step.by, plain))


def _settling(move: Callable[..., Any]) -> Callable[..., Any]:
    """After a transfer, which may have waited, some of the memory that is lent out may be free again."""

    def run(*tensors: Tensor) -> Any:
        result = move(*tensors)
        _lease.settle()
        return result

    return run


def _done_with(source: Tensor, index: int, want: Want) -> None:
    """The source of a transfer under way: waited for, or kept until it is done."""
    if want.non_blocking:
        _lease.keep(source, _streams.current("torch", index), index)
    else:
        _mark(index).synchronize()


def filler(before: Traits, want: Want) -> Callable[[Tensor, Tensor], object] | None:
    """Fill a tensor on the other side of CUDA's bus; None where torch's own copy does."""
    out = want.out
    assert out is not None
    if {before.device.type, out.device.type} != {"cpu", "cuda"}:
        return None
    same = before.dtype == out.dtype and before.spacing == out.spacing == "dense" and not before.lazy
    index = (out if before.device == CPU else before).device.index

    def fill(target: Tensor, source: Tensor) -> None:
        if out.lazy:  # `copy_` across the bus takes no notice of a mark on either side
            target.copy_(source.to(target.device))
            return
        block = same and source.stride() == target.stride()
        host = target if out.device == CPU else source
        if not block or (not host.is_pinned() and before.size not in FROM_LARGE):
            target.copy_(source)
        elif host.is_pinned():
            target.copy_(source, non_blocking=True)
            _done_with(source, index, want)
        elif out.device == CPU:
            _staging.download(flat(source), framework="torch", index=index, out=bytes_of(target))
            torch.autograd.graph.increment_version(target)  # the ring's writes are not seen by autograd
        else:
            _staging.upload(bytes_of(source), framework="torch", index=index, into=flat(target))

    return _settling(fill)

"""The steps that torch performs: each function makes of an array what the planner has promised of it.

`Tensor.numpy` and `torch.from_numpy` share; `copy_`, `clone` and `to` copy. NumPy's memory is taken for large results
(`_engine`), and borrowed for a moment without making the storage of a tensor unresizable for good.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensorbridge import _dtypes, _engine, _readonly
from tensorbridge._adapters import _numpy, _torch_cuda, as_it_is
from tensorbridge._array import ON_A_TENSOR, Traits
from tensorbridge._cuda import _stream_order
from tensorbridge._step import Op, Step, Want

DTYPES: dict[str, Any] = {
    name: getattr(torch, row.torch) for name, row in _dtypes.DTYPES.items() if row.torch and hasattr(torch, row.torch)
}
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
IN_NUMPY: dict[torch.dtype, Any] = {
    dtype: _dtypes.DTYPES[name].numpy or np.dtype((np.void, dtype.itemsize)) for name, dtype in DTYPES.items()
}
_CARRIER: dict[str, Any] = {
    name: getattr(torch, _dtypes.DTYPES[name].carrier) for name in DTYPES if _dtypes.DTYPES[name].carrier
}


def performer(step: Step, before: Traits, want: Want) -> Callable[..., Any]:
    if step.by == _engine.IN_PIECES and before.graph:
        whole, pieces = _performer(step._replace(by="torch"), before, want), _performer(step, before, want)
        recorded = torch.is_grad_enabled if want.framework == "torch" else lambda: False
        return lambda *arrays: (whole if recorded() else torch.no_grad()(pieces))(*arrays)
    return _performer(step, before, want)


def _performer(step: Step, before: Traits, want: Want) -> Callable[..., Any]:
    op, after = step.op, step.after
    packed = torch.contiguous_format if before.overlap else torch.preserve_format
    if op == Op.SHARE:
        if before.framework == "torch" and after.framework == "numpy":
            return _to_numpy(before.dtype)
        if before.framework == "numpy":
            return _shared(before)
        return _torch_cuda.from_cupy(before) if before.framework == "cupy" else as_it_is
    if op == Op.FILL:
        return _filler(before, step, want)
    if op == Op.STACK and before.origin:
        write = _in_pieces if step.by == _engine.IN_PIECES else _written
        return lambda parts: parts.stacked(partial(_stacked_as, write), DTYPES[after.dtype])
    if step.by == _engine.IN_PIECES and op == Op.STACK:
        return lambda parts: parts.stacked(stacked_in_pieces)
    if step.by == _engine.IN_PIECES and not _engine.in_numpy_pages(before, after.dtype, step.by):
        dtype = DTYPES[after.dtype]
        return lambda t: _in_pieces(torch.empty_like(t, dtype=dtype, memory_format=packed), t)
    if op in (Op.CAST, Op.COPY) and before.framework == "numpy":
        return _array_copied(before, after)
    chosen = op in (Op.CAST, Op.COPY) or step.by == "numpy"
    if chosen and _engine.in_numpy_pages(before, after.dtype, step.by):
        return _into_numpy_pages(before, after, step.by)
    if op == Op.CAST:
        dtype = DTYPES[after.dtype]
        return lambda t: t.to(dtype, memory_format=packed)
    if op in (Op.COPY, Op.PACK):
        return _by_parts if _engine.faults(before) else lambda t: t.clone(memory_format=packed)
    if op == Op.TO_DEVICE:
        return _torch_cuda.to_device(before, step, want)
    if op == Op.TO_HOST:
        return _torch_cuda.to_host(before, step)
    if op == Op.ORDER:
        return _stream_order.ordered(before, "cupy")
    if op == Op.STACK:
        return lambda parts: parts.stacked(stacked)
    return {
        Op.DETACH: lambda t: t.detach(),
        Op.RESOLVE: (lambda t: t.clone()) if before.lazy == "zero" else _resolved(before),
        Op.PIN: lambda t: torch.empty_like(t, pin_memory=True).copy_(_steady(t)),  # pin_memory() may do nothing
    }[op]


# On a device that only torch knows, a negative bit is made true without a copy, which torch would make, and which
# Apple's does not see that bit in (pytorch#184403).


def _true_sign(t: Tensor) -> Tensor:
    return torch._neg_view(t).neg() if t.is_neg() else t


def _resolved(before: Traits) -> Callable[[Tensor], Tensor]:
    if before.device.is_other:
        return lambda t: _true_sign(t).resolve_conj()
    return lambda t: t.resolve_conj().resolve_neg()


def stacked(tensors: list[Tensor], out: Tensor | None = None) -> Tensor:
    if not (tensors[0].is_cpu or tensors[0].is_cuda):
        tensors = [_true_sign(t) for t in tensors]
    return torch.stack([_steady(t) for t in tensors] if tensors[0].dtype == torch.complex128 else tensors, out=out)


def _stacked_as(write: Callable[[Tensor, Tensor], Tensor], tensors: list[Tensor], *, dtype: torch.dtype) -> Tensor:
    """Tensors of any dtypes, none of them in a graph, in one of `dtype`, each element written once."""
    out = torch.empty((len(tensors), *tensors[0].shape), dtype=dtype, device=tensors[0].device)
    for row, t in zip(out, tensors, strict=True):
        write(row, t)
    return out


def _written(out: Tensor, t: Tensor) -> Tensor:
    """`out.copy_(t)`, which loses marks where it casts."""
    return out.copy_(_steady(t.resolve_conj().resolve_neg()))


def _steady(t: Tensor) -> Tensor:
    """`t`, or a copy where torch's kernels may fault (`_engine.faults`)."""
    if t.dtype != torch.complex128 or not t.is_cpu or not (0 in t.stride() or t.numel() == 1):
        return t
    return _by_parts(t) if t.data_ptr() % t.element_size() else t


def _by_parts(t: Tensor) -> Tensor:
    """`t.clone()`, of numbers that need not be aligned to more than their two parts are."""
    return torch.view_as_complex(torch.view_as_real(t.resolve_conj()).clone(memory_format=torch.contiguous_format))


def stacked_in_pieces(tensors: list[Tensor], out: Tensor | None = None) -> Tensor:
    """Tensors of one shape, dtype and device: the host."""
    if out is None:
        out = torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype, device="cpu")
    for row, t in zip(out, tensors, strict=True):
        _in_pieces(row, t)
    return out


# From so many elements on, torch's loops are shared by its threads.
_GRAIN = 32768


def _in_pieces(out: Tensor, t: Tensor) -> Tensor:
    """`out.copy_(t)`, without threads. `t` is cut across the axis on which its elements lie farthest apart."""
    if t.numel() < _GRAIN:
        return _written(out, t)
    strides, longest = t.stride(), 0
    for axis, n in enumerate(t.shape):
        if n > 1 and (t.shape[longest] == 1 or strides[axis] > strides[longest]):
            longest = axis
    half = t.shape[longest] // 2
    for start, length in ((0, half), (half, t.shape[longest] - half)):
        _in_pieces(out.narrow(longest, start, length), t.narrow(longest, start, length))
    return out


def _to_numpy(name: str) -> Callable[[Tensor], Any]:
    """`Tensor.numpy` views an alias, whose storage then refuses to be resized: the view cannot dangle."""
    carrier, dtype = _CARRIER.get(name), _dtypes.DTYPES[name].numpy

    def view(t: Tensor) -> Any:
        return t.numpy() if carrier is None else t.view(carrier).numpy().view(dtype)

    return view


def _from_numpy(before: Traits) -> Callable[[Any], Tensor]:
    dtype = DTYPES[before.dtype]
    row = _dtypes.DTYPES[before.dtype]
    plain = np.dtype(row.carrier) if row.carrier else row.numpy
    own = not row.carrier

    def share(a: Any) -> Tensor:
        if not before.writable:
            a = _numpy.writable_view(a)
        if a.dtype.char != plain.char:  # type: ignore[union-attr]
            a = a.view(plain)
        t = torch.from_numpy(a)
        return t if own else t.view(dtype)

    return share


def _shared(before: Traits) -> Callable[[Any], Tensor]:
    """A tensor over the memory of an array, which remembers that it came read-only."""
    share, remember = _from_numpy(before), _readonly.remember_memory
    if before.origin in ON_A_TENSOR:
        share, remember = _alias_or(share), _readonly.remember
    return share if before.writable else lambda a: remember(share(a))


def _alias_or(plain: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """An alias of a tensor; in FakeTensorMode, where no real one may be touched, what a plain array becomes there."""
    return lambda a: plain(a) if is_faking() else _alias(a)


def is_faking() -> bool:
    return bool(modes()) and torch._C._get_dispatch_mode(_FAKE) is not None


modes, _FAKE = torch._C._len_torch_dispatch_stack, torch._C._TorchDispatchModeKey.FAKE


def _alias(a: Any) -> Tensor:
    """The tensor behind a NumPy view of it: the same memory and the same version counter."""
    base: Tensor = _numpy.owner_of(a)
    dtype = DTYPES[_dtypes.of_numpy(a.dtype)]
    if base.dtype != dtype:
        base = base.view(dtype) if base.element_size() == a.itemsize else _reread(base, dtype)
    itemsize = a.itemsize
    offset = (_numpy.address(a) - base.untyped_storage().data_ptr()) // itemsize
    # A length-1 axis may carry any stride; as_strided wants none that is negative.
    strides = tuple(max(s, 0) // itemsize for s in a.strides)
    if (a.shape, strides, offset) == (base.shape, base.stride(), base.storage_offset()) and not base.requires_grad:
        return base.detach()
    return base.as_strided(a.shape, strides, offset)


def _reread(t: Tensor, dtype: torch.dtype) -> Tensor:
    """All of the storage as elements of another width, by views, which share the version counter."""
    flat = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0).view(torch.uint8)
    return flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _array_copied(before: Traits, after: Traits) -> Callable[[Any], Any]:
    """A NumPy array copied by torch's kernel into memory that NumPy allocates."""
    share, view = _from_numpy(before), _from_numpy(after)
    dtype = _dtypes.DTYPES[after.dtype].numpy
    order: Any = "C" if before.overlap else "K"

    def copy(a: Any) -> Any:
        fresh = np.empty_like(a, dtype=dtype, order=order, subok=False)
        view(fresh).copy_(share(a))
        return fresh

    return copy


def _into_numpy_pages(before: Traits, after: Traits, by: str) -> Callable[[Tensor], Tensor]:
    """A tensor copied into memory that NumPy allocates, in huge pages where torch would take small ones."""
    view = _from_numpy(after._replace(framework="numpy"))
    dtype = _dtypes.DTYPES[after.dtype].numpy
    order: Any = "C" if before.overlap else "K"
    fill = _numpy.filler(before.dtype, after.dtype)

    def copy(t: Tensor) -> Tensor:
        source = borrowed(t)
        fresh = np.empty_like(source, dtype=dtype, order=order)
        if by == "numpy":
            return view(fill(source, fresh))
        write = _in_pieces if by == _engine.IN_PIECES else Tensor.copy_
        return write(view(fresh), t)

    return copy


def counted(fill: Callable[..., Any]) -> Callable[..., Any]:
    """Fill a NumPy view of a tensor, and let autograd know."""

    def filled(x: Any, out: Any) -> Any:
        try:
            return fill(x, out)
        finally:  # NumPy raises, where it is told to, when it has written
            torch.autograd.graph.increment_version(_numpy.owner_of(out))

    return filled


def _filler(before: Traits, step: Step, want: Want) -> Callable[..., Any]:
    """Write into `out`, on whichever side it is."""
    if step.by == "numpy":
        fill_array = _numpy.filler(before.dtype, step.after.dtype)

        def by_numpy(x: Any, out: Any) -> Any:
            try:
                fill_array(borrowed(x), borrowed(out))
            finally:  # where it is told to, NumPy raises when it has written
                if want.framework == "torch":
                    torch.autograd.graph.increment_version(out)  # NumPy's writes are not seen by autograd
            return out

        return by_numpy
    share = _from_numpy(before) if before.framework == "numpy" else _by_parts if _engine.faults(before) else as_it_is
    fill: Any = _torch_cuda.filler(before, want) or (_in_pieces if step.by == _engine.IN_PIECES else Tensor.copy_)
    if want.out is not None and want.out.device.is_other and "neg" in want.out.lazy:
        fill = _fill_negative
    if want.framework == "numpy":
        assert want.out is not None
        view = _from_numpy(want.out)

        def into_numpy(x: Any, out: Any) -> Any:
            fill(view(out), share(x))
            return out

        return into_numpy

    def into_torch(x: Any, out: Tensor) -> Tensor:
        fill(out, share(x))
        return out

    return into_torch


def _fill_negative(out: Tensor, x: Tensor) -> Tensor:
    return torch._neg_view(out).copy_(-x.to(out.dtype))


def borrowed(t: Any) -> Any:
    """A NumPy view for as long as `t` is held: `Tensor.numpy` would make the storage refuse to be resized for good."""
    if not isinstance(t, Tensor):
        return t
    if t.is_contiguous():
        return np.ndarray(t.shape, IN_NUMPY[t.dtype], _numpy.bytes_at(t.data_ptr()))
    itemsize = t.element_size()
    strides = [s * itemsize for s in t.stride()]
    return np.ndarray(t.shape, IN_NUMPY[t.dtype], _numpy.bytes_at(t.data_ptr()), 0, strides)

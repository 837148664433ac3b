"""NumPy: holds any strides, byte order and read-only memory; knows bfloat16 and float8 through ml_dtypes; host only."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np

from tensorbridge import _casting, _dtypes
from tensorbridge._array import (
    CPU,
    ArrayInfo,
    Layout,
    Traits,
    c_strides,
    layout,
    order_text,
    reach,
    shape_text,
    size_class,
)
from tensorbridge._loaded import array_class
from tensorbridge._refuse import OBSTACLES, Obstacle, cure_rows
from tensorbridge._step import IN_PLACE, Op, Step, Want

Array: TypeAlias = "np.ndarray[Any, Any]"
PLAIN = Layout()


def open(x: Array, want: Want) -> tuple[Array, Traits, Want]:
    """Steps are performed on the plain array: a subclass may answer for NumPy's functions (``__array_function__``)."""
    found = traits(x)
    return _base(x), found, want.settled(found.dtype)


def quick_traits(a: Array) -> Traits | None:
    """The traits of a plain array, where they are quickly told."""
    base, seen = a.base, (a.dtype, a.flags.num, a.shape, a.strides)
    plain = base is None or (type(base) is np.ndarray and base.base is None)
    found = (_seen if plain else _seen_on_tensors).get(seen)
    if found is not None and (plain or _lies_on_a_tensor(a)):
        return found
    if not _dtypes.of_numpy(a.dtype):
        return None
    found = traits(a)
    if plain and a.dtype.kind != "c":  # whose alignment is one of its address
        if len(_seen) >= _KEPT:
            _seen.clear()
        _seen[seen] = found
    elif found.origin == "tensor" and a.flags.carray and a.dtype.kind != "c":
        if len(_seen_on_tensors) >= _KEPT:
            _seen_on_tensors.clear()
        _seen_on_tensors[seen] = found
    return found


# By all that the kind of an array rests on: one with plain memory behind it, and a writable one in C's order that lies
# on a tensor, as `Tensor.numpy` makes it.
_seen: dict[tuple[Any, ...], Traits] = {}
_seen_on_tensors: dict[tuple[Any, ...], Traits] = {}
_KEPT = 1024


def _lies_on_a_tensor(a: Array) -> bool:
    """Whether all of an array in C's order lies in the storage of the tensor right behind it."""
    base: Any = a.base
    if type(base) is np.ndarray:
        base = base.base
    if type(base) is not array_class("torch"):
        return False
    storage = base.untyped_storage()
    first = address(a) - storage.data_ptr()
    return bool(0 <= first <= storage.nbytes() - a.nbytes and not first % a.itemsize)


def traits(a: Array) -> Traits:
    if type(a) is not np.ndarray and not a.dtype.names:  # a record's fields may be called anything
        refuse_meaning(a, f"numpy {a.dtype} {shape_text(a.shape)}")
    dtype, base, flags = a.dtype, a.base, a.flags.num
    in_c = flags & _IN_C and a.size and 1 not in a.shape
    lay = PLAIN if in_c else layout(a.shape, a.strides, a.itemsize)
    plain = base is None or (type(base) is np.ndarray and base.base is None)
    origin = "" if plain else _origin(a, lay)
    aligned = dtype.kind != "c" or _is_aligned_whole(a)
    found = _of_kind(dtype, flags & _FACTS, lay, aligned, size_class(a.nbytes), origin)
    if found is None:
        raise _obstacle(a)
    return found


_IN_C, _ALIGNED, _WRITEABLE = 0x1, 0x100, 0x400  # of NumPy's flags
_FACTS = _ALIGNED | _WRITEABLE


@lru_cache(maxsize=1024)
def _of_kind(dtype: Any, flags: int, lay: Layout, aligned: bool, size: str, origin: str) -> Traits | None:
    """The kind of arrays with these facts; None if no framework shares their elements."""
    name = _dtypes.of_numpy(dtype)
    aligned, writeable = aligned and bool(flags & _ALIGNED), bool(flags & _WRITEABLE)
    return Traits("numpy", CPU, name, *lay, aligned, writeable, False, "", None, size, origin) if name else None


def like(first: Array) -> Callable[[Sequence[Array]], bool] | None:
    """A test for arrays that are certainly of the kind and shape of one that was opened; none if that is not plain."""
    dtype, shape = first.dtype, first.shape
    if type(first) is not np.ndarray or first.base is not None or not first.flags.carray:
        return None
    return lambda arrays: (
        set(map(type, arrays)) == {np.ndarray}
        and all(a.dtype is dtype and a.base is None and a.shape == shape and a.flags.carray for a in arrays)
    )


def _is_aligned_whole(a: Array) -> bool:
    """A complex number is aligned to NumPy if its halves are; torch reads the whole at once, and dies if it is not."""
    address: int = a.__array_interface__["data"][0]
    return address % min(a.itemsize, 16) == 0 or not a.size


def _origin(a: Array, lay: Layout) -> str:
    """Who stands behind a view: "tensor" (all of the view lies in its storage), "narrowed", "memmap"."""
    base: Any = owner_of(a)
    if type(base) is np.ndarray:
        return ""
    if type(base).__name__ == "mmap":
        return "memmap"
    if not isinstance(base, array_class("torch")):
        return ""
    storage = base.untyped_storage()
    first: int = a.__array_interface__["data"][0] - storage.data_ptr()
    low, high = reach(a.shape, a.strides, a.itemsize)
    within = first + low >= 0 and first + high <= storage.nbytes()
    if not within or first % a.itemsize:
        return ""
    if a.flags.writeable and not lay.overlap:
        return "tensor"
    whole: Array = _chain(a)[-2]  # the array on the tensor
    frozen = whole.flags.writeable and not a.flags.writeable
    expanded = lay.overlap and not layout(whole.shape, whole.strides, whole.itemsize).overlap
    return "narrowed" if frozen or expanded else "tensor"


def owner_of(a: Any) -> Any:
    """The object at the end of the chain of views: an array with memory of its own, a mapping, a tensor ..."""
    return _chain(a)[-1]


def _chain(a: Any) -> list[Any]:
    """The array, what it is a view of, and so on."""
    chain = [a]
    while True:
        last = chain[-1]
        below = last.obj if type(last) is memoryview else None
        if isinstance(last, np.ndarray) or type(last).__name__ == "DummyArray":  # of sliding_window_view, as_strided
            below = last.base
        if below is None:
            return chain
        chain.append(below)


def refuse_meaning(x: Any, what: str, number: str = "x.value, or x.to_value(unit)") -> None:
    """A class of arrays may mean more than their elements say: masks of NumPy and others, quantities with a unit."""
    if hasattr(type(x), "mask") and not callable(x.mask):
        masked = Obstacle("masked", f"masked {what}")
        raise masked if hasattr(x, "filled") else masked.cured("Convert x.unmasked and x.mask.")
    for name in ("unit", "units"):
        unit = getattr(x, name, None)
        if not callable(unit) and str(unit) not in ("None", "", "dimensionless"):
            raise Obstacle("unit", f"{what} in {unit}").cured(f"Convert {number} in a unit of your choice.")


def _obstacle(a: Array) -> Obstacle:
    what = f"numpy {a.dtype} {shape_text(a.shape)}"
    kinds = {"O": "object", "U": "string", "S": "string", "T": "string", "M": "datetime", "m": "datetime"}
    kind = "structured" if a.dtype.names else kinds.get(a.dtype.kind, "void" if a.dtype.type is np.void else "")
    obstacle = Obstacle(kind or "unknown dtype", what)
    cure = {"void": _cure_void, "object": _cure_object, "datetime": _cure_datetime}.get(kind)
    return obstacle if cure is None else obstacle.cured(cure(a) or obstacle.refusal.cure)


def _cure_void(a: Array) -> str:
    row = a.ndim and (a.strides[-1] == a.itemsize or a.shape[-1] == 1)  # a view in bytes wants elements in a row
    cure = f'Say what they are: {"x" if row else "np.ascontiguousarray(x)"}.view("uint8")'
    return f"{cure}{_SAVED.get(a.itemsize, '')}."


# What np.save writes of the dtypes of ml_dtypes is their size alone.
_SAVED = {
    1: ", or x.view(ml_dtypes.float8_e4m3fn) or such, which np.save writes as raw bytes",
    2: ", or x.view(ml_dtypes.bfloat16), which np.save writes as raw bytes",
}


def _cure_object(a: Array) -> str:
    if not a.ndim:
        return "Convert what it holds, x.item()."
    first = a.flat[0] if a.size else None
    if isinstance(first, (str, bytes)):
        return OBSTACLES["string"].cure
    return cure_rows(first, "np.stack(x)" if a.ndim == 1 else "x.tolist()")


def _cure_datetime(a: Array) -> str:
    how = 'x.view("int64")' if a.dtype.isnative else 'x.astype("int64"), which swaps the bytes,'
    missing = ", where NaT is the lowest int64" if np.isnat(a).any() else ""
    return f"Convert {how} and keep the unit beside it{missing}."


def describe(a: Array, traits: Traits) -> ArrayInfo:
    return ArrayInfo(
        traits.framework,
        CPU,
        traits.dtype,
        a.shape,
        a.strides,
        a.nbytes,
        order_text(traits.order, traits.spacing),
        traits.writable,
        False,
        None,
        "",
        traits.pinned,
        None,
        a.__array_interface__["data"][0],
        traits.overlap,
    )


def performer(step: Step, before: Traits, want: Want) -> Callable[..., Any]:
    op, after = step.op, step.after
    order: Literal["C", "K"] = "C" if before.overlap else "K"
    if op in (Op.CAST, Op.BYTESWAP):
        dtype: Any = _dtypes.DTYPES[after.dtype].numpy
        return _casting.with_warnings(lambda a: np.asarray(a).astype(dtype, order=order), before.dtype, after.dtype)
    if op in (Op.COPY, Op.PACK):
        return lambda a: np.array(a, order=order, copy=True, subok=False)
    if op == Op.STACK:
        dtype = _dtypes.DTYPES[after.dtype].numpy
        stack = stacked_as if before.origin else np.stack
        return lambda parts: parts.stacked(stack, dtype)
    rest: dict[str, Callable[..., Any]] = {
        Op.SHARE: _base,
        Op.RESTRIDE: _restrided,
        Op.PROTECT: _sealed if step.by == IN_PLACE else _protected,
    }
    return filler(before.dtype, after.dtype) if op == Op.FILL else rest[op]


def stacked_as(arrays: Sequence[Array], axis: int = 0, *, dtype: Any) -> Array:
    """Arrays of any dtypes in one of `dtype`, each element written once; with the warnings of the casts."""

    def stack(wanted: Any) -> Array:
        return np.stack(arrays, axis=axis, dtype=wanted, casting="unsafe")

    return _casting.with_warnings(stack, "complex128", _dtypes.of_numpy(np.dtype(dtype)))(dtype)


def _base(a: Array) -> Array:
    return a if type(a) is np.ndarray else a.view(np.ndarray)


def _sealed(a: Array) -> Array:
    """An array that was made on the way, read-only down to the tensor: it may be a view of its carrier's elements."""
    for view in _chain(a):
        if isinstance(view, np.ndarray):
            view.setflags(write=False)
    return a


def _protected(a: Array) -> Array:
    view = a.view(np.ndarray)
    view.setflags(write=False)
    return view


def _restrided(a: Array) -> Array:
    """The same elements with C strides on the axes whose stride means nothing."""
    plain = c_strides(a.shape, a.itemsize)
    strides = [p if not a.size or n == 1 else s for n, s, p in zip(a.shape, a.strides, plain, strict=True)]
    return _over(a, tuple(strides), not a.flags.writeable)


def filler(source: str, wanted: str) -> Callable[[Array, Array], Array]:
    """Writes elements of `source` into an array of `wanted`, and returns that."""

    def filled(a: Array, out: Array) -> Array:
        np.copyto(_base(out), a, casting="unsafe")
        return out

    return _casting.with_warnings(filled, source, wanted)


class _Bytes(ctypes.c_char * sys.maxsize):  # type: ignore[misc]
    """All bytes from an address on. The shape of an array over them says how many are meant."""


def address(a: Array) -> int:
    """Of the first element."""
    try:
        return ctypes.addressof(_first_byte(a))  # a quarter of the price
    except (TypeError, ValueError, BufferError):  # it is read-only, not in C's order, empty, or has no buffer's dtype
        found: int = a.__array_interface__["data"][0]
        return found


_first_byte: Any = ctypes.c_char.from_buffer
bytes_at = _Bytes.from_address  # a buffer for `np.ndarray`, which keeps nothing alive; cheaper to make than `Memory`


class Memory:
    """Memory under NumPy's array interface: ``np.asarray`` makes an array over it that keeps `owner` alive."""

    def __init__(
        self,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        typestr: str,
        readonly: bool,
        owner: object,
    ) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, readonly),
            "shape": shape,
            "strides": strides,
            "typestr": typestr,
        }
        self.owner = owner


def writable_view(a: Array) -> Array:
    """The same memory without the read-only flag, for a framework that has none and a caller who will not write."""
    return _over(a, a.strides, False)


def _over(a: Array, strides: tuple[int, ...], readonly: bool) -> Array:
    """The memory of `a` seen anew; through the carrier, for NumPy's interface does not know ml_dtypes."""
    carrier = np.dtype(_dtypes.DTYPES[_dtypes.of_numpy(a.dtype).lstrip(">")].carrier or a.dtype)
    address = a.__array_interface__["data"][0]
    return np.asarray(Memory(address, a.shape, strides, carrier.str, readonly, a)).view(a.dtype)

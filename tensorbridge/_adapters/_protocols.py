"""Everybody else: whoever speaks DLPack, an array interface, the buffer protocol or ``__array__``, read through it.

Host memory becomes a NumPy view that keeps the producer alive. Memory that the producer does not offer for writing, or
cannot say so (a DLPack without flags), arrives read-only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tensorbridge import _dtypes, _refuse
from tensorbridge._adapters import _columns, _dlpack, _foreign, _made, _missing, _numpy, _python, _strangers
from tensorbridge._adapters._arrow import Joined
from tensorbridge._adapters._dlpack import malformed
from tensorbridge._array import ArrayInfo, Traits, order_text, reach, size_class
from tensorbridge._cuda import _streams
from tensorbridge._errors import BridgeError, DeviceError, ProducerError, UnsupportedArrayError
from tensorbridge._refuse import Obstacle
from tensorbridge._step import EXPORTED, Op, Step, Want


def open(x: Any, want: Want) -> tuple[Any, Traits, Want]:
    if isinstance(x, (str, type, type(None))):
        raise Obstacle("text" if isinstance(x, str) else "not an array", type(x).__name__)
    seen, want = _asked(lambda: _columns.stand_in(x, want), x, "what it holds")
    is_column = isinstance(seen, (np.ndarray, Joined))
    handle, traits = _column(seen, x) if is_column else _by_protocol(seen, want)
    return handle, traits, want.settled(traits.dtype)


def _by_protocol(x: Any, want: Want) -> tuple[Any, Traits]:
    if _speaks(x, "__dlpack__") and _speaks(x, "__dlpack_device__"):
        return _by_dlpack(x, want)
    if (facts := _offered(x, "__cuda_array_interface__")) is not None:
        via, found = "cuda_array_interface", _foreign.by_interface(x, facts)
    elif (box := [_offered(x, "__array_interface__")])[0] is not None:
        origin = "made" if _made.for_us(box) else ""
        return _read(_by_array_interface(x, box[0]), "array_interface", x, origin)
    elif (view := _buffer(x)) is not None:
        via, found = "buffer", _by_buffer(x, view)
    elif _speaks(x, "__array__"):
        return _by_array(x, want)
    elif _speaks(x, "__dlpack__"):
        detail = "it has __dlpack__ and no __dlpack_device__, nor an array interface, buffer or __array__"
        cure = "Give it a __dlpack_device__ that says where its memory is: (1, 0) is the host."
        raise Obstacle("not an array", type(x).__name__, detail).cured(cure)
    else:
        raise Obstacle(_strangers.obstacle_of(x), type(x).__name__)
    return _read(found, via, x)


def _read(found: Any, via: str, x: Any, origin: str = "") -> tuple[Any, Traits]:
    traits = _foreign.traits(found, via) if isinstance(found, _foreign.Foreign) else _described(found, via, x)
    return found, traits._replace(origin=origin or traits.origin)


def _column(seen: Any, x: Any) -> tuple[Any, Traits]:
    """A column of a table, as its own library lets it be seen: a view, or an array to be made, as of a list."""
    if not isinstance(seen, Joined):
        return _by_array_of(x, seen)
    size = size_class(math.prod(seen.shape) * seen.dtype.itemsize)
    return seen, Traits(_columns.kind_of(x), dtype=_dtypes.of_numpy(seen.dtype), size=size, origin=seen.why)


def _described(a: Any, via: str, x: Any) -> Traits:
    try:
        return _numpy.traits(a)._replace(framework=via)
    except Obstacle as obstacle:
        obstacle.what = f"{type(x).__name__}, {obstacle.what}"
        raise _as_array(obstacle) from None


def _as_array(obstacle: Obstacle) -> Obstacle:
    """The cures are calls on NumPy arrays, and this is none."""
    cure = obstacle.refusal.cure
    for used in ("x.", "x[", "stack(x"):
        cure = cure.replace(used, used.replace("x", "np.asanyarray(x)"))
    return obstacle.cured(cure)


def _speaks(x: Any, method: str) -> bool:
    """Whether `x` has this method: of its type, or handed through by a proxy."""
    return hasattr(type(x), method) or callable(_offered(x, method))


def _offered(x: Any, attribute: str) -> Any:
    return _asked(lambda: getattr(x, attribute, None), x, attribute)


def _asked(call: Callable[[], Any], x: Any, what: str) -> Any:
    """What the producer answers; its refusal in our words, with its own as the cause."""
    try:
        return call()
    except (BridgeError, Obstacle):
        raise
    except Exception as error:  # foreign code may raise anything, and whose failure it was must be told from ours
        raise _failed(x, what, error) from error


def _failed(x: Any, what: str, error: Exception) -> Exception:
    name = type(x).__name__
    if _strangers.answers_to_all(x):
        return Obstacle("stand-in", name)
    if _strangers.is_deleted(x):
        return ProducerError(f"{name} failed to export {what}: it was deleted, or its memory donated to a computation")
    if isinstance(x, Mapping) and isinstance(error, TypeError):  # of xarray: it has the method, and has it refuse
        call, meaning = _refuse.plain_dict(any(isinstance(x[key], Mapping) for key in x))
        cure = f"Convert every leaf: tensorbridge.tree.to_{{framework}}({call}){meaning}."
        return Obstacle("container", name).cured(cure)
    if isinstance(error, TypeError):
        return UnsupportedArrayError(f"{name} refuses to export {what}: {error}\n{_columns.cure(x)}")
    return ProducerError(f"{name} failed to export {what}: {type(error).__name__}: {error}")


# -- DLPack


def _by_dlpack(x: Any, want: Want) -> tuple[Any, Traits]:
    """A producer that flags a copy has made it by now; copy=False is passed first, to producers that take it."""
    device = _asked(lambda: x.__dlpack_device__(), x, "its DLPack device")
    try:
        kind, index = map(int, device)
    except (TypeError, ValueError) as error:
        raise malformed(x, f"__dlpack_device__ returned {device!r}, not a type and an index") from error
    if kind in _dlpack.HOST:
        capsule = _asked(lambda: _dlpack.request(x, copy=want.copy), x, "DLPack")
        found, copied = _dlpack.host_array(x, capsule)
        return _read(found, "dlpack", x, "copied" if copied else "")
    if kind not in _dlpack.CUDA:
        raise DeviceError(
            f"{type(x).__name__} lies on a device of DLPack type {kind}; only the host and CUDA are known here.\n"
            "Copy it to the host with its own library first."
        )
    reader = want.framework if want.framework != "numpy" else _streams.mover()
    _foreign.refuse_fork(x)
    number = _foreign.stream_of(type(x).__name__, reader, index, want)
    _foreign.refuse_capture(x)  # the producer may record an event
    with _streams.on_device(index):
        capsule = _asked(lambda: _dlpack.request(x, copy=want.copy, stream=number), x, "DLPack")
    found, copied = _foreign.device_array(x, capsule, number)
    return _read(found, "dlpack", x, "copied" if copied else "")


# -- Array interfaces


def _by_array_interface(x: Any, facts: Any) -> Any:
    if not isinstance(facts, dict) or not facts.keys() >= {"shape", "typestr"}:  # NumPy 2.2 dies of a missing shape
        raise malformed(x, "__array_interface__ is no dict with a shape and a typestr")
    if facts.get("mask") is not None:
        raise Obstacle("masked", type(x).__name__)
    data: Any = facts.get("data")
    if data is None:
        data = _buffer(x)  # "then the buffer of the object is used", says the protocol
        if data is None:
            raise malformed(x, '__array_interface__ lacks "data", and the object has no buffer to take for it')
    try:
        if not isinstance(data, tuple):
            data = np.frombuffer(data, "uint8")  # which holds the export, as NumPy does not of an interface
        a = np.asarray(_Interface(x, {**facts, "data": data}))
    except (TypeError, ValueError, OverflowError, BufferError) as error:
        raise malformed(x, f"__array_interface__: {error}") from error
    if a.size and isinstance(data, np.ndarray):  # NumPy does not ask how long the buffer is
        low, high = (facts.get("offset", 0) + end for end in reach(a.shape, a.strides, a.itemsize))
        if low < 0 or high > data.size:
            words = f"__array_interface__ needs bytes {low} to {high} of its buffer, which holds {data.size}"
            raise malformed(x, words)
    return a


class _Interface:
    """Only the array interface of an object, so that NumPy looks at nothing else of it, and the object itself."""

    def __init__(self, owner: Any, interface: Any) -> None:
        self.owner, self.__array_interface__ = owner, interface


# -- Buffers and __array__


def _buffer(x: Any) -> memoryview | None:
    """A view that holds the export: the exporter cannot free or grow the memory under it."""
    try:
        return memoryview(x)
    except TypeError:
        return None
    except Exception as error:  # closed, released, or already lent out for writing; what a __buffer__ of Python raises
        raise ProducerError(f"{type(x).__name__} failed to export its buffer: {error}") from error


def _by_buffer(x: Any, view: memoryview) -> Any:
    """NumPy would guess at what ctypes says of structures and unions, with a warning."""
    what = f"{type(x).__name__} (buffer format {view.format!r})"
    if view.format.startswith("&"):
        one = hasattr(type(x), "contents")
        each = "Convert np.ctypeslib.as_array(x[i], shape) of each."
        raise Obstacle("pointer", what) if one else Obstacle("pointer", what).cured(each)
    if view.format.startswith("T{"):
        raise _as_array(Obstacle("structured", what))
    if view.format == "B" and view.itemsize != 1:
        raise _as_array(Obstacle("void", what))
    try:
        return np.asarray(view)
    except ValueError as error:
        raise Obstacle("unknown dtype", what) from error
    except BufferError as error:  # pointers to rows that lie anywhere
        raise ProducerError(f"{type(x).__name__} exports a buffer that is no array: {error}") from error


def _by_array(x: Any, want: Want) -> tuple[Any, Traits]:
    """Last, `__array__`, which may share or copy. Whoever refuses copy=False has to copy, and has said so.

    Any other failure then says nothing: the word may be unknown, or come with a warning.
    """

    def export() -> tuple[list[Any], bool]:  # nobody but that list is to hold the array
        try:
            return [x.__array__(copy=False)], False
        except (TypeError, ValueError, RuntimeError, Warning) as error:
            has_to = isinstance(error, ValueError) or (isinstance(error, RuntimeError) and "copy" in str(error))
            if want.copy is False and (has_to or isinstance(error, TypeError)):
                what = f"{type(x).__name__} offers only __array__, and does not promise that no byte moves"
                raise _dlpack.must_copy(what, error) from error
            if want.copy is False:
                raise
        if has_to and want.copy:  # what it makes otherwise, it may keep
            return [np.array(x, copy=True, subok=True)], True
        return [np.asanyarray(x)], has_to  # a mask must not get lost

    box, copied = _asked(export, x, "__array__")
    if not isinstance(box[0], np.ndarray):
        raise malformed(x, f"__array__ returned {type(box[0]).__name__}")
    origin = "copied" if copied else "made" if _made.for_us(box) else ""
    return _by_array_of(x, box[0], origin)


def _by_array_of(x: Any, a: Any, origin: str = "") -> tuple[Any, Traits]:
    """What `x` gives as its array. The labels of a table come read-only: they are hashed."""
    if _missing.is_index(x):
        a = a.view()
        a.setflags(write=False)
    found = _described(a, "__array__", x)
    return a, found._replace(origin=origin or found.origin or "unknown")


def describe(handle: Any, traits: Traits) -> ArrayInfo:
    """A copy that the producer made has no address: it is gone after the look, and the next may lie where it was."""
    info = _described_in_full(handle, traits)
    return info._replace(address=0) if traits.origin in EXPORTED else info


def _described_in_full(handle: Any, traits: Traits) -> ArrayInfo:
    if isinstance(handle, np.ndarray):
        return _numpy.describe(handle, traits)
    if isinstance(handle, Joined):
        return _python.describe(handle, traits)
    nbytes = math.prod(handle.shape) * _dtypes.itemsize(traits.dtype)
    order = order_text(traits.order, traits.spacing)
    return ArrayInfo(
        traits.framework, traits.device, traits.dtype, handle.shape, handle.strides, nbytes, order,
        traits.writable, False, None, "", None, handle.stream, handle.address, traits.overlap,
    )  # fmt: skip


def performer(step: Step, before: Traits, want: Want) -> Callable[..., Any]:
    """IMPORT, EXPORT: host memory is a NumPy array already; device memory goes to the framework that reads it."""
    assert step.op in (Op.IMPORT, Op.EXPORT)
    if step.after.framework == "numpy":
        return lambda x: x if isinstance(x, np.ndarray) else open(x, want)[0]
    odd = before.spacing == "reversed" or not before.writable or _refuse.askew(before)
    what = "device memory that is read-only, unaligned, or has negative or odd strides," if odd else "device memory"
    reader = _foreign.adapter(step.after.framework, f"to_{want.framework}: {what}", mover=not odd)

    def read(x: Any) -> Any:
        found = x if isinstance(x, _foreign.Foreign) else open(x, want)[0]
        what = f"to_{want.framework}: {type(found.producer).__name__}"
        _foreign.stream_of(what, step.after.framework, found.device.index, want)
        return reader.imported(found)

    return read

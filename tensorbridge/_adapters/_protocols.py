"""Everybody else: whoever speaks DLPack, an array interface, the buffer protocol or ``__array__``, read through it.

Host memory becomes a NumPy view that keeps the producer alive. Memory that the producer does not offer for writing, or
cannot say so (a DLPack without flags), arrives read-only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import index as index_of
from typing import Any, NamedTuple

import numpy as np

from tensorbridge import _dtypes, _refuse, _streams
from tensorbridge._adapters import _columns, _dlpack, _made, _missing, _numpy, _python, _strangers, named
from tensorbridge._adapters._arrow import Joined
from tensorbridge._adapters._dlpack import malformed
from tensorbridge._array import ArrayInfo, Device, Traits, c_strides, layout, order_text, reach, size_class
from tensorbridge._errors import (
    INSTALL,
    BridgeError,
    DeviceError,
    MissingFrameworkError,
    ProducerError,
    UnsupportedArrayError,
)
from tensorbridge._refuse import Obstacle
from tensorbridge._step import EXPORTED, Op, Step, Want


class Foreign(NamedTuple):
    """Device memory of another library: what was read of it, and the object that still owns it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    dtype: str
    device: Device
    address: int
    readonly: bool
    producer: Any
    capsule: Any = None
    stream: int | None = None  # that the memory is ready on: the array interface names it, DLPack was asked for it

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.device.index


def open(x: Any, want: Want) -> tuple[Any, Traits]:
    cls = type(x)
    if isinstance(x, (str, type, type(None))):
        raise Obstacle("text" if isinstance(x, str) else "not an array", cls.__name__)
    seen = _asked(lambda: _columns.stand_in(x), x, "what it holds")
    if isinstance(seen, (np.ndarray, Joined)):
        return _column(seen, x)
    x = seen
    if _speaks(x, "__dlpack__") and _speaks(x, "__dlpack_device__"):
        return _by_dlpack(x, want)
    if (facts := _offered(x, "__cuda_array_interface__")) is not None:
        via, found = "cuda_array_interface", _by_cai(x, facts)
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
        raise Obstacle("not an array", cls.__name__, detail).cured(cure)
    else:
        raise Obstacle(_strangers.told(x), cls.__name__)
    return _read(found, via, x)


def _read(found: Any, via: str, x: Any, origin: str = "") -> tuple[Any, Traits]:
    traits = _foreign_traits(found, via) if isinstance(found, Foreign) else _described(found, via, x)
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
    """Whoever flags a copy has made it by now; copy=False is said before, to whoever knows the word."""
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
    _refuse_fork(x)
    number = _stream(type(x).__name__, reader, index)
    _refuse_capture(x)  # the producer may record an event
    with _streams.on_device(index):
        capsule = _asked(lambda: _dlpack.request(x, copy=want.copy, stream=number), x, "DLPack")
    found, copied = _device_array(x, capsule, number)
    return _read(found, "dlpack", x, "copied" if copied else "")


def _refuse_fork(x: Any) -> None:
    if _streams.forked():
        raise _not_asked(x, _refuse.FORKED)


def _refuse_capture(x: Any) -> None:
    if _streams.capturing():
        raise _not_asked(x, _refuse.CAPTURING)


def _not_asked(x: Any, refusal: Any) -> DeviceError:
    return DeviceError(f"{type(x).__name__} cannot be asked for device memory: {refusal.why}.\n{refusal.cure}")


def _stream(what: str, reader: str, index: int) -> int:
    """The stream current in the framework that will read it; an error of ours where there is no such device."""
    try:
        return _streams.current(reader, index)
    except (AssertionError, LookupError, RuntimeError) as error:  # no CUDA in this build; not imported; no device
        why = error.__cause__ or error  # ours has torch's own as its cause
        raise DeviceError(f"{what} lies on cuda:{index}, which {reader} cannot use here: {why}") from error


def _device_array(x: Any, capsule: Any, number: int) -> tuple[Foreign, bool]:
    tensor, flags = _dlpack.read(x, capsule)
    if tensor.device_type not in _dlpack.CUDA:
        raise malformed(x, f"its capsule is on device type {tensor.device_type}, not on CUDA as it said")
    name, shape, strides, address = _dlpack.facts(x, tensor)
    device = Device(f"cuda:{tensor.device_id}")
    frozen, copied = bool((flags or 0) & _dlpack.READ_ONLY), bool((flags or 0) & _dlpack.IS_COPIED)
    return Foreign(shape, strides, name, device, address, frozen, x, capsule, number), copied


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


def _by_cai(x: Any, facts: Any) -> Foreign:
    if not isinstance(facts, Mapping):
        raise malformed(x, f"__cuda_array_interface__ is {type(facts).__name__}, not a dict")
    if facts.get("mask") is not None:
        raise Obstacle("masked", type(x).__name__)
    try:
        shape, dtype = tuple(map(index_of, facts["shape"])), np.dtype(facts["typestr"])
        pointer, readonly = facts["data"]
        address, frozen = index_of(pointer or 0), bool(readonly)
        given, stream = facts.get("strides"), facts.get("stream")
        strides = c_strides(shape, dtype.itemsize) if given is None else tuple(map(index_of, given))
        stream = None if stream is None else index_of(stream)
    except (KeyError, TypeError, ValueError) as error:
        raise malformed(x, f"__cuda_array_interface__ lacks or garbles {error}") from error
    if len(strides) != len(shape) or min(shape, default=0) < 0 or (not address and 0 not in shape):
        raise malformed(x, f"shape {shape}, strides {strides} and address {address} in __cuda_array_interface__")
    if stream == 0:
        raise malformed(x, "stream 0 is not allowed in __cuda_array_interface__ (1 is the default stream)")
    name = _dtypes.of_numpy(dtype)
    if not name or name.startswith(">"):
        raise Obstacle("unknown dtype", f"{type(x).__name__} {dtype}")
    device = Device(f"cuda:{_device_of(x, address)}")
    return Foreign(shape, strides, name, device, address, frozen, x, None, stream)


def _device_of(x: Any, address: int) -> int:
    """Where the memory is: the object may say, the driver knows, and of no memory it is where we are."""
    said = getattr(getattr(x, "device", None), "id", None)
    if isinstance(said, int):
        return said
    asked = next((name for name in ("cupy", "torch") if _streams.usable(name) and not _streams.forked()), "")
    if not asked:  # described where nobody can be asked
        return 0
    if not address:
        return _streams.current_device()
    _refuse_capture(x)
    framework: Any = named(asked if asked == "cupy" else "torch_cuda")
    index: int = framework.device_of(address)
    if index < 0:
        raise malformed(x, f"no device has memory at {address:#x}")
    return index


def _foreign_traits(x: Foreign, via: str) -> Traits:
    itemsize = _dtypes.DTYPES[x.dtype].itemsize
    lay = layout(x.shape, x.strides, itemsize)
    count = math.prod(x.shape)
    return Traits(
        via,
        x.device,
        x.dtype,
        lay.order,
        lay.spacing,
        lay.overlap,
        lay.loose,
        not count or x.address % itemsize == 0,
        writable=not x.readonly,
        size=size_class(count * itemsize),
    )


# -- Buffers and __array__


def _buffer(x: Any) -> memoryview | None:
    """A view that holds the export: the exporter cannot free or grow the memory under it."""
    try:
        return memoryview(x)
    except TypeError:
        return None
    except (BufferError, ValueError) as error:  # closed, released, or already lent out for writing
        raise ProducerError(f"{type(x).__name__} failed to export its buffer: {error}") from error


def _by_buffer(x: Any, view: memoryview) -> Any:
    """NumPy would guess at what ctypes says of structures and unions, with a warning."""
    what = f"{type(x).__name__} (buffer format {view.format!r})"
    if view.format.startswith("T{"):
        raise _as_array(Obstacle("structured", what))
    if view.format == "B" and view.itemsize != 1:
        raise _as_array(Obstacle("void", what))
    try:
        return np.asarray(view)
    except ValueError as error:
        raise Obstacle("unknown dtype", what) from error


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
    nbytes = math.prod(handle.shape) * _dtypes.DTYPES[traits.dtype].itemsize
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
    try:
        reader: Any = named(step.after.framework)
    except ModuleNotFoundError as error:
        raise MissingFrameworkError(
            f"to_{want.framework}: device memory that is read-only, unaligned, or has negative or odd strides, is read "
            f"by CuPy: {error}.\n{INSTALL['cupy']}"
        ) from error

    def read(x: Any) -> Any:
        found = x if isinstance(x, Foreign) else open(x, want)[0]
        _stream(f"to_{want.framework}: {type(found.producer).__name__}", step.after.framework, found.device.index)
        return reader.imported(found)

    return read

"""Device memory of other libraries: what is read of it, on which device and stream, and who reads it here."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from operator import index as index_of
from typing import Any, NamedTuple

import numpy as np

from tensorbridge import _dtypes, _refuse
from tensorbridge._adapters import _dlpack, named
from tensorbridge._adapters._dlpack import malformed
from tensorbridge._array import Device, Traits, c_strides, layout, size_class
from tensorbridge._cuda import _stream_order, _streams
from tensorbridge._errors import INSTALL, DeviceError, MissingFrameworkError
from tensorbridge._refuse import CALLED, Obstacle
from tensorbridge._step import Want


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

    def wait_in(self, framework: str) -> None:
        """The framework's current stream waits for the one that the memory is ready on."""
        if self.stream is None:
            return
        try:
            _stream_order.wait(framework, self.stream, self.device.index)
        except RuntimeError as error:
            raise malformed(self.producer, f"{self.stream} is no stream of {self.device}: {error}") from error


# -- DLPack


def refuse_fork(x: Any) -> None:
    if _streams.forked():
        raise _not_asked(x, _refuse.FORKED)


def refuse_capture(x: Any) -> None:
    if _streams.capturing():
        raise _not_asked(x, _refuse.CAPTURING)


def _not_asked(x: Any, refusal: Any) -> DeviceError:
    return DeviceError(f"{type(x).__name__} cannot be asked for device memory: {refusal.why}.\n{refusal.cure}")


def adapter(framework: str, what: str, *, mover: bool) -> Any:
    """The adapter by which `what` is read; `mover`, if another could read it as well."""
    try:
        return named(framework)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == framework
        why = "is not installed" if missing else f"cannot be imported: {error}"
        cure = INSTALL[framework] + ", or import a torch built for CUDA first" * mover
        text = f"{what} is read by {CALLED[framework]}, which {why}.\n{cure}"
        raise MissingFrameworkError(text) from error


def stream_of(what: str, reader: str, index: int, want: Want) -> int:
    """The stream current in the framework that will read it; an error of ours where there is no such device."""
    try:
        return _streams.current(reader, index)
    except (AssertionError, LookupError, RuntimeError) as error:  # no CUDA in this build; not imported; no device
        if reader not in sys.modules:
            adapter(reader, f"{what} lies on cuda:{index}, and", mover=want.framework == "numpy")
            return stream_of(what, reader, index, want)
        why = error.__cause__ or error  # ours has torch's own as its cause
        text = f"{what} lies on cuda:{index}, which {reader} cannot use here: {str(why).rstrip('.')}."
        raise DeviceError(f"{text}\nCheck CUDA_VISIBLE_DEVICES and the driver.") from error


def device_array(x: Any, capsule: Any, number: int) -> tuple[Foreign, bool]:
    tensor, flags = _dlpack.read(x, capsule)
    if tensor.device_type not in _dlpack.CUDA:
        raise malformed(x, f"its capsule is on device type {tensor.device_type}, not on CUDA as it said")
    name, shape, strides, address = _dlpack.facts(x, tensor)
    device = Device(f"cuda:{tensor.device_id}")
    frozen, copied = bool((flags or 0) & _dlpack.READ_ONLY), bool((flags or 0) & _dlpack.IS_COPIED)
    return Foreign(shape, strides, name, device, address, frozen, x, capsule, number), copied


# -- The array interface


def by_interface(x: Any, facts: Any) -> Foreign:
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
    if stream is not None and stream < 0:
        raise malformed(x, f"{stream} in __cuda_array_interface__ is no stream")
    if stream == 0:
        raise malformed(x, "stream 0 is not allowed in __cuda_array_interface__ (1 is the default stream)")
    name = _dtypes.of_numpy(dtype)
    if not name or name.startswith(">"):
        raise Obstacle("unknown dtype", f"{type(x).__name__} {dtype}")
    device = Device(f"cuda:{_device_of(x, address)}")
    return Foreign(shape, strides, name, device, address, frozen, x, None, stream)


def _device_of(x: Any, address: int) -> int:
    """Where the memory is: the driver knows, the object may say where that cannot be asked, and else it is here."""
    said = getattr(getattr(x, "device", None), "id", None)
    said = said if type(said) is int else None
    asked = next((name for name in ("cupy", "torch") if _streams.usable(name) and not _streams.forked()), "")
    if not asked:  # described where nobody can be asked
        return said or 0
    if not address:
        return _streams.current_device()
    if said is not None and _streams.capturing():
        return said
    refuse_capture(x)
    framework: Any = named(asked)
    index: int = framework.device_at(address)
    if index < 0:
        raise malformed(x, f"no device has memory at {address:#x}")
    if said is not None and said != index:
        raise malformed(x, f"it says that it is on device {said}, and its memory is on device {index}")
    return index


def device_index(x: Any) -> int | None:
    """The CUDA device on which an object of another library says that its memory is; None if it says none."""
    try:
        if hasattr(x, "__dlpack_device__"):
            kind, index = x.__dlpack_device__()
            return int(index) if int(kind) in _dlpack.CUDA else None
        facts = getattr(x, "__cuda_array_interface__", None)
        return None if facts is None else by_interface(x, facts).device.index
    except Exception:  # foreign code may raise anything: the conversion asks again, and says whose failure it is
        return None


def stream_named(x: Any) -> int | None:
    """The stream that an array interface says its memory is ready on."""
    facts = getattr(x, "__cuda_array_interface__", None)
    return facts.get("stream") if isinstance(facts, Mapping) else None


def traits(x: Foreign, via: str) -> Traits:
    itemsize = _dtypes.itemsize(x.dtype)
    count = math.prod(x.shape)
    return Traits(
        via,
        x.device,
        x.dtype,
        *layout(x.shape, x.strides, itemsize),
        not count or x.address % itemsize == 0,
        writable=not x.readonly,
        size=size_class(count * itemsize),
    )

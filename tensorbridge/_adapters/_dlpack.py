"""DLPack, read by ctypes: no framework sees a capsule before its dtype and strides have been read.

torch aborts on a negative stride, NumPy refuses bfloat16. Layouts: https://dmlc.github.io/dlpack/latest/c_api.html;
negotiation: ``__dlpack__`` of the array API, 2023.12.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from tensorbridge import _dtypes
from tensorbridge._adapters import _numpy
from tensorbridge._array import c_strides
from tensorbridge._errors import CopyRequiredError, ProducerError
from tensorbridge._refuse import Obstacle

HOST = (1, 3, 11)  # DLPack device types: CPU, CUDA host, ROCm host
PLAIN, MANAGED = 2, 13  # memory of a CUDA device, and what moves between it and the host
CUDA = (PLAIN, MANAGED)
READ_ONLY, IS_COPIED = 1, 2


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


def malformed(x: Any, what: str) -> ProducerError:
    return ProducerError(f"{type(x).__name__} is a malformed producer: {what.rstrip('.')}.")


def request(x: Any, *, copy: bool | None = None, **stream: int) -> Any:
    """A capsule, versioned if the producer can; an old producer is asked again with fewer keywords.

    An unknown keyword is exactly a TypeError; a class derived from it (pyarrow's) is the producer's own refusal, and
    asking again would only make it warn that it was asked in the old way. To copy=False a producer that would have to
    copy answers with an error; one that does not know the word may copy unseen, unless it flags its capsule.
    """
    version: dict[str, Any] = {"max_version": (1, 0)}
    never: dict[str, Any] = {"copy": False}
    for words in (version,) if copy is not False else (version | never, version, never):
        try:
            return x.__dlpack__(**words, **stream)
        except TypeError as error:
            if type(error) is not TypeError:
                raise
        except (BufferError, ValueError) as error:
            if "copy" not in words:
                raise
            raise must_copy(
                f"{type(x).__name__} cannot be shared, for its __dlpack__(copy=False) says", error
            ) from error
    return x.__dlpack__(**stream)


def must_copy(what: str, error: Exception) -> CopyRequiredError:
    """A producer's refusal to share, in our words and its own."""
    return CopyRequiredError(f"{what}: {str(error).rstrip('.')}.\nAllow the copy with copy=None.")


# By item: functions of our own. Those that attributes of ctypes.pythonapi give are shared, argument types and all, with
# every library of the process (datasets sets them too).
_name_of = ctypes.pythonapi["PyCapsule_GetName"]
_name_of.restype, _name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer_of = ctypes.pythonapi["PyCapsule_GetPointer"]
_pointer_of.restype, _pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_rename = ctypes.pythonapi["PyCapsule_SetName"]
_rename.restype, _rename.argtypes = ctypes.c_int, [ctypes.py_object, ctypes.c_void_p]
_name_pointer_of = ctypes.pythonapi["PyCapsule_GetName"]  # the pointer itself, which belongs to the producer
_name_pointer_of.restype, _name_pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object]
_USED = {name: ctypes.create_string_buffer(b"used_" + name) for name in (b"dltensor", b"dltensor_versioned")}
for _buffer_of_name in _USED.values():  # a capsule may outlive this module, and its name is only a pointer
    ctypes.pythonapi["Py_IncRef"](ctypes.py_object(_buffer_of_name))


class _Taken:
    """A capsule that an array lies over, marked as used, so that no other consumer frees the memory under it.

    Its own destructor frees it when the last array is gone: the old name is put back for that.
    """

    __slots__ = ("capsule", "name", "producer")

    def __init__(self, capsule: Any, producer: Any) -> None:
        self.capsule, self.producer, self.name = capsule, producer, _name_pointer_of(capsule)
        _rename(capsule, ctypes.addressof(_USED[_name_of(capsule)]))

    def __del__(self, rename: Any = _rename) -> None:
        rename(self.capsule, self.name)


def name_as_plain(capsule: Any) -> bool:
    """Managed memory in a capsule, that nobody has taken, under the name of a CUDA device's; False for any other."""
    tensor, _ = read(None, capsule)
    if tensor.device_type != MANAGED:
        return False
    tensor.device_type = PLAIN
    return True


def read(x: Any, capsule: Any) -> tuple[_DLTensor, int | None]:
    """The tensor struct in a capsule, and its flags (None: a capsule without flags)."""
    if type(capsule).__name__ != "PyCapsule":
        raise malformed(x, f"__dlpack__ returned {type(capsule).__name__}, not a capsule")
    name = _name_of(capsule)
    if name not in (b"dltensor", b"dltensor_versioned"):
        raise malformed(x, f"its capsule is named {name!r}, so it was consumed before or is none of DLPack's")
    pointer = _pointer_of(capsule, name)
    if name == b"dltensor":
        return _DLTensor.from_address(pointer), None
    whole = _Versioned.from_address(pointer)
    if whole.major != 1:
        raise malformed(x, f"it answers in DLPack {whole.major}.{whole.minor} where 1.x was asked for")
    return whole.tensor, whole.flags


def facts(x: Any, tensor: _DLTensor) -> tuple[str, tuple[int, ...], tuple[int, ...], int]:
    """dtype name, shape, strides in bytes, address."""
    if not 0 <= tensor.ndim <= 64 or (tensor.ndim and not tensor.shape):
        raise malformed(x, f"{tensor.ndim} dimensions" + " without a shape" * (not tensor.shape))
    name = _dtypes.of_dlpack(tensor.code, tensor.bits, tensor.lanes)
    if not name:
        kind = f"DLPack code {tensor.code}, {tensor.bits} bits, {tensor.lanes} lanes"
        raise Obstacle("unknown dtype", f"{type(x).__name__} ({kind})")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if any(length < 0 for length in shape):
        raise malformed(x, f"shape {shape}")
    itemsize = _dtypes.itemsize(name)
    if tensor.strides:
        strides = tuple(tensor.strides[i] * itemsize for i in range(tensor.ndim))
        if max(strides, default=0) >> 63 == 1:  # CuPy divides a negative stride as if it were unsigned
            strides = tuple(s - (1 << 64) if s >> 63 == 1 else s for s in strides)
    else:
        strides = c_strides(shape, itemsize)
    address = (tensor.data or 0) + tensor.byte_offset
    if not tensor.data and 0 not in shape:
        raise malformed(x, "a null address")
    return name, shape, strides, address


def host_array(x: Any, capsule: Any) -> tuple[Any, bool]:
    """A NumPy view of a host capsule, which it keeps; and whether the producer says that it is a copy."""
    tensor, flags = read(x, capsule)
    if tensor.device_type not in HOST:
        raise malformed(x, f"its capsule is on device type {tensor.device_type}, not on the host as it said")
    name, shape, strides, address = facts(x, tensor)
    readonly, copied = flags is None or bool(flags & READ_ONLY), bool((flags or 0) & IS_COPIED)
    row = _dtypes.DTYPES[name]
    if row.numpy is None:
        raise Obstacle("unknown dtype", f"{type(x).__name__} {name}")
    carrier = np.dtype(row.carrier) if row.carrier else row.numpy
    try:
        if 0 in shape:
            return np.empty(shape, row.numpy), copied
        memory = _numpy.Memory(address, shape, strides, carrier.str, readonly, _Taken(capsule, x))
        return np.asarray(memory).view(row.numpy), copied
    except (ValueError, OverflowError) as error:
        raise malformed(x, f"shape {shape} with strides of {strides} bytes: {error}") from error

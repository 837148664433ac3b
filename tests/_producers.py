"""Producers that tests make up: a DLPack capsule field by field, of any age of the protocol, and what is behind it."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np
from _facts_probes import DLManagedTensor, DLManagedTensorVersioned

from tensorbridge._dtypes import DTYPES

_new = ctypes.pythonapi["PyCapsule_New"]
_new.restype, _new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_is_valid = ctypes.pythonapi["PyCapsule_IsValid"]  # by address: a destructor must not make a reference to what dies
_is_valid.restype, _is_valid.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p]
_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]

LEGACY, VERSIONED = b"dltensor", b"dltensor_versioned"
_TYPES = {LEGACY: DLManagedTensor, VERSIONED: DLManagedTensorVersioned}
_NAMES = {name: ctypes.create_string_buffer(name) for name in (LEGACY, VERSIONED, b"arrow_schema")}
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_alive: dict[int, tuple[Any, ...]] = {}  # by address of the managed tensor: what its deleter lets go


@_Deleter
def _delete(address: int) -> None:
    _, made = _alive.pop(address)
    made.freed += 1


@_Destructor
def _destroy(capsule: int) -> None:
    """As dlpack.h asks of producers: a capsule that nobody took frees what it holds."""
    for name, kind in _TYPES.items():
        if _is_valid(capsule, name):
            address = _pointer(capsule, name)
            _Deleter(kind.from_address(address).deleter)(address)


class Made:
    """Capsules over `memory`, with every field at will; `freed` counts how many have let it go."""

    def __init__(self, memory: Any, **fields: Any) -> None:
        self.memory, self.fields, self.freed, self.made = memory, fields, 0, 0

    def capsule(self, kind: bytes) -> Any:
        get = {**self.defaults(), **self.fields}.__getitem__
        managed = _TYPES[kind]()
        tensor, shape, strides = managed.tensor, get("shape"), get("strides")
        tensor.data = get("data")
        tensor.device_type, tensor.device_id = get("device")
        tensor.code, tensor.bits, tensor.lanes = get("dtype")
        tensor.ndim = get("ndim") if "ndim" in self.fields else len(shape or ())
        tensor.byte_offset = get("byte_offset")
        arrays = [None if n is None else (ctypes.c_int64 * max(len(n), 1))(*n) for n in (shape, strides)]
        for field, values in zip(("shape", "strides"), arrays):
            if values is not None:
                setattr(tensor, field, ctypes.cast(values, ctypes.POINTER(ctypes.c_int64)))
        if kind == VERSIONED:
            managed.major, managed.minor = get("version")
            managed.flags = get("flags")
        managed.deleter = ctypes.cast(_delete, ctypes.c_void_p).value
        _alive[ctypes.addressof(managed)] = ((managed, arrays, self.memory), self)
        self.made += 1
        name = _NAMES[self.fields.get("name", kind)]
        return _new(
            ctypes.addressof(managed), ctypes.cast(name, ctypes.c_char_p), ctypes.cast(_destroy, ctypes.c_void_p)
        )

    def defaults(self) -> dict[str, Any]:
        a = self.memory
        row = DTYPES[a.dtype.name]
        return {
            "data": a.ctypes.data,
            "device": (1, 0),
            "dtype": (*row.dlpack, 1),
            "shape": a.shape,
            "strides": tuple(s // a.itemsize for s in a.strides),
            "byte_offset": 0,
            "version": (1, 0),
            "flags": 0,
        }


class Producer:
    """DLPack as of today: a versioned capsule to whoever can take one. `asked` holds the keywords of each request."""

    def __init__(self, memory: Any, **fields: Any) -> None:
        self.made, self.asked = Made(memory, **fields), []

    def __dlpack_device__(self) -> Any:
        return 1, 0

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        given = {"stream": stream, "max_version": max_version, "dl_device": dl_device, "copy": copy}
        self.asked.append({name: value for name, value in given.items() if value is not None})
        return self.made.capsule(LEGACY if max_version is None or max_version[0] < 1 else VERSIONED)


class Of2021(Producer):
    """The protocol as it was first published: no version, no flags."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        self.asked.append({} if stream is None else {"stream": stream})
        return self.made.capsule(LEGACY)


class StreamOnly(Producer):
    """Knows streams by keyword, and no version (warp, onnxruntime)."""

    def __dlpack__(self, *, stream: Any = None) -> Any:  # type: ignore[override]
        self.asked.append({} if stream is None else {"stream": stream})
        return self.made.capsule(LEGACY)


class Bare(Producer):
    """Takes no keyword at all."""

    def __dlpack__(self) -> Any:  # type: ignore[override]
        self.asked.append({})
        return self.made.capsule(LEGACY)


class TakesAnything(Producer):
    """Takes every keyword and answers in the old way all the same (JAX)."""

    def __dlpack__(self, **keywords: Any) -> Any:
        self.asked.append(keywords)
        return self.made.capsule(LEGACY)


AGES = {"today": Producer, "2021": Of2021, "stream only": StreamOnly, "no keywords": Bare, "any keyword": TakesAnything}


class Holder:
    """Hands out one capsule, over and over."""

    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack_device__(self) -> Any:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule


def laid_out(shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any = "int64", offset: int = 0) -> Any:
    """An array of these strides in elements, which may be negative, over memory in which no two elements are equal."""
    dtype = np.dtype(dtype)
    reach = [(n - 1) * s for n, s in zip(shape, strides) if n]
    low, high = sum(s for s in reach if s < 0), sum(s for s in reach if s > 0)
    memory = np.zeros((high - low + 1) * dtype.itemsize + offset, dtype="uint8")
    elements = memory[offset : offset + (high - low + 1) * dtype.itemsize].view(dtype)
    elements[...] = np.arange(1, high - low + 2)
    bytes_apart = tuple(s * dtype.itemsize for s in strides)
    return np.ndarray(shape, dtype, memory.data, offset - low * dtype.itemsize, bytes_apart)


def numbers(x: Any) -> Any:
    """Nested lists of the elements, read one by one through the array's own strides."""
    a = np.asarray(x)
    return np.array([a[i].item() for i in itertools.product(*map(range, a.shape))], dtype=object).reshape(a.shape)

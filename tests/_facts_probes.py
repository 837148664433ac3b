"""What the fact tests look with: a process that may die, a DLPack capsule read by ctypes, a producer that listens."""

import ctypes
import subprocess
import sys
import weakref
from typing import NamedTuple

import numpy as np
import torch

NUMPY = tuple(int(part) for part in np.__version__.split(".")[:2])
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def address(x):
    """The address of the first element of an array or a tensor."""
    return x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data


def in_a_process(code, imports="numpy as np, torch"):
    """Run `code` in a Python of its own, which may die (no core is dumped): a signal is a negative ``returncode``."""
    no_core = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    code = f"{no_core}\nimport {imports}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements
        ("byte_offset", ctypes.c_uint64),
    ]


class DLManagedTensor(ctypes.Structure):
    _fields_ = [("tensor", DLTensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    ]


READ_ONLY, IS_COPIED = 1, 2

_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class Capsule(NamedTuple):
    major: int | None  # None in a legacy capsule, like flags
    flags: int | None
    device: tuple
    dtype: tuple  # code, bits, lanes
    shape: tuple
    strides: tuple | None  # in elements; None where the pointer is NULL
    byte_offset: int
    data: int | None  # None where the pointer is NULL


def capsule_name(capsule):
    return _name(capsule).decode()


def read_capsule(capsule):
    """The fields of a capsule that has not been consumed; the capsule must outlive the call, nothing else."""
    name = capsule_name(capsule)
    assert name in ("dltensor", "dltensor_versioned")
    legacy = name == "dltensor"
    managed = (DLManagedTensor if legacy else DLManagedTensorVersioned).from_address(_pointer(capsule, name.encode()))
    tensor = managed.tensor
    return Capsule(
        major=None if legacy else managed.major,
        flags=None if legacy else managed.flags,
        device=(tensor.device_type, tensor.device_id),
        dtype=(tensor.code, tensor.bits, tensor.lanes),
        shape=tuple(tensor.shape[: tensor.ndim]) if tensor.ndim else (),
        strides=tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
        byte_offset=tensor.byte_offset,
        data=tensor.data,
    )


class Producer:
    """An array behind `__dlpack__`, which writes down how it was asked."""

    def __init__(self, array):
        self.array, self.asked = array, []

    def __dlpack_device__(self):
        return (1, 0)

    def __dlpack__(self, **keywords):
        self.asked.append(keywords)
        return self.array.__dlpack__(**keywords)


class ProducerBefore2023(Producer):
    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


def fate(export, act):
    """What becomes of the memory under ``export(tensor)`` when ``act(tensor)`` is done: nothing of it is read.

    "refused": `act` raised and the memory is there; "intact": it is there; "freed": the view outlives its memory.
    """
    tensor = torch.arange(64.0)
    storage = weakref.ref(tensor.untyped_storage())
    view = export(tensor)
    try:
        act(tensor)
        refused = False
    except RuntimeError:
        refused = True
    owner = storage()
    if owner is None or owner.data_ptr() != address(view):
        return "freed"
    return "refused" if refused else "intact"

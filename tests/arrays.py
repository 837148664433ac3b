"""The arrays that tests speak of, by name. Each entry builds one when asked; nothing is built at collection.

Values are small positive whole numbers, so that every dtype holds them exactly; `numbers` says what they are by a road
that tensorbridge does not take.
"""

from __future__ import annotations

import array
import ctypes
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from tensorbridge import BridgeError
from tensorbridge._dtypes import DTYPES

SIX = (2, 3)
HALVES = [[1, 0, 2], [0, 3, 0]]  # of the numbers 1, 2 and 3 of twice the width


def digits(*shape: int, dtype: Any = "float64") -> Any:
    count = int(np.prod(shape))
    top = {"bool": 1, "int2": 1, "uint2": 3, "float8_e8m0fnu": 2}.get(np.dtype(dtype).name, 6)
    return (np.arange(count) % top + 1).astype("float32").astype(dtype).reshape(shape)


def tensor(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    count = int(np.prod(shape))
    top = 1 if dtype == torch.bool else 2 if dtype == torch.float8_e8m0fnu else 6
    return (torch.arange(count) % top + 1).to(torch.float32).to(dtype).reshape(shape)


def spiral(*shape: int) -> torch.Tensor:
    """Complex numbers that are their own conjugate nowhere."""
    t = tensor(*shape)
    return torch.complex(t, t + 1)


def frozen(a: Any) -> Any:
    a.flags.writeable = False
    return a


def strided(a: Any, strides: tuple[int, ...]) -> Any:
    return np.lib.stride_tricks.as_strided(a, strides=strides)


def filled(a: Any) -> Any:
    a[...] = digits(*a.shape, dtype=a.dtype)
    return a


def unaligned(dtype: str = "float64", count: int = 6) -> Any:
    data = bytearray(1 + count * np.dtype(dtype).itemsize)
    a = np.frombuffer(data, dtype=dtype, offset=1, count=count)
    a[:] = digits(count, dtype=dtype)
    return a


def half_aligned() -> Any:
    """Complex numbers eight bytes off a multiple of their size: aligned to NumPy, and torch's kernels die of it."""
    floats = np.zeros(15)
    start = 1 if floats.__array_interface__["data"][0] % 16 == 0 else 0
    a = floats[start : start + 12].view("complex128")
    a[:] = digits(6)
    return a


def column() -> Any:
    """A field of packed records: its elements lie five bytes apart."""
    records = np.zeros(6, dtype=[("tag", "i1"), ("x", "f4")])
    records["x"] = digits(6)
    return records["x"]


def on_disk(mode: Any) -> Any:
    folder = tempfile.TemporaryDirectory()
    digits(6).tofile(Path(folder.name) / "six")
    mapped = np.memmap(Path(folder.name) / "six", dtype="float64", mode=mode, shape=(6,))
    KEPT.append(folder)  # until the process ends: Windows cannot remove a mapped file
    return mapped


KEPT: list[Any] = []


@torch.inference_mode()
def in_inference_mode() -> torch.Tensor:
    return tensor(*SIX)


class Tagged(np.ndarray):  # type: ignore[type-arg]
    """A subclass that adds nothing."""


class Lettered(torch.Tensor):
    """A subclass that adds nothing."""


# -- Objects that speak one protocol and nothing else


class Speaker:
    def __init__(self, array: Any, *silent: str) -> None:
        self.truth, self.inner = numbers(array), array


class Dlpack(Speaker):
    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **keywords: Any) -> Any:
        return self.inner.__dlpack__(**keywords)


class OldDlpack(Dlpack):
    """As before 2023: no version, no flags."""

    def __dlpack__(self, stream: None = None) -> Any:  # type: ignore[override]
        return self.inner.__dlpack__()


class CopyingDlpack(Dlpack):
    """Gives copies, says so by the flag of the capsule, and refuses where it may not."""

    def __dlpack__(self, copy: bool | None = None, **keywords: Any) -> Any:
        if copy is False:
            raise BufferError("its memory is not laid out like this")
        return self.inner.__dlpack__(copy=True, **keywords)


class Interface(Speaker):
    @property
    def __array_interface__(self) -> Any:
        return self.inner.__array_interface__


class Arrayed(Speaker):
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.inner if not copy else self.inner.copy()


class CopyingArray(Speaker):
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("its memory is not laid out like this")
        return self.inner.copy()


class MakingArray(Speaker):
    """Makes an array each time, and says nothing of it."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.inner.copy()


class MakingInterface(Speaker):
    @property
    def __array_interface__(self) -> Any:
        return {**self.inner.__array_interface__, "data": bytearray(self.inner.tobytes())}


def numbers(x: Any) -> Any:
    """The values of `x` as complex128, by element access and each framework's own widening casts."""
    if isinstance(x, Speaker):
        return x.truth
    if isinstance(x, torch.Tensor):
        x = x.detach()
        if x.dtype == torch.float4_e2m1fn_x2:
            x = x.view(torch.uint8)
        return torch.zeros(x.shape, dtype=torch.complex128).copy_(x.cpu()).numpy()
    if isinstance(x, (list, tuple)):
        return np.array([numbers(part) for part in x], dtype=complex)
    if isinstance(x, (bytes, bytearray, memoryview)):
        view = memoryview(x)
        return np.array(view.tolist(), dtype=complex)
    if isinstance(x, (array.array, ctypes.Array)):
        return np.array(list(x), dtype=complex)
    a = np.asarray(x)
    return a.astype("complex128") if a.dtype != "float8_e8m0fnu" else a.astype("float32").astype("complex128")


REFUSALS = (BridgeError, ValueError, TypeError)


def looks(x: Any) -> tuple[Any, ...]:
    """All that a caller can see of a result, but its values and its address."""
    if isinstance(x, torch.Tensor):
        storage = x.untyped_storage()
        return (
            type(x),
            x.dtype,
            x.shape,
            x.stride(),
            x.storage_offset(),
            x.requires_grad,
            x._is_view(),
            storage.nbytes(),
        )
    return type(x), x.dtype, x.dtype.isnative, x.shape, x.strides, x.flags.writeable, x.flags.aligned


def attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What a call returns, or how it refuses."""
    try:
        return call(), None
    except REFUSALS as refusal:
        return None, refusal


# -- The names

Build = Callable[[], Any]

NUMPY: dict[str, Build] = {
    "plain": lambda: digits(*SIX),
    "zero-d": lambda: np.array(3.0),
    "zero-d-read-only": lambda: frozen(np.array(3.0)),
    "fortran": lambda: np.asfortranarray(digits(*SIX)),
    "permuted": lambda: digits(2, 3, 4).transpose(1, 2, 0),
    "strided": lambda: digits(12)[::2],
    "strided-fortran": lambda: np.asfortranarray(digits(4, 6))[::2],
    "sliced-rows": lambda: digits(6, 4)[:, 1:3],
    "view-of-view": lambda: digits(12)[1:][1:].reshape(2, 5)[:, 1:],
    "reversed": lambda: digits(6)[::-1],
    "reversed-rows": lambda: digits(*SIX)[::-1],
    "reversed-both": lambda: digits(4, 6)[::-2, ::-1],
    "reversed-fortran": lambda: np.asfortranarray(digits(*SIX))[:, ::-1],
    "reversed-read-only": lambda: frozen(digits(6)[::-1]),
    "reversed-complex": lambda: (digits(6) * (1 + 2j))[::-1],
    "odd": column,
    "odd-but-aligned": lambda: filled(np.zeros(6, dtype=[("x", "c8"), ("tag", "i4")])["x"]),
    "odd-reversed": lambda: column()[::-1],
    "odd-read-only": lambda: frozen(column()),
    "overlap-writable": lambda: np.lib.stride_tricks.sliding_window_view(digits(6), 3, writeable=True),
    "overlap-read-only": lambda: np.lib.stride_tricks.sliding_window_view(digits(6), 3),
    "overlap-of-plain-memory": lambda: np.ndarray((2, 3), "float64", buffer=digits(3), strides=(0, 8)),
    "overlap-reversed": lambda: np.lib.stride_tricks.sliding_window_view(digits(6), 3, writeable=True)[::-1],
    "broadcast": lambda: np.broadcast_to(digits(3), SIX),
    "unaligned": unaligned,
    "unaligned-reversed": lambda: unaligned()[::-1],
    "unaligned-read-only": lambda: frozen(unaligned("int16")),
    "unaligned-complex": lambda: unaligned("complex64"),
    "aligned-to-half-a-complex": lambda: half_aligned(),
    "read-only": lambda: frozen(digits(*SIX)),
    "read-only-view": lambda: frozen(digits(*SIX)[:, :2]),
    "frombuffer-bytes": lambda: np.frombuffer(digits(6).tobytes()),
    "memmap-r": lambda: on_disk("r"),
    "memmap-r+": lambda: on_disk("r+"),
    "memmap-c": lambda: on_disk("c"),
    "memmap-r-view": lambda: np.asarray(on_disk("r"))[1:4],
    "memmap-r-reversed": lambda: on_disk("r")[::-1],
    "big-endian": lambda: digits(*SIX, dtype=">f4"),
    "big-endian-complex": lambda: digits(*SIX, dtype=">c16"),
    "big-endian-short-reversed": lambda: digits(6, dtype=">i2")[::-1],
    "big-endian-unaligned-read-only": lambda: frozen(unaligned(">i8")),
    "length-1-reversed": lambda: digits(6)[::-1][:1],
    "length-1-read-only": lambda: frozen(digits(6)[::-1][:1]),
    "length-1-axis-reversed": lambda: digits(6, 2)[:, ::-1][:, :1],
    "length-1-axis-odd": lambda: np.lib.stride_tricks.as_strided(digits(4, 1), (4, 1), (8, 3)),
    "length-1-axis-plain": lambda: digits(4, 1),
    "length-1-axis-huge": lambda: np.lib.stride_tricks.as_strided(digits(1, 4), (1, 4), (8 << 40, 8)),
    "empty": lambda: np.zeros(0),
    "empty-matrix": lambda: np.zeros((0, 3), dtype="int16"),
    "empty-reversed": lambda: np.zeros((3, 0))[::-1],
    "empty-slice-reversed": lambda: digits(6)[3:3:-1],
    "empty-read-only": lambda: frozen(np.zeros((0, 3))),
    "empty-big-endian": lambda: np.zeros(0, dtype=">f8"),
    "medium": lambda: digits(100, 200),
    "medium-fortran": lambda: digits(100, 200).T,
    "medium-read-only": lambda: frozen(digits(100, 200)),
    "large": lambda: digits(1024, 600),
    "large-reversed": lambda: digits(1024, 600)[::-1],
    "large-fortran-float16": lambda: digits(1500, 1500, dtype="float16").T,
    "longlong": lambda: digits(6, dtype="longlong"),
    "ulonglong": lambda: digits(6, dtype="ulonglong"),
    "subclass": lambda: digits(*SIX).view(Tagged),
    "subclass-read-only": lambda: frozen(digits(*SIX).view(Tagged)),
    "record-array-field": lambda: np.rec.fromarrays([digits(6), digits(6)], names="a,b").b,
} | {f"dtype-{name}": partial(digits, *SIX, dtype=row.numpy) for name, row in DTYPES.items() if row.numpy is not None}

TENSOR_VIEWS: dict[str, Build] = {
    "view-of-tensor": lambda: tensor(*SIX).numpy(),
    "view-of-tensor-in-graph": lambda: frozen(tensor(*SIX).requires_grad_().detach().numpy()),
    "view-of-tensor-strided": lambda: tensor(12).numpy()[1::3],
    "view-of-tensor-transposed": lambda: tensor(*SIX).numpy().T,
    "view-of-tensor-reversed": lambda: tensor(6).numpy()[::-1],
    "view-of-tensor-wider": lambda: torch.tensor(HALVES).int().ravel().numpy().view("int64"),
    "view-of-tensor-wider-than-its-rows": lambda: torch.tensor(HALVES).int().numpy().ravel().view("int64"),
    "view-of-tensor-beyond-its-storage": lambda: strided(torch.from_numpy(digits(12)[:6]).numpy(), (16,)),
    "view-of-tensor-before-its-storage": lambda: strided(torch.from_numpy(digits(12)[6:]).numpy(), (-8,))[::-1],
    "view-of-tensor-same-width": lambda: tensor(6, dtype=torch.int32).view(torch.float32).numpy().view("int32"),
    "view-of-tensor-bfloat16": lambda: (
        tensor(6, dtype=torch.bfloat16).view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    ),
    "view-of-tensor-read-only": lambda: frozen(tensor(*SIX).numpy()),
    "view-of-tensor-broadcast": lambda: np.broadcast_to(tensor(3).numpy(), SIX),
    "view-of-tensor-expanded": lambda: tensor(3).expand(2, 3).numpy(),
    "view-of-tensor-slice": lambda: tensor(12)[3:9].numpy()[::2],
    "view-of-tensor-big-endian": lambda: torch.from_numpy(digits(6).byteswap()).numpy().view(">f8"),
    "view-of-tensor-length-1": lambda: tensor(6).numpy()[::-1][:1],
    "view-of-tensor-empty": lambda: tensor(6).numpy()[:0],
    "view-of-tensor-odd": lambda: filled(strided(torch.zeros(8, dtype=torch.float32).numpy()[:6], (5,))),
    "view-of-tensor-int4": lambda: tensor(6, dtype=torch.int8).numpy().view(ml_dtypes.int4),
}

TORCH: dict[str, Build] = {
    "plain": lambda: tensor(*SIX),
    "zero-d": lambda: torch.tensor(3.0),
    "leaf": lambda: tensor(*SIX).requires_grad_(),
    "in-graph": lambda: tensor(*SIX).requires_grad_() * 1,
    "in-graph-transposed": lambda: (tensor(*SIX).requires_grad_() * 1).T,
    "in-graph-overlap": lambda: (tensor(3).requires_grad_() * 1).expand(2, 3),
    "in-graph-zero-d": lambda: tensor(3).requires_grad_().prod(),
    "in-graph-empty": lambda: tensor(0).requires_grad_() * 1,
    "parameter": lambda: torch.nn.Parameter(tensor(*SIX)),
    "subclass": lambda: tensor(*SIX).as_subclass(Lettered),
    "transposed": lambda: tensor(*SIX).T,
    "channels-last": lambda: tensor(2, 3, 2, 2).to(memory_format=torch.channels_last),
    "permuted": lambda: tensor(2, 3, 4).permute(1, 2, 0),
    "strided": lambda: tensor(12)[::2],
    "strided-fortran": lambda: tensor(4, 6).T[::2],
    "overlap": lambda: tensor(3).expand(2, 3),
    "overlap-windows": lambda: tensor(6).unfold(0, 3, 1),
    "length-1-axis": lambda: tensor(6)[::3][:1],
    "length-1-axis-wide": lambda: tensor(4, 6)[:, :1],
    "unaligned": lambda: torch.from_numpy(unaligned()),
    "unaligned-complex": lambda: torch.from_numpy(unaligned("complex64")),
    "conj": lambda: spiral(*SIX).conj(),
    "conj-transposed": lambda: spiral(*SIX).mH,
    "conj-in-graph": lambda: spiral(*SIX).requires_grad_().conj(),
    "conj-complex32": lambda: spiral(6).to(torch.complex32).conj(),
    "neg": lambda: spiral(*SIX).conj().imag,
    "neg-in-graph": lambda: spiral(*SIX).requires_grad_().conj().imag,
    "neg-float16": lambda: spiral(6).to(torch.complex32).conj().imag,
    "conj-neg": lambda: torch._neg_view(spiral(*SIX).conj()),
    "zero": lambda: torch._efficientzerotensor(SIX, dtype=torch.float64),
    "empty": lambda: torch.zeros(0),
    "empty-matrix": lambda: torch.zeros(3, 0).T,
    "medium": lambda: tensor(100, 200),
    "large": lambda: tensor(1024, 600),
    "large-transposed": lambda: tensor(1024, 600).T,
    "large-overlap": lambda: tensor(3).expand(200_000, 3),
    "large-bfloat16": lambda: tensor(1500, 1500, dtype=torch.bfloat16),
    "large-unaligned": lambda: torch.from_numpy(unaligned("float64", 600_000)),
    "large-conj": lambda: spiral(1024, 300).conj(),
    "large-in-graph": lambda: tensor(1024, 600).requires_grad_(),
    "shared": lambda: tensor(*SIX).share_memory_(),
    "of-array": lambda: torch.from_numpy(digits(*SIX)),
    "of-bytearray": lambda: torch.frombuffer(bytearray(digits(6).tobytes()), dtype=torch.float64),
    "inference": lambda: in_inference_mode(),
    "viewed-as-real": lambda: torch.view_as_real(spiral(*SIX)),
} | {
    f"dtype-{row.torch}": partial(tensor, *SIX, dtype=getattr(torch, row.torch))
    for name, row in DTYPES.items()
    if row.torch and name != "float4_e2m1fn_x2"
} | {"dtype-float4_e2m1fn_x2": lambda: tensor(*SIX, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}  # fmt: skip


FOREIGN: dict[str, Build] = {
    "dlpack": lambda: Dlpack(digits(*SIX)),
    "dlpack-read-only": lambda: Dlpack(frozen(digits(*SIX))),
    "dlpack-reversed": lambda: Dlpack(digits(6)[::-1]),
    "dlpack-strided": lambda: Dlpack(digits(12)[::2]),
    "dlpack-overlap": lambda: Dlpack(strided(digits(*SIX), (0, 8))),
    "dlpack-empty": lambda: Dlpack(np.zeros((0, 3))),
    "dlpack-zero-d": lambda: Dlpack(np.array(3.0)),
    "dlpack-bfloat16": lambda: Dlpack(tensor(*SIX, dtype=torch.bfloat16)),
    "dlpack-float8": lambda: Dlpack(tensor(*SIX, dtype=torch.float8_e5m2)),
    "dlpack-of-tensor": lambda: Dlpack(tensor(*SIX).T),
    "dlpack-old": lambda: OldDlpack(digits(*SIX)),
    "dlpack-old-of-tensor": lambda: OldDlpack(tensor(*SIX)),
    "dlpack-copied": lambda: CopyingDlpack(digits(*SIX)),
    "dlpack-copied-reversed": lambda: CopyingDlpack(digits(6)[::-1]),
    "dlpack-copied-fortran": lambda: CopyingDlpack(digits(*SIX).T),
    "interface": lambda: Interface(digits(*SIX)),
    "interface-read-only": lambda: Interface(frozen(digits(*SIX))),
    "interface-big-endian": lambda: Interface(digits(6, dtype=">i4")),
    "interface-reversed": lambda: Interface(digits(6)[::-1]),
    "arrayed": lambda: Arrayed(digits(*SIX)),
    "arrayed-read-only": lambda: Arrayed(frozen(digits(*SIX))),
    "arrayed-reversed": lambda: Arrayed(digits(6)[::-1]),
    "arrayed-copied": lambda: CopyingArray(digits(*SIX)),
    "arrayed-copied-big-endian": lambda: CopyingArray(digits(6, dtype=">i4")),
    "arrayed-copied-silently": lambda: MakingArray(digits(*SIX)),
    "arrayed-copied-silently-fortran": lambda: MakingArray(digits(*SIX).T),
    "interface-copied-silently": lambda: MakingInterface(digits(*SIX)),
    "bytes": lambda: bytes([1, 2, 3]),
    "bytearray": lambda: bytearray([1, 2, 3]),
    "array.array": lambda: array.array("f", [1.0, 2.0, 3.0]),
    "memoryview": lambda: memoryview(array.array("i", [1, 2, 3, 4]))[::2],
    "memoryview-reversed": lambda: memoryview(array.array("i", [1, 2, 3, 4]))[::-1],
    "memoryview-read-only": lambda: memoryview(digits(6)).toreadonly(),
    "ctypes": lambda: (ctypes.c_double * 4)(1, 2, 3, 4),
}

PYTHON: dict[str, Build] = {
    "bool": lambda: True,
    "int": lambda: 3,
    "float": lambda: 5.0,
    "complex": lambda: 1 + 2j,
    "numpy-float32": lambda: np.float32(5),
    "numpy-bool": lambda: np.bool_(True),
    "numpy-uint64": lambda: np.uint64(3),
    "numpy-longdouble": lambda: np.longdouble(5),
    "bfloat16": lambda: ml_dtypes.bfloat16(5),
    "list": lambda: [1, 2, 3],
    "list-nested": lambda: [[1.0, 2.0], [3.0, 4.0]],
    "list-of-bools": lambda: [True, False],
    "list-mixed-numbers": lambda: [1, 2.0, True],
    "list-complex": lambda: [1, 2j],
    "list-empty": list,
    "list-of-empty": lambda: [[], []],
    "tuple": lambda: (1, 2, 3),
    "list-of-numpy-scalars": lambda: [np.float32(1), np.float32(2)],
    "list-of-bfloat16": lambda: [ml_dtypes.bfloat16(1), ml_dtypes.bfloat16(2)],
    "list-of-arrays": lambda: [digits(*SIX), digits(*SIX)],
    "list-of-reversed": lambda: [digits(6)[::-1], digits(6)],
    "list-of-fortran": lambda: [np.asfortranarray(digits(*SIX))] * 2,
    "list-of-read-only": lambda: [frozen(digits(6)), frozen(digits(6))],
    "list-of-big-endian": lambda: [digits(6, dtype=">f4"), digits(6, dtype="f4")],
    "list-of-bfloat16-arrays": lambda: [digits(6, dtype=ml_dtypes.bfloat16)] * 2,
    "list-of-lists-of-arrays": lambda: [[digits(3), digits(3)], [digits(3), digits(3)]],
    "list-of-empty-arrays": lambda: [np.zeros((0, 3))] * 2,
    "list-of-views-of-tensors": lambda: [tensor(6).numpy(), tensor(6).numpy()],
    "list-of-dlpack": lambda: [Dlpack(digits(*SIX)), Dlpack(digits(*SIX))],
    "list-of-tensors": lambda: [tensor(*SIX), tensor(*SIX)],
    "list-of-tensors-in-graph": lambda: [tensor(6).requires_grad_(), tensor(6)],
    "list-of-tensors-zero-d": lambda: [torch.tensor(1.0), torch.tensor(2.0)],
    "list-of-lists-of-tensors": lambda: [[tensor(3), tensor(3)], [tensor(3), tensor(3)]],
    "list-of-conj-tensors": lambda: [spiral(6).conj(), spiral(6).conj()],
    "list-of-neg-tensors": lambda: [spiral(6).conj().imag] * 2,
    "list-of-zero-tensors": lambda: [torch._efficientzerotensor((3,))] * 2,
    "list-of-float8-tensors": lambda: [tensor(6, dtype=torch.float8_e5m2)] * 2,
    "list-of-channels-last": lambda: [tensor(1, 3, 2, 2).to(memory_format=torch.channels_last)] * 2,
    "list-of-tensors-expanded": lambda: [tensor(3).expand(2, 3)] * 2,
}

ARRAYS: dict[str, Build] = {
    f"{family}-{name}": build
    for family, builds in (
        ("numpy", NUMPY | TENSOR_VIEWS),
        ("torch", TORCH),
        ("foreign", FOREIGN),
        ("python", PYTHON),
    )
    for name, build in builds.items()
}

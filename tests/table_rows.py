"""The rows of README's table as real arrays, and whether a cell of it holds for one of them."""

from __future__ import annotations

import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import tensorbridge as tb
from tensorbridge._commands import _matrix

VALUES = np.arange(1.0, 17.0, dtype=np.float32).reshape(4, 4)


class Immutable:
    """As JAX exports: DLPack without flags."""

    def __init__(self) -> None:
        self.memory = VALUES.copy()

    def __dlpack__(self, **keywords: Any) -> Any:
        if "max_version" in keywords:
            raise TypeError("an old producer")
        return self.memory.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def frozen() -> Any:
    a = VALUES.copy()
    a.flags.writeable = False
    return a


def mapped(folder: Path) -> Any:
    VALUES.tofile(folder / "map")
    return np.memmap(folder / "map", np.float32, "r", shape=VALUES.shape)


def records() -> Any:
    a = np.zeros(VALUES.shape, [("flag", "i1"), ("x", "f4")])
    a["x"] = VALUES
    return a["x"]


def tensor(**options: Any) -> torch.Tensor:
    return torch.tensor(VALUES, **options)


def cupy_array() -> Any:
    import cupy

    return cupy.array(VALUES)


# How each is made, and the values that it has.
ROWS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "NumPy array": (lambda _: VALUES.copy(), VALUES),
    "NumPy, read-only": (lambda _: frozen(), VALUES),
    'NumPy memory map, mode "r"': (mapped, VALUES),
    "NumPy, reversed `a[::-1]`": (lambda _: VALUES.copy()[::-1], VALUES[::-1]),
    "NumPy, every other `a[::2]`": (lambda _: VALUES.copy()[::2], VALUES[::2]),
    "NumPy, a field of records": (lambda _: records(), VALUES),
    "NumPy, big-endian": (lambda _: VALUES.astype(">f4"), VALUES),
    "NumPy, `broadcast_to`": (lambda _: np.broadcast_to(VALUES[0].copy(), (3, 4)), np.stack([VALUES[0]] * 3)),
    "NumPy bfloat16 (ml_dtypes)": (lambda _: VALUES.astype(ml_dtypes.bfloat16), VALUES),
    "NumPy float8 (ml_dtypes)": (lambda _: VALUES.astype(ml_dtypes.float8_e4m3fn), VALUES),
    "NumPy view of a tensor": (lambda _: tensor().numpy(), VALUES),
    "torch, on the CPU": (lambda _: tensor(), VALUES),
    "torch, requires grad": (lambda _: tensor(requires_grad=True), VALUES),
    "torch bfloat16": (lambda _: tensor(dtype=torch.bfloat16), VALUES),
    "torch float8": (lambda _: tensor().to(torch.float8_e4m3fn), VALUES),
    "torch, conjugate or negative bit": (lambda _: torch.complex(tensor(), tensor()).conj(), VALUES - 1j * VALUES),
    "torch, `expand`": (lambda _: tensor()[:, :1].expand(4, 3), np.stack([VALUES[:, 0]] * 3, axis=1)),
    "torch, on CUDA": (lambda _: tensor(device="cuda"), VALUES),
    "torch, on CUDA, requires grad": (lambda _: tensor(device="cuda", requires_grad=True), VALUES),
    "CuPy": (lambda _: cupy_array(), VALUES),
    "CuPy, reversed": (lambda _: cupy_array()[::-1], VALUES[::-1]),
    "JAX, pyarrow, polars, pandas (lent read-only)": (lambda _: Immutable(), VALUES),
    "`bytes`": (lambda _: bytes(range(1, 9)), np.arange(1, 9)),
    "`bytearray`, `array.array`": (lambda _: array.array("f", [1.0, 2.0]), VALUES[0, :2]),
    "list of numbers or arrays": (lambda _: [1.0, 2.0], VALUES[0, :2]),
    "number": (lambda _: 1.5, np.array(1.5)),
    "NumPy longdouble": (lambda _: VALUES.astype(np.longdouble), VALUES),
}


def address(x: Any) -> int:
    """Where the first element lies; 0 where that has no meaning."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    if type(x).__module__.startswith("cupy"):
        return int(x.data.ptr)
    if isinstance(x, (list, float)):
        return 0
    return int(
        np.asarray(
            x.memory if isinstance(x, Immutable) else np.frombuffer(x, np.uint8) if isinstance(x, bytes) else x
        ).ctypes.data
    )


def values(x: Any) -> Any:
    """On the host, by the framework's own functions."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().resolve_conj()
        return x.to(torch.complex128 if x.is_complex() else torch.float64).numpy()
    if type(x).__module__.startswith("cupy"):
        x = x.get()
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def assert_cell_is_true(source: str, target: str, folder: Path) -> None:
    make, expected = ROWS[source]
    x, cell = make(folder), _matrix.cell(source, target)
    convert = {"numpy": tb.to_numpy, "torch": tb.to_torch, "cupy": tb.to_cupy}[target]
    if cell.text == "refused":
        for ask in (convert, lambda x: tb.plan(x, target)):
            with pytest.raises(tb.UnsupportedArrayError):
                ask(x)
        return
    plan = tb.plan(x, target)
    result = convert(x)
    assert tb.describe(result).framework == target
    assert plan.zero_copy == cell.shares
    assert np.array_equal(values(result), expected)
    if address(x):
        assert (address(result) == address(x)) == cell.shares
    if target == "numpy":
        assert result.flags.writeable != cell.text.endswith(", read-only")
    moved = {step.kind for step in plan.steps} - {""}
    assert ("d2h" in moved) == ("to the host" in cell.text)
    assert ("h2d" in moved) == ("to the GPU" in cell.text)

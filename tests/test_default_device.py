"""torch's default device and default dtype are the caller's, for what the caller makes: no conversion follows them."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from arrays import frozen, numbers

import tensorbridge as tb
from tensorbridge import tree
from tensorbridge._commands import _why_detach


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {"device": lambda: torch.device("meta"), "dtype": lambda: default_dtype(torch.float16)}


def a():
    return np.arange(6.0).reshape(2, 3)


def t(dtype=torch.float64):
    return torch.arange(6, dtype=dtype, device="cpu").reshape(2, 3)


def edited(x):
    with tb.editing(x) as array:
        array[0] = 7
    return x


WAYS = {
    "to_torch": lambda: tb.to_torch(a()),
    "copied": lambda: tb.to_torch(a(), copy=True),
    "cast": lambda: tb.to_torch(a(), dtype="float32"),
    "cast to bfloat16": lambda: tb.to_torch(a(), dtype="bfloat16"),
    "large": lambda: tb.to_torch(np.arange(1e6), dtype="float32"),
    "on the host": lambda: tb.to_torch(a(), device="cpu", copy=True),
    "reversed": lambda: tb.to_torch(a()[::-1]),
    "big-endian": lambda: tb.to_torch(a().astype(">f8")),
    "read-only": lambda: tb.to_torch(frozen(a())),
    "broadcast": lambda: tb.to_torch(np.broadcast_to(a(), (2, 2, 3))),
    "empty": lambda: tb.to_torch(np.empty((0, 3))),
    "int": lambda: tb.to_torch(3),
    "float": lambda: tb.to_torch(0.5),
    "list of numbers": lambda: tb.to_torch([0.5, 2]),
    "list of arrays": lambda: tb.to_torch([a(), a()]),
    "list of tensors": lambda: tb.to_torch([t(), t()]),
    "buffer": lambda: tb.to_torch(bytearray(b"abcd")),
    "filled": lambda: tb.to_torch(a(), out=t(torch.int32)),
    "back": lambda: tb.to_torch(tb.to_numpy(t())),
    "to_numpy": lambda: tb.to_numpy(t()),
    "to_numpy, cast": lambda: tb.to_numpy(t(), dtype="float32"),
    "conjugate": lambda: tb.to_numpy(t().to(torch.complex64).conj()),
    "zero tensor": lambda: tb.to_numpy(torch._efficientzerotensor(2, dtype=torch.float32, device="cpu")),
    "tree": lambda: tree.to_torch({"x": [a(), frozen(a())]})["x"][1],
    "tree, copied": lambda: tree.to_torch({"x": [a(), a()[:, 1:]]}, copy=True)["x"][1],
    "tree to NumPy": lambda: tree.to_numpy([t(), t()], copy=True)[1],
    "collate": lambda: tb.collate([a(), a()]),
    "collate, zero-d": lambda: tb.collate([np.array(1.0), np.array(2.0)]),
    "collate, reversed": lambda: tb.collate([a()[::-1], a()]),
    "collate, tensors": lambda: tb.collate([t(), t()]),
    "collate, arrays and tensors": lambda: tb.collate([a(), t()]),
    "collate, numbers": lambda: tb.collate([0.5, 2.0]),
    "prefetch": lambda: next(tb.prefetch([{"x": a()[::-1]}], device="cpu"))["x"],
    "prefetch, copied": lambda: next(tb.prefetch([a()], device="cpu", copy=True)),
    "editing": lambda: edited(t()),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name", WAYS)
def test_no_conversion_follows_the_default_device_or_dtype(name, default):
    expected = WAYS[name]()
    with DEFAULTS[default]():
        result = WAYS[name]()
    assert tb.describe(result).device == "cpu"
    assert tb.describe(result).dtype == tb.describe(expected).dtype
    assert np.array_equal(numbers(result), numbers(expected))


def test_batch_of_a_worker_process_does_not_follow_the_default_device(monkeypatch):
    from tensorbridge._trees import _collate

    monkeypatch.setattr(_collate, "_in_worker", lambda: True)
    with torch.device("meta"):
        batch = tb.collate([{"x": a(), "y": 1}, {"x": a(), "y": 2}])
    assert batch["x"].is_shared()
    assert batch["x"][1].tolist() == a().tolist()
    assert batch["y"].tolist() == [1, 2]


def test_demo_does_not_follow_the_default_device():
    with torch.device("meta"):
        assert _why_detach.result_runs()[0].gradient == [8.0, 16.0]
        assert _why_detach.input_runs()[0].gradient == [3.0, 4.0]

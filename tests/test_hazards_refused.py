"""Nothing convertible is refused: what can be converted is, in few steps, each with a reason."""

from __future__ import annotations

import array
import enum
import random
import time

import ml_dtypes
import numpy as np
import pytest
import torch
from _facts_probes import address
from _producers import Producer, laid_out

import tensorbridge as tb
from tensorbridge._dtypes import DTYPES

WITHOUT_BUFFERS = [name for name, row in DTYPES.items() if row.carrier and row.torch]  # bfloat16, float8 and their like
LAYOUTS = {
    "plain": lambda x: x,
    "transposed": lambda x: x.T,
    "strided": lambda x: x[:, ::2],
    "a row": lambda x: x[1],
    "one element": lambda x: x[1, 2],
    "length 1": lambda x: x[:1, :1],
    "empty": lambda x: x[:0],
}


def ones(name):
    return (np.arange(12).reshape(3, 4) % 2 + 1).astype("float32").astype(DTYPES[name].numpy)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", WITHOUT_BUFFERS)
def test_bfloat16_and_float8_cross_both_ways_without_a_copy(name, layout):
    """pytorch#90574, #101781, #109873: the request that is repeated most."""
    a = np.asarray(LAYOUTS[layout](ones(name)))
    t = tb.to_torch(a, copy=False) if layout != "one element" else tb.to_torch(a)
    assert (str(t.dtype), tuple(t.shape)) == (f"torch.{name}", a.shape)
    assert [op for op, *_ in tb.plan(a, "torch").steps if op != "restride"] == ["share"]
    back = tb.to_numpy(t, copy=False)
    assert (back.dtype, back.tobytes()) == (a.dtype, a.tobytes())
    assert not a.size or address(back) == address(t) == address(a)
    of_torch = LAYOUTS[layout](tb.to_torch(ones(name)))
    assert tb.to_numpy(of_torch, copy=False).tobytes() == a.tobytes()
    assert tb.to_torch(tb.to_numpy(of_torch), copy=False).data_ptr() == of_torch.data_ptr() or not a.size


@pytest.mark.parametrize("name", WITHOUT_BUFFERS)
def test_bfloat16_and_float8_that_have_to_be_copied_are(name):
    a = ones(name)
    windows = np.lib.stride_tricks.sliding_window_view(a.view(DTYPES[name].carrier), 2, 1).view(a.dtype)
    for source in (a[::-1], a[:, ::-1], np.broadcast_to(a[0], (3, 4)), windows):
        assert tb.to_numpy(tb.to_torch(source)).tobytes() == source.tobytes()
    if DTYPES[name].itemsize > 1:
        shifted = np.ndarray(a.shape, a.dtype, bytearray(b"\0" + a.tobytes()), 1)
        assert tb.to_numpy(tb.to_torch(shifted)).tobytes() == a.tobytes()


# -- One step with a reason


def packed_records():
    records = np.zeros(3, dtype=[("tag", "i1"), ("x", "f4")])
    records["x"] = [1, 2, 3]
    return records["x"]


def unaligned():
    return np.ndarray((3,), "float64", bytearray(b"\0" + np.arange(1.0, 4.0).tobytes()), 1)


ONE_STEP = {  # a source of 1, 2, 3; what moves, and why
    "big-endian": (lambda: np.array([1, 2, 3], dtype=">i4"), "byteswap", "native byte order"),
    "big-endian, reversed": (lambda: np.array([3, 2, 1], dtype=">f8")[::-1], "byteswap", "native byte order"),
    "reversed": (lambda: np.array([3.0, 2, 1])[::-1], "pack", "negative strides"),
    "reversed view of a tensor": (lambda: torch.tensor([3.0, 2, 1]).numpy()[::-1], "pack", "negative strides"),
    "reversed DLPack": (lambda: Producer(laid_out((3,), (-1,))[::-1][::-1]), "pack", "negative strides"),
    "strides of no whole elements": (packed_records, "pack", "whole elements"),
    "unaligned": (unaligned, "pack", "aligned"),
    "read-only": (lambda: np.frombuffer(np.arange(1.0, 4.0).tobytes()), "copy", "read-only"),
    "list of numbers": (lambda: [1, 2, 3], "stack", "one array"),
    "list of arrays": (lambda: [np.float32(1), np.float32(2), np.float32(3)], "stack", "one array"),
    "list of tensors": (lambda: [torch.tensor(n) for n in (1, 2, 3)], "stack", "by torch"),
}


@pytest.mark.parametrize("name", ONE_STEP)
def test_what_torch_cannot_hold_takes_one_step_that_says_why(name):
    make, op, why = ONE_STEP[name]
    source = make()
    plan = tb.plan(source, "torch")
    moving = [step for step in plan.steps if step.kind]
    assert [step.op for step in moving] == [op]
    assert why in moving[0].why
    assert plan.bytes_moved == tb.describe(source).nbytes
    values = tb.to_torch(source).tolist()
    assert values == ([3, 2, 1] if name == "reversed DLPack" else [1, 2, 3])
    with pytest.raises(tb.CopyRequiredError, match=op):
        tb.to_torch(source, copy=False)


@pytest.mark.parametrize(
    "name", [name for name in ONE_STEP if "list" not in name and name not in ("big-endian", "big-endian, reversed")]
)
def test_numpy_holds_what_torch_cannot(name):
    source = ONE_STEP[name][0]()
    assert tb.shares_memory(source, tb.to_numpy(source, copy=False))


# -- Numbers


class Level(enum.IntEnum):
    LOW = 1
    HUGE = 2**70


SCALARS = {
    "bool": (True, "bool"),
    "int": (5, "int64"),
    "float": (1.5, "float64"),
    "complex": (1 + 2j, "complex128"),
    "enum": (Level.LOW, "int64"),
    **{f"numpy {name}": (np.dtype(name).type(1), name) for name in ("bool", "int8", "uint64", "float16", "complex64")},
    "bfloat16": (ml_dtypes.bfloat16(1.5), "bfloat16"),
    "float8": (ml_dtypes.float8_e5m2(1.5), "float8_e5m2"),
    "big-endian": (np.array(7, dtype=">i4")[()], "int32"),
}


@pytest.mark.parametrize("name", SCALARS)
def test_a_number_is_a_0_d_array_at_no_cost(name):
    """NumPy scalars have no DLPack before NumPy 2.5."""
    number, dtype = SCALARS[name]
    t, a = tb.to_torch(number, copy=False), tb.to_numpy(number, copy=False)
    assert (t.shape, a.shape, str(t.dtype), str(a.dtype)) == ((), (), f"torch.{dtype}", dtype)
    assert t.item() == a.item() == number
    assert tb.plan(number, "torch").zero_copy


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, Level.HUGE, [2**63], [1, 2**64]], ids=str)
def test_a_number_that_does_not_fit_is_refused_at_once(number):
    """`x in range(...)` counts its way up for a subclass of int."""
    began = time.monotonic()
    with pytest.raises(tb.UnsupportedArrayError, match="does not fit"):
        tb.to_torch(number)
    assert time.monotonic() - began < 5


def test_the_largest_numbers_that_fit_do():
    for number in (2**63 - 1, -(2**63), [2**63 - 1, -(2**63)]):
        assert tb.to_torch(number).tolist() == tb.to_numpy(number).tolist() == number


@pytest.mark.parametrize("number", [2**63, [2**64 - 1, 0, True]], ids=str)
def test_a_number_that_fits_the_dtype_asked_for_is_taken(number):
    whole = np.array(number, dtype="uint64").tolist()
    assert tb.to_numpy(number, dtype="uint64").tolist() == tb.to_torch(number, dtype=np.uint64).tolist() == whole
    out = np.zeros(np.shape(number), "uint64")
    assert tb.to_numpy(number, out=out).tolist() == whole


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, [-1, 2**63], [0.5, 2**64]], ids=str)
def test_a_number_that_does_not_fit_the_dtype_asked_for_either_is_refused(number):
    with pytest.raises(tb.UnsupportedArrayError, match="does not fit"):
        tb.to_torch(number, dtype="uint64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2", "int8", "complex64"])
def test_a_number_is_free_in_every_dtype(dtype):
    for number in (3, 3.0, np.float64(3), np.int8(3)):
        with tb.copy_guard("error"):
            t, a = tb.to_torch(number, dtype=dtype, copy=False), tb.to_numpy(number, dtype=dtype, copy=False)
        assert (str(t.dtype), str(a.dtype), a.item()) == (f"torch.{dtype}", dtype, 3)
        assert t.to(torch.complex64).item() == 3


# -- Objects without DLPack; lists


def test_an_object_with_an_array_interface_only_is_shared():
    """pytorch#54138."""
    memory = np.arange(3.0)
    t = tb.to_torch(type("Only", (), {"__array_interface__": memory.__array_interface__})(), copy=False)
    t[0] = 7
    assert memory[0] == 7


LISTS = {
    "numbers": [[1, 2], [3, 4]],
    "tuples": ((1, 2), (3, 4)),
    "arrays": [np.array([1, 2]), np.array([3, 4])],
    "lists of arrays": [[np.array(1), np.array(2)], [np.array(3), np.array(4)]],
    "tensors": [torch.tensor([1, 2]), torch.tensor([3, 4])],
    "arrays of many layouts": [np.array([2, 1])[::-1], np.array([[3, 4]])[0]],
    "array.array": [array.array("q", [1, 2]), array.array("q", [3, 4])],
    "NumPy numbers": [[np.int64(1), np.int64(2)], [np.int64(3), np.int64(4)]],
    "both byte orders": [np.array([1, 2], dtype=">i8"), np.array([3, 4])],
    "size": torch.Size([1, 2]),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_becomes_one_array_in_one_step(name):
    source = LISTS[name]
    expected = [1, 2] if name == "size" else [[1, 2], [3, 4]]
    for convert in (tb.to_numpy, tb.to_torch):
        result = convert(source)
        assert (result.tolist(), str(result.dtype).removeprefix("torch.")) == (expected, "int64")


def test_a_list_of_arrays_is_not_read_number_by_number():
    """`torch.tensor` of such a list takes 450 times as long: pytorch#13918."""
    read = []

    class Watched(np.ndarray):
        def __getitem__(self, key):
            read.append(key)
            return super().__getitem__(key)

        def __iter__(self):
            read.append(0)
            return super().__iter__()

    parts = [np.arange(1000.0).view(Watched) for _ in range(20)]
    assert tb.to_torch(parts).shape == (20, 1000)
    assert not any(isinstance(key, int) for key in read)


RAGGED = {
    "numbers": ([[1, 2], [3]], r"\(1,\), \(2,\)"),
    "arrays": ([np.zeros(2), np.zeros(3)], r"\(2,\), \(3,\)"),
    "tensors": ([torch.zeros(2, 1), torch.zeros(2)], r"\(2,\), \(2, 1\)"),
    "depths": ([[1], 2], "some are not"),
    "numbers and arrays": ([1.5, np.zeros(2)], "both numbers and arrays"),
    "dtypes": ([np.zeros(2), np.zeros(2, dtype="float32")], "float32, float64"),
    "frameworks": ([np.zeros(2), torch.zeros(2)], "numpy, torch"),
}


@pytest.mark.parametrize("name", RAGGED)
def test_a_list_of_unequal_parts_is_refused_by_what_differs(name):
    parts, words = RAGGED[name]
    with pytest.raises(tb.UnsupportedArrayError, match=words):
        tb.to_torch(parts)


# -- What really cannot cross says what works instead

CURES = {
    "longdouble": (lambda: np.ones(3, dtype="longdouble"), {"dtype": "float64"}),
    "clongdouble": (lambda: np.ones(3, dtype="clongdouble"), {"dtype": "complex128"}),
    "float8_e3m4": (lambda: np.ones(3, dtype=ml_dtypes.float8_e3m4), {"dtype": "float16"}),
    "int4": (lambda: np.ones(3, dtype=ml_dtypes.int4), {"dtype": "int8"}),
}


@pytest.mark.parametrize("name", CURES)
def test_the_cure_in_a_message_works(name):
    make, options = CURES[name]
    with pytest.raises(tb.UnsupportedArrayError) as caught:
        tb.to_torch(make())
    assert f'Use dtype="{options["dtype"]}"' in str(caught.value)
    assert tb.to_torch(make(), **options).tolist() == [1, 1, 1]


CALLS = {
    "datetime": (lambda: np.array(["2020"], dtype="M8[s]"), lambda x: x.view("int64"), 'x.view("int64")'),
    "object": (lambda: np.array([1, 2], dtype=object), lambda x: x.astype("float64"), 'x.astype("float64")'),
    "string": (lambda: np.array(["b", "a"]), lambda x: np.unique(x, return_inverse=True)[1], "return_inverse=True"),
    "masked": (lambda: np.ma.masked_array([1.0], [True]), lambda x: x.filled(0), "x.filled("),
    "structured": (lambda: np.zeros(2, dtype=[("a", "f4")]), lambda x: x["a"], "x['name']"),
    "sparse": (lambda: torch.eye(2).to_sparse(), lambda x: x.to_dense(), "x.to_dense()"),
    "mkldnn": (lambda: torch.ones(2, 2).to_mkldnn(), lambda x: x.to_dense(), "x.to_dense()"),
    "meta": (lambda: torch.ones(2, device="meta"), lambda x: torch.zeros_like(x, device="cpu"), "torch.zeros_like(x"),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_call_in_a_message_works(name):
    make, cure, words = CALLS[name]
    with pytest.raises(tb.UnsupportedArrayError) as caught:
        tb.to_torch(make())
    assert words in str(caught.value)
    assert tb.to_torch(cure(make())).numel()


def test_the_order_of_sources_decides_nothing():
    """Decisions are cached by kind: whatever came before, a kind is treated alike."""
    sources = [make for make, *_ in ONE_STEP.values()]
    expected = [tb.to_torch(make()).tolist() for make in sources]
    for seed in range(3):
        order = random.Random(seed).sample(range(len(sources)), len(sources))
        assert [tb.to_torch(sources[i]()).tolist() for i in order] == [expected[i] for i in order]

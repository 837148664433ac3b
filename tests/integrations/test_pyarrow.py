"""pyarrow: immutable arrays that speak DLPack where they may; chunks, bits and tables are an array to be made."""

from __future__ import annotations

import gc

import numpy as np
import pyarrow as pa
import pytest
import torch

import tensorbridge as tb


def tensors():
    storage = pa.array([[1.0, 2.0, 3.0, 4.0]], pa.list_(pa.float32(), 4))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2, 2]), storage)


SHARED = {
    **{
        name: lambda name=name: pa.array(np.array([1, 2, 3], dtype=name))
        for name in (
            "int8",
            "int16",
            "int32",
            "int64",
            "uint8",
            "uint16",
            "uint32",
            "uint64",
            "float16",
            "float32",
            "float64",
        )
    },
    "slice": lambda: pa.array([0, 1, 2, 3])[1:],
    "column": lambda: pa.table({"a": [1, 2, 3]})["a"].chunk(0),
    "one chunk": lambda: pa.chunked_array([[1.0, 2.0]]),
    "tensors": tensors,
    "rows": lambda: pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2)),
}
OTHERS = {
    "truths": lambda: pa.array([True, False]),
    "chunks": lambda: pa.chunked_array([[1, 2], [3]]),
    "no chunk": lambda: pa.chunked_array([], pa.int32()),
    "chunks of truths": lambda: pa.chunked_array([[True], [False]]),
    "table": lambda: pa.table({"a": [1.0, 2.0], "b": [3.0, 4.0]}),
    "batch": lambda: pa.record_batch({"a": [1, 2], "b": [3, 4]}),
    "empty": lambda: pa.array([], pa.int64()),
}
NUMBERS = {**SHARED, **OTHERS}


def by_numpy(source):
    if isinstance(source, pa.ExtensionArray):
        return source.to_numpy_ndarray()
    if isinstance(source, pa.FixedSizeListArray):
        return source.flatten().to_numpy().reshape(len(source), -1)
    return np.asarray(source.chunk(0) if getattr(source, "num_chunks", 0) == 1 else source)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_come_as_they_are(name):
    source = NUMBERS[name]()
    expected = by_numpy(source)
    a, t = tb.to_numpy(source), tb.to_torch(source)
    assert a.tolist() == t.tolist() == expected.tolist()
    assert str(a.dtype) == str(t.dtype).removeprefix("torch.") == str(expected.dtype)


@pytest.mark.parametrize("name", NUMBERS)
def test_no_write_to_the_result_reaches_the_column(name):
    source = NUMBERS[name]()
    before = np.array(by_numpy(source)).tolist()
    tb.to_torch(source).zero_()
    a = tb.to_numpy(source)
    if a.flags.writeable:
        a[...] = 0
    assert by_numpy(source).tolist() == before


@pytest.mark.parametrize("name", SHARED)
def test_an_array_is_shared_with_numpy_and_stays_read_only(name):
    source = SHARED[name]()
    a = tb.to_numpy(source, copy=False)
    assert np.shares_memory(a, by_numpy(source))
    with pytest.raises(ValueError, match="read-only"):
        a[...] = 0
    assert tb.shares_memory(source, tb.to_torch(source, share_readonly=True, copy=False))
    with pytest.raises(tb.CopyRequiredError, match="read-only"):
        tb.to_torch(source, copy=False)


@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("empty", "no chunk")])
def test_what_has_to_be_copied_is_a_copy_that_copy_false_refuses(name):
    source = OTHERS[name]()
    with pytest.raises(tb.CopyRequiredError, match=rf"stack +{np.asarray(source).nbytes} B"):
        tb.to_numpy(source, copy=False)


def test_the_result_outlives_the_array():
    a = tb.to_numpy(pa.array(range(1000)))
    t = tb.to_torch(pa.array(range(1000)), share_readonly=True)
    gc.collect()
    others = [pa.array([0] * 1000) for _ in range(20)]
    assert a.sum() == t.sum() == 999 * 500
    assert len(others) == 20


def test_a_buffer_and_a_tensor_are_read():
    assert bytes(tb.to_numpy(pa.py_buffer(b"abc"))) == b"abc"
    assert not tb.to_numpy(pa.py_buffer(b"abc")).flags.writeable
    matrix = np.arange(6.0).reshape(2, 3)
    assert tb.to_torch(pa.Tensor.from_numpy(matrix)).tolist() == matrix.tolist()


def null_inside_a_tensor():
    storage = pa.array([[1.0, 2.0, None, 4.0]], pa.list_(pa.float32(), 4))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(pa.float32(), [2, 2]), storage)


MISSING = {
    "integers": (lambda: pa.array([1, None, None]), 2),
    "floats": (lambda: pa.array([1.5, None]), 1),
    "truths": (lambda: pa.array([True, None]), 1),
    "nothing": (lambda: pa.nulls(2), 2),
    "text": (lambda: pa.array(["a", None]), 1),
    "chunks": (lambda: pa.chunked_array([[1, None], [3]]), 1),
    "inside a tensor": (null_inside_a_tensor, 1),
}


@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize("name", MISSING)
def test_a_null_is_an_error_that_says_how_many_and_what_to_do(name, copy):
    """Chunks become floats with NaN, and what is null inside a tensor comes as whatever lies there."""
    make, count = MISSING[name]
    for convert in (tb.to_numpy, tb.to_torch):
        with pytest.raises(tb.UnsupportedArrayError, match=rf"has {count} missing value.*\n.*fill_null\("):
            convert(make(), copy=copy)


def test_the_cure_for_a_null_works():
    source = pa.array([1, None])
    assert tb.to_torch(source.fill_null(0)).tolist() == [1, 0]
    assert tb.to_torch(source.drop_null()).tolist() == [1]
    assert tb.to_torch(source.fill_null(0)).dtype is torch.int64


def test_a_null_in_a_table_is_named_by_its_column():
    for make in (pa.table, pa.record_batch):
        with pytest.raises(tb.UnsupportedArrayError, match=r"column 'age': .*it has 1 missing value"):
            tb.to_numpy(make({"height": [1.0, 2.0], "age": [1, None]}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: pa.chunked_array([["a"]]),
        lambda: pa.chunked_array([pa.array([1], pa.timestamp("s"))]),
        lambda: pa.array(["a"]),
        lambda: pa.array([1], pa.timestamp("s")),
        lambda: pa.array([[1, 2], [3]]),
        lambda: pa.array([{"a": 1}]),
        lambda: pa.table({"a": ["x"], "b": [1.0]}),
        lambda: pa.scalar(3),
        lambda: pa.scalar(None),
    ],
    ids=[
        "chunks of text",
        "chunks of moments",
        "text",
        "moments",
        "ragged lists",
        "records",
        "mixed table",
        "one number",
        "one null",
    ],
)
def test_what_is_no_array_of_numbers_is_refused(make):
    for convert in (tb.to_numpy, tb.to_torch):
        with pytest.raises(tb.UnsupportedArrayError) as caught:
            convert(make())
        assert len(str(caught.value).splitlines()) == 2

"""Columns hold what an array can hold, or are refused: no null, no digit, no copy is lost on the way."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import tensorbridge as tb
from tensorbridge import tree

BIG = 2**53 + 1  # no float64


def tensors(values: Any, shape: Any = (2,), kind: Any = None, **options: Any) -> Any:
    kind = kind or pa.float64()
    storage = pa.array(values, pa.list_(kind, int(np.prod(shape))))
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(kind, shape, **options), storage)


def arrow_pandas(values: Any, kind: Any) -> Any:
    return pd.Series(values, dtype=pd.ArrowDtype(kind))


def both(x: Any) -> Any:
    """What a column says by itself, and in a table."""
    for convert in (tb.to_numpy, lambda x: tree.to_numpy({"c": x})["c"]):
        yield convert(x)


# -- Nulls

LISTS = pa.list_(pa.float64())
FIXED = pa.list_(pa.float64(), 2)
HOLES = [[1.0, 2.0], [None, 3.0]]
INSIDE = {
    "fixed-shape tensors": lambda: tensors(HOLES),
    "fixed-shape tensors, sliced": lambda: tensors([[0, 0], *HOLES])[1:],
    "chunks of tensors": lambda: pa.chunked_array([tensors([[0, 0]]), tensors(HOLES)]),
    "lists": lambda: pa.array(HOLES, LISTS),
    "large lists": lambda: pa.array(HOLES, pa.large_list(pa.float64())),
    "chunks of lists": lambda: pa.chunked_array([[[0, 0]], HOLES], LISTS),
    "fixed-size lists": lambda: pa.array(HOLES, FIXED),
    "fixed-size lists, sliced": lambda: pa.array([[0, 0], *HOLES], FIXED)[1:],
    "lists of lists": lambda: pa.array([[[1.0], [None]]], pa.list_(LISTS)),
    "a list in a list": lambda: pa.array([[[1.0], None]], pa.list_(LISTS)),
    "categories": lambda: pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([5, None])),
    "lists of categories": lambda: pa.FixedSizeListArray.from_arrays(
        pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array([5, None])), 2
    ),
    "bool8": lambda: pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, None], pa.int8())),
    "pandas lists": lambda: arrow_pandas(HOLES, LISTS),
    "polars lists": lambda: pl.Series(HOLES),
    "polars arrays": lambda: pl.Series(HOLES, dtype=pl.Array(pl.Float64, 2)),
    "polars arrays in chunks": lambda: pl.concat([pl.Series(HOLES, dtype=pl.Array(pl.Float64, 2))] * 2, rechunk=False),
    "polars arrays of arrays": lambda: pl.Series([[[1, None]]], dtype=pl.Array(pl.Int64, (1, 2))),
    "polars lists of lists": lambda: pl.Series([[[1], [None]]], dtype=pl.List(pl.List(pl.Int64))),
    "a polars list in a list": lambda: pl.Series([[[1], None]], dtype=pl.List(pl.List(pl.Int64))),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_null_inside_a_column_does_not_become_a_number(name):
    x = INSIDE[name]()
    for convert in (tb.to_numpy, tb.to_torch, lambda x: tb.plan(x, "numpy")):
        with pytest.raises(tb.UnsupportedArrayError, match="has 1 missing value"):
            convert(x)
    for convert in (tree.to_numpy, tree.to_torch, lambda x: tree.plan(x, "numpy")):
        with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['c'\]: .*has 1 missing value"):
            convert({"c": x})


@pytest.mark.parametrize("name", ["fixed-shape tensors", "chunks of tensors", "lists", "fixed-size lists, sliced"])
def test_a_null_inside_a_column_is_named_in_a_table(name):
    table = pa.table({"good": pa.array(range(len(INSIDE[name]()))), "c": INSIDE[name]()})
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['c'\]: .*has 1 missing value inside its rows"):
        tree.to_numpy(table)


SLICED = {
    "fixed-shape tensors": lambda: tensors(HOLES)[:1],
    "lists": lambda: pa.array(HOLES, LISTS)[:1],
    "fixed-size lists": lambda: pa.array(HOLES, FIXED)[:1],
    "a null before": lambda: pa.array([None, [1.0, 2.0]], FIXED)[1:],
    "polars lists": lambda: pl.Series(HOLES)[:1],
    "polars arrays": lambda: pl.Series(HOLES, dtype=pl.Array(pl.Float64, 2))[:1],
}


@pytest.mark.parametrize("name", SLICED)
def test_a_null_that_was_sliced_off_does_not_count(name):
    for a in both(SLICED[name]()):
        assert a.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("values", [[1, 1, None], ["a"]])
def test_runs_views_maps_and_unions_are_refused(values):
    runs = pc.run_end_encode(pa.array(values))
    views = pa.array([values], pa.list_view(pa.array(values).type))
    union = pa.UnionArray.from_sparse(pa.array([0] * len(values), pa.int8()), [pa.array(values)])
    maps = pa.array([[("a", values[0])]], pa.map_(pa.string(), pa.array(values).type))
    for x in (runs, views, union, maps):
        for made in (x, pa.chunked_array([x, x])):
            with pytest.raises(tb.UnsupportedArrayError, match=r"cannot be converted: .*(runs of equal|not numbers)"):
                tb.to_numpy(made)


# -- Values


def test_tensors_have_the_axes_that_their_type_says():
    """Axis i of a tensor is axis permutation[i] of its memory. pyarrow 26 garbles a permutation of three itself."""
    values = np.arange(48.0).reshape(2, 2, 3, 4)
    x = tensors(values.reshape(2, 24).tolist(), [2, 3, 4], permutation=[2, 0, 1])
    for a in both(x):
        assert np.array_equal(a, values.transpose(0, 3, 1, 2))
    for a in both(x[1:]):
        assert np.array_equal(a, values.transpose(0, 3, 1, 2)[1:])
    x = tensors(values.reshape(2, 24).tolist(), [6, 4], permutation=[1, 0])
    for a in both(x):
        assert np.array_equal(a, x.to_numpy_ndarray())
        assert np.shares_memory(a, x.to_numpy_ndarray())


def test_tensors_of_truths_are_truths():
    x = tensors([[True, False, True, True, False, False]], [2, 3], pa.bool_(), permutation=[1, 0])
    for a in both(x):
        assert a.dtype == bool
        assert a.tolist() == [[[True, True], [False, False], [True, False]]]


@pytest.mark.parametrize("chunks", [1, 2])
def test_bool8_is_bool_and_any_byte_but_zero_is_true(chunks):
    x = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 1, 2], pa.int8()))
    x = pa.chunked_array([x[:chunks], x[chunks:]])
    for a in both(x):
        assert a.dtype == bool
        assert a.view("u1").tolist() == [0, 1, 1]


MATRICES = {
    "polars lists": lambda: pl.Series([[1, BIG], [3, 4]]),
    "polars arrays": lambda: pl.Series([[1, BIG], [3, 4]], dtype=pl.Array(pl.Int64, 2)),
    "polars chunks": lambda: pl.concat([pl.Series([[1, BIG]]), pl.Series([[3, 4]])], rechunk=False),
    "polars chunks with an empty one": lambda: pl.concat(
        [pl.Series([[1, BIG], [3, 4]]), pl.Series([[5, 6, 7]])], rechunk=False
    ).filter([True, True, False]),
    "pandas lists": lambda: arrow_pandas([[1, BIG], [3, 4]], pa.list_(pa.int64())),
    "pandas fixed-size lists": lambda: arrow_pandas([[1, BIG], [3, 4]], pa.list_(pa.int64(), 2)),
    "arrow lists": lambda: pa.array([[1, BIG], [3, 4]]),
    "arrow categories": lambda: pa.FixedSizeListArray.from_arrays(pa.array([1, BIG, 3, 4]).dictionary_encode(), 2),
    "arrow chunks": lambda: pa.chunked_array([[[1, BIG]], [], [[3, 4]]], pa.list_(pa.int64())),
}


@pytest.mark.parametrize("name", MATRICES)
def test_lists_of_one_length_are_a_matrix_in_every_library(name):
    for a in both(MATRICES[name]()):
        assert a.dtype == np.int64
        assert a.tolist() == [[1, BIG], [3, 4]]
    assert tb.to_torch(MATRICES[name]()).tolist() == [[1, BIG], [3, 4]]


@pytest.mark.parametrize("name", ["polars lists", "polars arrays", "pandas lists", "arrow lists"])
def test_such_a_matrix_is_a_read_only_view_of_the_column(name):
    x = MATRICES[name]()
    first, second = tb.to_numpy(x, copy=False), tb.to_numpy(x, copy=False)
    assert np.shares_memory(first, second)
    assert not first.flags.writeable


def test_deeper_polars_lists_are_deeper_arrays():
    values = [[[1, 2], [3, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]]
    for dtype in (
        pl.List(pl.List(pl.Int16)),
        pl.Array(pl.Int16, (3, 2)),
        pl.List(pl.Array(pl.Int16, 2)),
        pl.Array(pl.List(pl.Int16), 3),
    ):
        a = tb.to_numpy(pl.Series(values, dtype=dtype))
        assert a.dtype == np.int16
        assert a.tolist() == values
    assert tb.to_numpy(pl.Series([[True], [False]])).tolist() == [[True], [False]]


EMPTY_CHUNKS = {
    "an empty chunk last": ([[[1, 2], [3, 4]], []], (2, 2)),
    "an empty chunk first": ([[], [[1, 2]]], (1, 2)),
    "only empty chunks": ([[], []], (0, 0)),
    "empty lists": ([[[]], [[], []]], (3, 0)),
}


@pytest.mark.parametrize("name", EMPTY_CHUNKS)
def test_an_empty_chunk_of_lists_is_ordinary(name):
    chunks, shape = EMPTY_CHUNKS[name]
    x = pa.chunked_array(chunks, pa.list_(pa.int64()))
    made = tree.to_numpy(pa.table({"c": x}))["c"]
    assert made.shape == tb.plan(x, "numpy").source.shape == shape
    assert made.dtype == np.int64
    assert made.ravel().tolist() == [v for chunk in chunks for row in chunk for v in row]
    assert tree.to_numpy(pl.DataFrame(pa.table({"c": x})))["c"].tolist() == made.tolist()


RAGGED = {
    "in one chunk": lambda: pa.array([[1, 2], [1, 2, 3]]),
    "between chunks": lambda: pa.chunked_array([[[1, 2]], [[1, 2, 3]]]),
    "pandas": lambda: arrow_pandas([[1, 2], [1, 2, 3]], pa.list_(pa.int64())),
    "polars": lambda: pl.Series([[1, 2], [1, 2, 3]]),
    "polars, between chunks": lambda: pl.concat([pl.Series([[1, 2]]), pl.Series([[1, 2, 3]])], rechunk=False),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_lists_are_refused_by_the_plan_too(name):
    for call in (tree.to_numpy, tree.to_torch, lambda x: tree.plan(x, "numpy")):
        with pytest.raises(
            tb.UnsupportedArrayError, match=r"^batch\['c'\]: .*is ragged: its lists have 2 to 3 elements"
        ):
            call({"c": RAGGED[name]()})


def test_rows_of_different_shapes_between_chunks_are_refused():
    x = pa.chunked_array([[[[1, 2, 3], [4, 5, 6]]], [[[1, 2], [3, 4], [5, 6]]]])
    for call in (tb.to_numpy, lambda x: tb.plan(x, "numpy")):
        with pytest.raises(tb.UnsupportedArrayError, match=r"its rows have different shapes: \(2, 3\), \(3, 2\)"):
            call(x)


CATEGORIES = {
    "pandas": lambda: pd.Series([BIG, 1, BIG], dtype="category"),
    "pandas arrow": lambda: arrow_pandas(pa.array([BIG, 1, BIG]).dictionary_encode(), pa.dictionary("int32", "int64")),
    "arrow": lambda: pa.array([BIG, 1, BIG]).dictionary_encode(),
    "arrow, sliced": lambda: pa.array([7, BIG, 1, BIG]).dictionary_encode()[1:],
    "arrow chunks": lambda: pa.chunked_array(
        [pa.array([BIG]).dictionary_encode(), pa.array([1, BIG]).dictionary_encode()]
    ),
}


@pytest.mark.parametrize("name", CATEGORIES)
def test_categories_that_are_numbers_are_decoded_in_every_library(name):
    for a in both(CATEGORIES[name]()):
        assert a.dtype == np.int64
        assert a.tolist() == [BIG, 1, BIG]
    truths = pa.array([True, False, True]).dictionary_encode()
    assert tb.to_numpy(truths).tolist() == [True, False, True]


RECORDS = {
    "polars": lambda: pl.Series([{"id": BIG, "w": 0.5}]),
    "polars, inside": lambda: pl.Series([[{"id": BIG, "w": 0.5}]]),
    "arrow": lambda: pa.array([{"id": BIG, "w": 0.5}]),
    "arrow, inside": lambda: pa.array([[{"id": BIG, "w": 0.5}]]),
    "pandas": lambda: arrow_pandas([{"id": BIG, "w": 0.5}], pa.struct({"id": pa.int64(), "w": pa.float64()})),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_are_not_stacked_into_a_matrix(name):
    x = RECORDS[name]()
    for call in (tree.to_numpy, tree.to_torch, lambda x: tree.plan(x, "numpy")):
        with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['c'\]: .*a record of several fields"):
            call({"c": x})
    with pytest.raises(tb.UnsupportedArrayError, match="a record of several fields"):
        tb.to_numpy(x)


FRAMES = {"pandas": pd.DataFrame, "polars": pl.DataFrame, "arrow": pa.table, "arrow batch": pa.record_batch}
MIXED = {
    "integers and floats": {"id": [BIG], "w": [0.5]},
    "integers and truths": {"id": [BIG], "w": [True]},
    "widths": {"id": np.array([1], "i1"), "w": np.array([1], "i8")},
}


@pytest.mark.parametrize("columns", MIXED)
@pytest.mark.parametrize("name", FRAMES)
def test_a_table_of_several_dtypes_is_not_promoted(name, columns):
    frame = FRAMES[name](MIXED[columns])
    for convert in (tb.to_numpy, tb.to_torch, lambda x: tb.plan(x, "numpy")):
        with pytest.raises(
            tb.UnsupportedArrayError,
            match=r"columns have different dtypes: 'id' is .*, 'w' is .*\n.* tensorbridge\.tree\.to_\w+\(x\),",
        ):
            convert(frame)
    assert list(tree.to_numpy(frame)) == ["id", "w"]


@pytest.mark.parametrize("columns", MIXED)
@pytest.mark.parametrize("name", FRAMES)
def test_a_table_of_several_dtypes_becomes_the_one_that_is_asked_for(name, columns):
    frame = FRAMES[name](MIXED[columns])
    expected = np.stack([np.asarray(values, "float32") for values in MIXED[columns].values()], axis=1)
    for convert in (tb.to_numpy, tb.to_torch):
        made = convert(frame, dtype="float32")
        assert tb.describe(made).dtype == "float32"
        assert np.array_equal(np.asarray(made), expected)
    plan = tb.plan(frame, "torch", dtype="float32")
    assert (plan.bytes_moved, plan.steps[0].op) == (expected.nbytes, "stack")
    with pytest.raises(tb.UnsupportedArrayError) as error:
        tb.to_torch(frame)
    wanted = re.search(r'dtype="(\w+)"\.', str(error.value))[1]
    assert tb.to_torch(frame, dtype=wanted).shape == expected.shape


SAME = {"int64": [1, BIG], "float32": np.array([0.5, 1.5], "f4"), "bool": [True, False]}


@pytest.mark.parametrize("dtype", SAME)
@pytest.mark.parametrize("name", [*FRAMES, "pandas, masked", "pandas, arrow", "pandas, categories"])
def test_a_table_of_one_dtype_is_a_matrix(name, dtype):
    frame = FRAMES[name.partition(",")[0]]({"a": SAME[dtype], "b": SAME[dtype]})
    if "masked" in name:
        frame = frame.convert_dtypes()
    if "arrow" in name and "," in name:
        frame = frame.convert_dtypes(dtype_backend="pyarrow")
    if "categories" in name:
        frame = frame.astype("category")
    a, t = tb.to_numpy(frame), tb.to_torch(frame)
    assert str(a.dtype) == str(t.dtype).removeprefix("torch.") == dtype
    assert a.tolist() == t.tolist() == np.stack([SAME[dtype]] * 2, axis=1).tolist()


def test_a_table_without_columns_is_refused():
    for frame in (pd.DataFrame(), pl.DataFrame(), pa.table({})):
        with pytest.raises(tb.UnsupportedArrayError, match="without columns has no dtype"):
            tb.to_numpy(frame)


NOTHING_IN_IT = {
    "numbers": (pa.int16(), (0,)),
    "truths": (pa.bool_(), (0,)),
    "bool8": (pa.bool8(), (0,)),
    "lists": (pa.list_(pa.int64()), (0, 0)),
    "fixed-size lists": (pa.list_(pa.int64(), 2), (0, 2)),
    "tensors": (pa.fixed_shape_tensor(pa.int64(), [2, 3]), (0, 2, 3)),
    "categories": (pa.dictionary(pa.int32(), pa.int64()), (0,)),
}


@pytest.mark.parametrize("name", NOTHING_IN_IT)
def test_a_column_without_rows_keeps_its_dtype_and_the_lengths_that_are_known(name):
    kind, shape = NOTHING_IN_IT[name]
    for x in (pa.array([], kind), pa.chunked_array([], kind), pa.chunked_array([pa.array([], kind)] * 2)):
        for a in both(x):
            assert a.shape == shape
            assert a.dtype == {"numbers": "int16", "truths": "bool", "bool8": "bool"}.get(name, "int64")


@pytest.mark.parametrize("labels", [[2.5, 0.5, 1.5], ["c", "a", "b"], [5, -1, 3]])
def test_labels_of_a_series_say_nothing_of_its_elements(labels):
    x = pd.Series([1, 2, 1], index=labels)
    assert tb.to_numpy(x).tolist() == [1, 2, 1]
    assert tb.to_numpy(x.astype("category")).tolist() == [1, 2, 1]


def test_a_long_type_is_cut_in_the_error():
    x = pl.Series(["a"], dtype=pl.Enum(["a", *(f"Int128 {i}" for i in range(1000))]))
    with pytest.raises(tb.UnsupportedArrayError, match=r"Enum.* \.\.\. cannot be converted: its categories") as caught:
        tb.to_numpy(x)
    assert len(str(caught.value)) < 400


# -- Scalars of pyarrow


@pytest.mark.parametrize("value", ["hello", b"hello", 3, 0.5, True, None, [1]])
def test_one_value_of_pyarrow_is_left_alone_in_a_tree_and_refused_alone(value):
    x = pa.scalar(value)
    for convert in (tree.to_numpy, tree.to_torch):
        assert convert({"n": x, "a": np.zeros(1)})["n"] is x
    for convert in (tb.to_numpy, tb.to_torch):
        with pytest.raises(tb.UnsupportedArrayError, match=r"one value of pyarrow.*\n.*x\.as_py\(\)"):
            convert(x)
    assert tb.to_numpy(pa.scalar(3).as_py()).item() == 3

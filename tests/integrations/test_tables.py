"""Tables of the real libraries as trees of columns: shared where the target keeps the promise; nulls, text by name."""

from __future__ import annotations

import collections
import datetime
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

import tensorbridge as tb
from tensorbridge import tree
from tensorbridge._adapters import _missing

NUMBERS = {"i": [1, 2, 3], "f": [0.5, 1.5, 2.5], "b": [True, False, True]}


def arrow(columns: Any) -> Any:
    return pa.table(columns)


def arrow_batch(columns: Any) -> Any:
    return pa.RecordBatch.from_pydict(columns)


def arrow_in_chunks(columns: Any) -> Any:
    whole = pa.table(columns)
    return pa.concat_tables([whole[:1], whole[1:]])


TABLES = {
    "pyarrow": arrow,
    "pyarrow batch": arrow_batch,
    "pyarrow in chunks": arrow_in_chunks,
    "pandas": pd.DataFrame,
    "polars": pl.DataFrame,
}
DTYPES = {"i": "int64", "f": "float64", "b": "bool"}


@pytest.mark.parametrize("to", ["torch", "numpy"])
@pytest.mark.parametrize("name", TABLES)
def test_table_becomes_a_dict_of_columns(name, to):
    kind = {"torch": torch.Tensor, "numpy": np.ndarray}[to]
    result = getattr(tree, f"to_{to}")({"table": TABLES[name](NUMBERS), "text": "x"})
    columns = result["table"]
    assert type(columns) is dict
    assert list(columns) == list(NUMBERS)
    for column, values in NUMBERS.items():
        assert isinstance(columns[column], kind)
        assert columns[column].tolist() == values
        assert str(columns[column].dtype).removeprefix("torch.") == DTYPES[column]


@pytest.mark.parametrize("name", TABLES)
def test_no_write_through_a_result_reaches_the_table(name):
    table = TABLES[name](NUMBERS)
    for column in tree.to_torch(table).values():
        column.logical_not_() if column.dtype == torch.bool else column.mul_(100)
    for column in tree.to_numpy(table).values():
        if column.flags.writeable:
            column[:] = 0
    assert {c: list(tree.to_numpy(table)[c]) for c in NUMBERS} == NUMBERS


@pytest.mark.parametrize("name", ["pyarrow", "pyarrow batch", "pandas", "polars"])
def test_numbers_are_shared_with_numpy_read_only(name):
    table = TABLES[name](NUMBERS)
    first, second = (tree.to_numpy(table) for _ in range(2))
    for column in ("i", "f"):
        assert not first[column].flags.writeable
        assert np.shares_memory(first[column], second[column])


def test_one_chunk_is_shared_and_chunks_are_joined_once():
    table, chunked = arrow(NUMBERS), arrow_in_chunks(NUMBERS)
    assert tree.plan(table["i"], "numpy").zero_copy
    shared = tree.to_torch({"i": table["i"]}, share_readonly=True)
    assert shared["i"].data_ptr() == table["i"].chunk(0).buffers()[1].address
    plan = tree.plan(chunked, "torch")
    assert [leaf.plan.bytes_moved for leaf in plan.leaves] == [24, 24, 3]
    assert [step.op for step in plan.leaves[0].plan.steps] == ["stack", "share"]
    with tb.trace() as seen:
        tree.to_torch(chunked)
    assert seen.totals.nbytes == 51
    with pytest.raises(tb.CopyRequiredError, match=r"^batch\['i'\]: "):
        tree.to_numpy(chunked, copy=False)


def test_column_without_chunks_is_empty():
    assert tree.to_torch(pa.table({"i": pa.chunked_array([], pa.int16())}))["i"].shape == (0,)
    assert tree.to_torch(pa.table({"b": pa.chunked_array([], pa.bool_())}))["b"].dtype == torch.bool


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("values", [[1, None, 3], [True, None, False], ["a", "b", "c"]])
def test_what_an_array_cannot_hold_is_refused_by_the_name_of_the_column(name, values):
    table = TABLES[name]({"good": [1, 2, 3], "bad": values})
    for call in (tree.to_torch, tree.to_numpy, lambda x: tree.plan(x, "torch")):
        if name == "pandas" and values == [1, None, 3]:  # NaN, a number: pandas has made it one already
            assert np.isnan(tree.to_numpy(table)["bad"][1])
            continue
        with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['bad'\]: "):
            call(table)


def test_nullable_pandas_columns():
    frame = pd.DataFrame({"full": pd.array([1, 2], "Int64"), "holes": pd.array([1, None], "Int64")})
    assert tree.to_torch(frame[["full"]])["full"].dtype == torch.int64
    with pytest.raises(tb.UnsupportedArrayError, match=r"^batch\['holes'\]: .*1 missing value"):
        tree.to_torch(frame)


def test_a_frame_of_one_dtype_is_not_looked_at_column_by_column(monkeypatch):
    """A frame of ten thousand columns took a second to be shared."""
    frame = pd.DataFrame(np.arange(6.0).reshape(2, 3))
    apart = pd.concat([frame, frame * 2], axis=1)
    monkeypatch.setattr(_missing, "named_columns", None)
    assert tb.shares_memory(tb.to_numpy(frame), frame.to_numpy())
    assert np.array_equal(tb.to_numpy(apart), apart.to_numpy())
    assert tb.plan(frame, "numpy").zero_copy
    assert not tb.plan(apart.copy(deep=False).assign(more=1.0), "numpy").zero_copy


def test_column_labels_may_be_anything_but_the_same_twice():
    frame = pd.DataFrame(np.arange(6.0).reshape(2, 3), columns=[0, ("a", 1), "x"])
    assert list(tree.to_numpy(frame)) == [0, ("a", 1), "x"]
    with pytest.raises(tb.UnsupportedArrayError, match="two columns named 'x'"):
        tree.to_numpy(pd.DataFrame(np.zeros((2, 2)), columns=["x", "x"]))
    with pytest.raises(tb.UnsupportedArrayError, match="two columns named 'x'"):
        tree.to_numpy(pa.table([pa.array([1]), pa.array([2])], names=["x", "x"]))


def test_columns_of_one_frame_with_one_dtype_are_views_of_its_block():
    block = np.arange(6.0).reshape(3, 2)
    result = tree.to_numpy(pd.DataFrame(block, copy=False))
    assert np.shares_memory(result[0], block)
    assert not result[0].flags.writeable


NESTED = {
    "fixed size": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32(), 2)),
    "lists of one length": pa.array([[1, 2], [3, 4]], pa.list_(pa.int32())),
    "large lists of one length": pa.array([[1, 2], [3, 4]], pa.large_list(pa.int32())),
    "sliced": pa.array([[0, 0], [1, 2], [3, 4]], pa.list_(pa.int32()))[1:],
    "sliced fixed size": pa.array([[0, 0], [1, 2], [3, 4]], pa.list_(pa.int32(), 2))[1:],
    "fixed-shape tensors": pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([[1, 2], [3, 4]], "i4")),
}


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("name", NESTED)
def test_lists_of_one_length_are_the_rows_of_a_matrix(name, chunks):
    column = NESTED[name]
    column = pa.chunked_array([column] if chunks == 1 else [column[:1], column[1:]])
    made = tree.to_torch({"x": column})["x"]
    assert made.dtype == torch.int32
    assert made.tolist() == [[1, 2], [3, 4]]
    if chunks == 1:
        assert tree.plan({"x": column}, "numpy").zero_copy


def test_deeper_lists_are_deeper_arrays():
    column = pa.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], pa.list_(pa.list_(pa.int64())))
    assert tree.to_numpy([column])[0].shape == (2, 2, 2)
    bits = pa.array([[True, False], [False, True]], pa.list_(pa.bool_()))
    assert tree.to_numpy([bits])[0].tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("column", "text"),
    [
        (pa.array([[1, 2], [3]]), "is ragged: its lists have 1 to 2 elements"),
        (pa.array([[1, 2], None]), "1 missing value"),
        (pa.array([[1, None], [3, 4]]), "1 missing value"),
        (pa.array([[True, None], [False, True]]), "1 missing value"),
        (pa.array([["a", "b"], ["c", "d"]]), "text is not a number"),
        (pa.array([{"a": 1}]), "a record of several fields"),
        (pa.array(["a", "b"]).dictionary_encode(), "its categories are not numbers"),
        (pa.array([1, 2], pa.timestamp("s")), "dates and durations"),
    ],
    ids=str,
)
def test_ragged_null_and_other_columns_are_refused_by_name(column, text):
    with pytest.raises(tb.UnsupportedArrayError, match=rf"^batch\['t'\]\['x'\]: .*{text}"):
        tree.to_torch({"t": pa.table({"x": column})})


TEXT = ["a", "b"]
WHEN = [datetime.date(2020, 1, 1), None]
SEVERAL = {
    "pandas": (
        lambda: pd.DataFrame(
            {
                "n": [1, 2],
                "t": TEXT,
                "c": pd.Series(TEXT, dtype="category"),
                "i": pd.Series([1, None], dtype="Int64"),
                "d": pd.Series(pd.to_datetime(WHEN)).astype("datetime64[s]"),
                "o": [{}, {}],
                "u": TEXT,
            }
        ),
        "'c' (category), 'i' (Int64, 1 missing value), 'd' (datetime64[s], 1 missing value), 'o' (object) and 1 more.",
    ),
    "arrow": (
        lambda: pa.table({"n": [1, 2], "t": TEXT, "i": [1, None], "d": WHEN}),
        "'i' (int64, 1 missing value), 'd' (date32[day], 1 missing value).",
    ),
    "polars": (
        lambda: pl.DataFrame({"n": [1, 2], "t": TEXT, "i": [None, None]}),
        "'i' (Null, 2 missing values).",
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_all_columns_that_cannot_be_converted_are_named_in_one_error(name):
    make, rest = SEVERAL[name]
    x = make()
    for convert, where in (
        (tb.to_torch, f"to_torch: {type(x).__name__}, column 't': "),
        (lambda x: tree.to_torch({"x": x}), "batch['x']['t']: to_torch: "),
    ):
        with pytest.raises(tb.UnsupportedArrayError) as caught:
            convert(x)
        first, _, last = str(caught.value).splitlines()
        assert first.startswith(where)
        assert last == f"Other columns of this table that cannot be converted: {rest}"


def test_a_refused_copy_of_a_column_names_no_others():
    x = pd.DataFrame({"n": pd.Series([1, 2], dtype="category"), "t": TEXT})
    with pytest.raises(tb.CopyRequiredError) as caught:
        tree.to_torch(x, copy=False)
    assert "Other columns" not in str(caught.value)


def test_empty_tables():
    assert tree.to_torch(pd.DataFrame()) == {}
    assert tree.to_torch(pl.DataFrame()) == {}
    assert tree.to_torch(pa.table({})) == {}
    assert tree.to_torch(pl.DataFrame({"x": pl.Series([], dtype=pl.Float32)}))["x"].shape == (0,)


def test_same_column_twice_stays_one():
    table = arrow(NUMBERS)
    result = tree.to_torch({"a": table["i"], "b": table["i"], "t": table})
    assert result["a"] is result["b"]
    assert result["t"]["i"] is result["a"]


def test_series_and_arrays_are_leaves():
    result = tree.to_torch(collections.OrderedDict(a=pd.Series([1, 2]), b=pl.Series([1.0]), c=pa.array([3], pa.int8())))
    assert [t.tolist() for t in result.values()] == [[1, 2], [1.0], [3]]
    assert result["c"].dtype == torch.int8


def test_stream_of_record_batches_is_prefetched():
    table = pa.table({"x": np.arange(10.0), "y": np.arange(10)})
    batches = table.to_batches(max_chunksize=4)
    made = list(tb.prefetch(batches, device="cpu"))
    assert [batch["y"].tolist() for batch in made] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

"""polars: immutable columns, read through `__array__`; nulls beside NaN; strings, dates and nested columns."""

from __future__ import annotations

import datetime
import gc

import numpy as np
import polars as pl
import pytest
import torch

import tensorbridge as tb

NUMBERS = {
    "float64": lambda: pl.Series([1.0, 2.0, 3.0]),
    "float32": lambda: pl.Series([1, 2, 3], dtype=pl.Float32),
    "int64": lambda: pl.Series([1, 2, 3]),
    "int8": lambda: pl.Series([1, 2, 3], dtype=pl.Int8),
    "uint16": lambda: pl.Series([1, 2, 3], dtype=pl.UInt16),
    "slice": lambda: pl.Series([0, 1, 2, 3])[1:],
    "column": lambda: pl.DataFrame({"a": [1, 2, 3], "b": [4, 5, 6]})["a"],
    "matrix": lambda: pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int64, 2)),
    "one column": lambda: pl.DataFrame({"a": [1.0, 2.0]}),
    "empty": lambda: pl.Series([], dtype=pl.Int64),
    "bool": lambda: pl.Series([True, False]),
    "chunks": lambda: pl.concat([pl.Series([1, 2]), pl.Series([3])], rechunk=False),
    "table": lambda: pl.DataFrame({"a": [1.0, 2.0]}).with_columns(b="a"),  # which are no neighbours in memory
}
SHARED = ["float64", "float32", "int64", "int8", "uint16", "slice", "column", "matrix", "one column"]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_come_as_they_are(name):
    source = NUMBERS[name]()
    expected = np.asarray(source)
    a, t = tb.to_numpy(source), tb.to_torch(source)
    assert a.tolist() == t.tolist() == expected.tolist()
    assert str(a.dtype) == str(t.dtype).removeprefix("torch.") == str(expected.dtype)


@pytest.mark.parametrize("name", NUMBERS)
def test_no_write_to_the_result_reaches_the_column(name):
    source = NUMBERS[name]()
    before = np.array(source).tolist()
    tb.to_torch(source).zero_()
    a = tb.to_numpy(source)
    if a.flags.writeable:
        a[...] = 0
    assert np.array(source).tolist() == before


@pytest.mark.parametrize("name", SHARED)
def test_what_polars_shares_is_shared_with_numpy_and_stays_read_only(name):
    source = NUMBERS[name]()
    a = tb.to_numpy(source, copy=False)
    assert np.shares_memory(a, source.to_numpy())
    with pytest.raises(ValueError, match="read-only"):
        a[...] = 0
    assert tb.shares_memory(source, tb.to_torch(source, share_readonly=True))
    with pytest.raises(tb.CopyRequiredError, match="read-only"):
        tb.to_torch(source, copy=False)


@pytest.mark.parametrize("name", ["bool", "chunks", "table"])
def test_what_polars_has_to_copy_is_a_copy_that_copy_false_refuses(name):
    source = NUMBERS[name]()
    for convert in (tb.to_numpy, tb.to_torch):
        with pytest.raises(tb.CopyRequiredError, match=rf"stack +{np.asarray(source).nbytes} B"):
            convert(source, copy=False)


def test_the_result_outlives_the_column():
    a = tb.to_numpy(pl.Series(range(1000)))
    gc.collect()
    others = [pl.Series([0] * 1000) for _ in range(20)]
    assert a.sum() == 999 * 500
    assert len(others) == 20


def test_nan_is_a_number():
    assert np.isnan(tb.to_numpy(pl.Series([1.0, float("nan")]))[1])


MISSING = {
    "integers": (lambda: pl.Series([1, None, None]), 2),
    "floats": (lambda: pl.Series([1.5, None]), 1),
    "truths": (lambda: pl.Series([True, None]), 1),
    "nothing": (lambda: pl.Series([None, None]), 2),
    "inside a matrix": (lambda: pl.Series([[1, None], [3, 4]], dtype=pl.Array(pl.Int64, 2)), 1),
    "a row of a matrix": (lambda: pl.Series([None, [3, 4]], dtype=pl.Array(pl.Int64, 2)), 1),
    "text": (lambda: pl.Series(["a", None]), 1),
}


@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize("name", MISSING)
def test_a_null_is_an_error_that_says_how_many_and_what_to_do(name, copy):
    """`np.asarray` makes NaN of it, and floats of its integers."""
    make, count = MISSING[name]
    for convert in (tb.to_numpy, tb.to_torch):
        with pytest.raises(
            tb.UnsupportedArrayError, match=rf"has {count} missing value.*\n.*(fill_null\(|drop_nulls\()"
        ):
            convert(make(), copy=copy)


def test_the_cure_for_a_null_works():
    source = pl.Series([1, None])
    assert tb.to_torch(source.fill_null(0)).tolist() == [1, 0]
    assert tb.to_torch(source.drop_nulls()).tolist() == [1]
    assert tb.to_torch(source.fill_null(0)).dtype is torch.int64


def test_a_null_in_a_table_is_named_by_its_column():
    with pytest.raises(tb.UnsupportedArrayError, match=r"column 'age': .*it has 1 missing value"):
        tb.to_numpy(pl.DataFrame({"height": [1.0, 2.0], "age": [1, None]}))


NO_NUMBERS = {
    "text": (lambda: pl.Series(["a"]), "text"),
    "categories": (lambda: pl.Series(["a"], dtype=pl.Categorical), "categories are not numbers"),
    "dates": (lambda: pl.Series([datetime.date(2020, 1, 1)]), "dates and durations"),
    "moments": (lambda: pl.Series([datetime.datetime(2020, 1, 1)]), "dates and durations"),
    "durations": (lambda: pl.Series([datetime.timedelta(1)]), "dates and durations"),
    "times": (lambda: pl.Series([datetime.time(1)]), "dates and durations"),
    "decimals": (lambda: pl.Series(["1.5"]).cast(pl.Decimal(3, 1)), "not numbers"),
    "lists": (lambda: pl.Series([[1, 2], [3]]), "is ragged: its lists have 1 to 2 elements"),
    "objects": (lambda: pl.Series([object()], dtype=pl.Object), "not numbers"),
    "mixed table": (lambda: pl.DataFrame({"a": [1], "b": ["x"]}), "DataFrame, column 'b': .*text"),
    "a query": (lambda: pl.LazyFrame({"a": [1]}), r"a query that has not run yet\.\nConvert x\.collect\(\)"),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_is_refused_with_a_cure(name):
    make, words = NO_NUMBERS[name]
    for convert in (tb.to_numpy, tb.to_torch):
        with pytest.raises(tb.UnsupportedArrayError, match=words) as caught:
            convert(make())
        assert len(str(caught.value).splitlines()) == 2

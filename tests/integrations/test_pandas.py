"""pandas: copy-on-write hands out what is read-only; labels are immutable; missing values have signs of their own."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import tensorbridge as tb

NUMBERS = {
    "float64": lambda: pd.Series([1.0, 2.0, 3.0]),
    "float32": lambda: pd.Series([1, 2, 3], dtype="float32"),
    "int64": lambda: pd.Series([1, 2, 3]),
    "uint8": lambda: pd.Series([1, 2, 3], dtype="uint8"),
    "bool": lambda: pd.Series([True, True, True]),
    "slice": lambda: pd.Series([0.0, 1.0, 2.0, 3.0])[1:],
    "every other": lambda: pd.Series([1.0, 0.0, 2.0, 0.0, 3.0])[::2],
    "column": lambda: pd.DataFrame({"a": [1, 2, 3], "b": [4, 5, 6]})["a"],
    "Int64": lambda: pd.Series([1, 2, 3], dtype="Int64"),
    "Float32": lambda: pd.Series([1, 2, 3], dtype="Float32"),
    "boolean": lambda: pd.Series([True, True, True], dtype="boolean"),
    "arrow": lambda: pd.Series([1, 2, 3], dtype="int64[pyarrow]"),
    "categories": lambda: pd.Series([1, 2, 3], dtype="category"),
    "sparse": lambda: pd.Series([1.0, 2.0, 3.0], dtype="Sparse[float]"),
    "array": lambda: pd.array([1, 2, 3], dtype="Int64"),
    "index": lambda: pd.Index([1, 2, 3]),
    "range": lambda: pd.RangeIndex(1, 4),
    "table": lambda: pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]}),
}
SHARED = ["float64", "float32", "int64", "uint8", "bool", "slice", "every other", "column", "index", "Int64", "boolean"]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_come_as_they_are(name):
    source = NUMBERS[name]()
    expected = np.asarray(source)
    a, t = tb.to_numpy(source), tb.to_torch(source)
    assert a.tolist() == t.tolist() == expected.tolist()
    assert str(a.dtype) == str(t.dtype).removeprefix("torch.") == str(expected.dtype)


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "array"])  # which the user may write to himself
def test_no_write_to_the_result_reaches_the_table(name):
    source = NUMBERS[name]()
    before = np.array(source).tolist()
    tb.to_torch(source).zero_()
    a = tb.to_numpy(source)
    if a.flags.writeable:
        a[...] = 0
    assert np.array(source).tolist() == before


@pytest.mark.parametrize("name", SHARED)
def test_what_pandas_shares_is_shared_with_numpy_and_stays_read_only(name):
    source = NUMBERS[name]()
    a = tb.to_numpy(source, copy=False)
    assert np.shares_memory(a, np.asarray(source))
    with pytest.raises(ValueError, match="read-only"):
        a[0] = 0
    assert tb.shares_memory(source, tb.to_torch(source, share_readonly=True))
    with pytest.raises(tb.CopyRequiredError, match="read-only"):
        tb.to_torch(source, copy=False)


def test_the_labels_of_a_table_are_not_writable_though_numpy_gets_them_so():
    index = pd.Index([1, 2, 3])
    assert np.asarray(index).flags.writeable
    a = tb.to_numpy(index)
    assert not a.flags.writeable
    tb.to_torch(index).zero_()
    assert index.get_loc(1) == 0


def test_nan_is_a_number():
    for source in (pd.Series([1.0, np.nan]), pd.Series([1.0, np.nan], dtype="Sparse[float]"), pd.Index([1.0, np.nan])):
        assert np.isnan(tb.to_numpy(source)[1])
        assert torch.isnan(tb.to_torch(source)[1])


MISSING = {
    "Int64": lambda: pd.Series([1, None], dtype="Int64"),
    "Float64": lambda: pd.Series([1.5, None], dtype="Float64"),
    "boolean": lambda: pd.Series([True, None], dtype="boolean"),
    "arrow integers": lambda: pd.Series([1, None], dtype="int64[pyarrow]"),
    "arrow floats": lambda: pd.Series([1.5, None], dtype="double[pyarrow]"),
    "categories": lambda: pd.Series([1, None], dtype="category"),
    "array": lambda: pd.array([1, None], dtype="Int64"),
    "index": lambda: pd.Index([1, None], dtype="Int64"),
}


@pytest.mark.parametrize("copy", [None, False, True])
@pytest.mark.parametrize("name", MISSING)
def test_a_missing_value_is_an_error_that_says_how_many_and_what_to_do(name, copy):
    """`np.asarray` makes NaN of it, and floats of its integers."""
    source = MISSING[name]()
    for convert in (tb.to_numpy, tb.to_torch):
        with pytest.raises(tb.UnsupportedArrayError, match=r"has 1 missing value.*\n.*fillna\((0|False)\).*dropna\(\)"):
            convert(source, copy=copy)
    if name != "categories":
        filled = source.fillna(False if name == "boolean" else 0)
        assert tb.to_torch(filled).tolist() == [source[0], 0]
    assert tb.to_torch(source.dropna()).tolist() == [source[0]]


def test_a_missing_value_in_a_table_is_named_by_its_column():
    table = pd.DataFrame({"height": [1.0, 2.0], "age": pd.Series([1, None], dtype="Int64")})
    with pytest.raises(tb.UnsupportedArrayError, match=r"column 'age': .*it has 1 missing value"):
        tb.to_numpy(table)


NO_NUMBERS = {
    "text": (lambda: pd.Series(["a", "b"]), "text"),
    "objects": (lambda: pd.Series([1, "a"], dtype=object), "Python objects"),
    "text categories": (lambda: pd.Series(["a", "b"], dtype="category"), "its categories are not numbers"),
    "arrow text": (lambda: pd.Series(["a", "b"], dtype="string[pyarrow]"), "text"),
    "dates": (lambda: pd.Series(pd.to_datetime(["2020-01-01", "2021-01-01"])), "dates and durations"),
    "durations": (lambda: pd.Series(pd.to_timedelta([1, 2])), "dates and durations"),
    "zoned dates": (lambda: pd.Series(pd.to_datetime(["2020-01-01"], utc=True)), "dates and durations"),
    "periods": (lambda: pd.Series(pd.period_range("2020", periods=2)), "dates and durations"),
    "mixed table": (lambda: pd.DataFrame({"a": [1.0], "b": ["x"]}), "DataFrame, column 'b': .*text"),
    "pairs": (lambda: pd.MultiIndex.from_tuples([(1, 2)]), "Python objects"),
    "one date": (lambda: pd.Timestamp(0), "not|no array"),
    "nothing": (lambda: pd.NA, "no array"),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_is_refused_with_a_cure(name):
    make, words = NO_NUMBERS[name]
    for convert in (tb.to_numpy, tb.to_torch):
        with pytest.raises(tb.UnsupportedArrayError, match=words) as caught:
            convert(make())
        assert len(str(caught.value).splitlines()) == 2

"""`dtype=` and tables: what is asked for holds for each column, and then they have one dtype or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import tensorbridge as tb

MAKE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "pandas": pd.DataFrame,
    "polars": pl.DataFrame,
    "pyarrow": lambda columns: pa.table(columns),
    "pandas of arrow": lambda columns: pa.table(columns).to_pandas(types_mapper=pd.ArrowDtype),
}
FLOATS = {"a": np.array([0.5, 1.5]), "b": np.array([2.5, 3.5], "f4")}
MIXED = {**FLOATS, "c": np.array([1, 2]), "d": np.array([True, False])}
CASTS = {
    "every kind": (MIXED, {"real floating": "float32", "integral": "float32", "bool": "float32"}, "float32"),
    "by dtype": (FLOATS, {"float64": "float32"}, "float32"),
    "one dtype": ({"a": FLOATS["a"]}, {"real floating": "float16"}, "float16"),
    "one dtype that is not meant": ({"a": FLOATS["a"]}, {"float32": "float16"}, "float64"),
    "each once": (
        {"a": np.arange(2), "b": np.arange(2, dtype="i4")},
        {"integral": "float64", "float64": "int8"},
        "float64",
    ),
}


@pytest.fixture(params=MAKE)
def make(request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], Any]:
    return MAKE[request.param]


@pytest.mark.parametrize("to", ["numpy", "torch"])
@pytest.mark.parametrize("name", CASTS)
def test_a_mapping_makes_of_a_table_what_it_makes_of_its_columns(name, to, make):
    columns, casts, wanted = CASTS[name]
    table = make(columns)
    convert = {"numpy": tb.to_numpy, "torch": tb.to_torch}[to]
    expected = np.stack([tb.to_numpy(column, dtype=casts) for column in columns.values()], axis=1)
    made = convert(table, dtype=casts)
    assert tb.describe(made).dtype == wanted
    assert np.array_equal(made, expected)
    plan = tb.plan(table, to, dtype=casts)
    if len({column.dtype for column in columns.values()}) > 1:
        assert plan == tb.plan(table, to, dtype=wanted)
        assert plan.bytes_moved == expected.nbytes  # each element is written once
        with pytest.raises(tb.CopyRequiredError, match=f"{plan.bytes_moved} B"):
            convert(table, dtype=casts, copy=False)
        with tb.copy_guard("error"), pytest.raises(tb.CopyRequiredError):
            convert(table, dtype=casts)
    with tb.trace() as seen:
        convert(table, dtype=casts)
    assert sum(event.nbytes for event in seen.events) == plan.bytes_moved
    if wanted == "float32":
        assert np.array_equal(convert([table, table], dtype=casts), [expected] * 2)


@pytest.mark.parametrize(
    ("casts", "becomes", "cure"),
    [
        ({"real floating": "float32"}, ["'a' becomes float32", "'c' is int64", "'d' is bool"], "float64"),
        (
            {"integral": "float32", "bool": "float16"},
            ["'a' is float64", "'c' becomes float32", "'d' becomes float16"],
            "float64",
        ),
        (
            {"real floating": "float32", "int64": "int16", "bool": "int8"},
            ["'d' becomes int8", "'c' becomes int16"],
            "float32",
        ),
    ],
)
def test_a_table_whose_columns_stay_different_is_refused_by_what_they_become(casts, becomes, cure, make):
    table = make(MIXED)
    with pytest.raises(tb.UnsupportedArrayError, match="its columns have different dtypes") as caught:
        tb.to_torch(table, dtype=casts)
    for said in becomes:
        assert said in str(caught.value)
    assert f'or say dtype="{cure}".' in str(caught.value)
    assert tb.describe(tb.to_torch(table, dtype=cure)).dtype == cure


def test_a_table_in_a_list_is_not_cast_twice():
    table = pd.DataFrame({"a": [1.0, 2.0], "b": [1, 2]})
    casts = {"float64": "float32", "int64": "float32", "float32": "float16"}
    assert tb.to_numpy([table, table], dtype=casts).dtype == np.float32
    with pytest.raises(tb.UnsupportedArrayError, match="different dtypes: float16, float32"):
        tb.to_numpy([table, np.ones((2, 2), "f4")], dtype=casts)


def test_two_byte_orders_of_one_dtype_are_one_dtype():
    frame = pd.DataFrame({"a": np.arange(2, dtype=">f8"), "b": np.arange(2.0)})
    assert tb.to_torch(frame).tolist() == [[0, 0], [1, 1]]
    assert tb.to_torch(frame, dtype={"float64": "float32"}).tolist() == [[0, 0], [1, 1]]
    with pytest.raises(tb.CopyRequiredError, match=r"^to_numpy\(copy=False\): table"):  # no dtype was asked for
        tb.to_numpy(frame, copy=False)


def test_an_imaginary_part_is_not_dropped_from_one_of_several():
    frame = pd.DataFrame({"a": [1.5], "b": [2j]})
    with pytest.raises(tb.UnsupportedArrayError, match='say dtype="complex128"'):
        tb.to_numpy(frame, dtype={"complex floating": "float64"})
    assert tb.to_numpy(frame, dtype={"real floating": "complex128"}).tolist() == [[1.5, 2j]]
